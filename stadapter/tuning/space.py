"""The space of a search: ranges of settings, trials in it that finished before, and how a trial of a search ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stadapter import config
from stadapter.config import ConfigError, Recipe
from stadapter.trials import record
from stadapter.trials.sweep import Trial

METRIC = "val_top1"  # per cent, after the last epoch
_DIGITS = 3  # significant digits of a setting, so that it can be written down


@dataclass(frozen=True)
class Range:
    """The values of one setting that are searched, and the recipe's own, from which the search starts."""

    low: float
    high: float
    start: float
    log: bool = False

    def clip(self, value: float) -> float:
        return min(max(value, self.low), self.high)


@dataclass(frozen=True)
class KnownTrial:
    """A trial that finished before the search: its settings by dotted path, and the METRIC that they gave."""

    settings: Mapping[str, float]
    value: float


@dataclass(frozen=True)
class TrialOutcome:
    """How one trial of a search ended."""

    recipe: Recipe
    status: Literal["finished", "stopped", "failed"]  # stopped: early, by the search
    epochs: int
    value: float | None  # METRIC after the last epoch, None if it failed
    message: str = ""  # why it failed


def trial_of(recipe: Recipe) -> Trial:
    """Return the trial of the ledger in which a search trains this recipe."""
    return Trial("search", recipe)


def search_space(recipe: Recipe) -> dict[str, Range]:
    """Return the ranges of learning rate, weight decay, warm-up, dropout, and of the backbone's rate if it has one."""
    optim = recipe.optim
    space = {
        "optim.base_lr": Range(_round(optim.base_lr / 10), _round(optim.base_lr * 10), optim.base_lr, log=True),
        "optim.weight_decay": Range(1e-4, 0.5, optim.weight_decay, log=True),
        "optim.warmup_epochs": Range(0.0, _round(optim.epochs / 2), optim.warmup_epochs),
        "optim.head_dropout": Range(0.0, 0.7, optim.head_dropout),
    }
    if optim.backbone_lr_factor != 1:
        factor = optim.backbone_lr_factor
        space["optim.backbone_lr_factor"] = Range(_round(factor / 10), _round(min(1.0, factor * 10)), factor, log=True)
    return space


def apply(recipe: Recipe, settings: Mapping[str, float]) -> Recipe:
    """Return the recipe with settings that a search suggested, rounded unless they are the recipe's."""
    flat = config.flatten(recipe)
    rounded = {path: value if value == flat[path] else _round(value) for path, value in settings.items()}
    return config.replace(recipe, **rounded)


def _round(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def known_trials(recipe: Recipe, space: Mapping[str, Range], output: Path) -> list[KnownTrial]:
    """Return the finished trials of the ledger that lie in the space and otherwise equal the recipe."""
    fixed = _fixed(recipe, space)
    found: list[KnownTrial] = []
    for path in sorted(output.glob(f"trials/*/{record.RESULT}")):
        result = record.read_result(path.parent)
        assert result is not None  # its file was found just now
        try:
            done = config.unflatten(dict(result.recipe))
        except ConfigError:  # a recipe of another version, with other fields
            continue
        flat, epochs = config.flatten(done), record.read_metrics(path.parent)
        point = {name: flat[name] for name in space}
        inside = all(space[name].low <= value <= space[name].high for name, value in point.items())
        if inside and epochs and _fixed(done, space) == fixed:
            found.append(KnownTrial(point, epochs[-1][METRIC]))
    return found


def _fixed(recipe: Recipe, space: Mapping[str, Range]) -> dict[str, object]:
    """Return the fields of the recipe that the search leaves alone."""
    return {path: value for path, value in config.flatten(recipe).items() if path not in space and path != "name"}
