"""What a search looks for, and what it knows already: ranges of settings, and trials that finished before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stadapter import config
from stadapter.config import ConfigError, Recipe
from stadapter.trials import record
from stadapter.trials.sweep import Trial

METRIC = "val_top1"  # per cent, after the last epoch


_DIGITS = 3  # settings are rounded to as many significant digits, so that they can be written down


Known = tuple[Mapping[str, float], float]  # settings by dotted path, and the METRIC they gave


@dataclass(frozen=True)
class Range:
    """Where a setting is searched; `own` is the recipe's value."""

    low: float
    high: float
    own: float
    log: bool = False

    def clip(self, value: float) -> float:
        return min(max(value, self.low), self.high)


@dataclass(frozen=True)
class Tried:
    """How one trial of a search ended: finished, stopped (early) or failed (and why)."""

    recipe: Recipe
    status: str
    epochs: int
    value: float | None  # METRIC after its last epoch, None if it failed
    message: str = ""

    @staticmethod
    def trial_of(recipe: Recipe) -> Trial:
        return Trial("search", recipe)


def search_space(recipe: Recipe) -> dict[str, Range]:
    """Learning rate, weight decay, warm-up and dropout; the backbone's own rate where the recipe has one."""
    optim = recipe.optim
    space = {
        "optim.base_lr": Range(_round(optim.base_lr / 10), _round(optim.base_lr * 10), optim.base_lr, log=True),
        "optim.weight_decay": Range(1e-4, 0.5, optim.weight_decay, log=True),
        "optim.warmup_epochs": Range(0.0, _round(optim.epochs / 2), optim.warmup_epochs),
        "optim.head_dropout": Range(0.0, 0.7, optim.head_dropout),
    }
    if optim.backbone_lr_factor != 1:
        own = optim.backbone_lr_factor
        space["optim.backbone_lr_factor"] = Range(_round(own / 10), _round(min(1.0, own * 10)), own, log=True)
    return space


def apply(recipe: Recipe, settings: Mapping[str, float]) -> Recipe:
    """The recipe with settings that a search suggested, rounded; the recipe's own values stay as they are."""
    flat = config.flatten(recipe)
    return config.replace(recipe, **{p: v if v == flat[p] else _round(v) for p, v in settings.items()})


def _round(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def known_trials(recipe: Recipe, space: Mapping[str, Range], output: Path) -> list[Known]:
    """Finished trials of the ledger that differ from the recipe in searched settings alone, and lie in the space."""
    fixed = _fixed(recipe, space)
    found: list[Known] = []
    for path in sorted(output.glob(f"trials/*/{record.RESULT}")):
        try:
            done = config.unflatten(json.loads(path.read_text())["recipe"])
        except ConfigError:  # of another version, with other fields
            continue
        flat, epochs = config.flatten(done), record.read_metrics(path.parent)
        point = {name: flat[name] for name in space}
        inside = all(space[name].low <= value <= space[name].high for name, value in point.items())
        if inside and epochs and _fixed(done, space) == fixed:
            found.append((point, epochs[-1][METRIC]))
    return found


def _fixed(recipe: Recipe, space: Mapping[str, Range]) -> dict[str, object]:
    return {path: value for path, value in config.flatten(recipe).items() if path not in space and path != "name"}
