"""Arms, trials and their place in the output folder.

<output>/trials/<trial id>/     one run folder per trial (see stadapter.trials.record), shared by all sweeps
<output>/sweeps/<sweep name>/   the tables and the figure of one sweep
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stadapter import config, recipes
from stadapter.config import ConfigError, Recipe
from stadapter.trials import files, record
from stadapter.trials.record import Record

DEFAULT_OUTPUT = Path("runs")
DEFAULT_STORE = "sqlite:///mlflow.db"
SWEEP, FIGURE = "sweep.json", "figure.png"  # of a sweep's folder


@dataclass(frozen=True)
class Arm:
    """One value of the ablated factor: its label in tables, the fields it changes, and its place in a figure.

    `fields` are keyed by dotted path. An arm with an `x` lies on the sweep's axis. A line connects the arms of one
    series, and the figure's legend names it; the nameless series needs no name where it is the only one.
    """

    label: str
    fields: dict[str, Any]
    x: float | None = None
    series: str | tuple[str, ...] = ""  # several names: their lines meet in this arm

    @property
    def series_names(self) -> tuple[str, ...]:
        """The names of all series that the arm belongs to."""
        return (self.series,) if isinstance(self.series, str) else self.series


@dataclass(frozen=True)
class Axis:
    """The axis along which a sweep's arms lie, as a figure labels it."""

    label: str
    is_log: bool = False


@dataclass(frozen=True)
class Trial:
    """One arm with one seed."""

    arm: str
    recipe: Recipe

    @property
    def id(self) -> str:
        return config.identity(self.recipe)

    @property
    def seed(self) -> int:
        return self.recipe.seed

    @property
    def name(self) -> str:
        return f"{self.arm} seed {self.seed}"

    def folder(self, output: Path) -> Path:
        return output / "trials" / self.id


@dataclass(frozen=True)
class Sweep:
    """All trials of one question, arm by arm."""

    name: str
    question: str
    recipe: Recipe
    arms: tuple[Arm, ...]
    trials: tuple[Trial, ...]
    expected: str = ""  # what the paper or the script predicts: shown beside what came out
    axis: Axis | None = None  # None: the arms are listed by name

    def folder(self, output: Path) -> Path:
        """Return the sweep's folder, such as `sweeps/kernel-embedded`.

        A changed recipe adds a hash to the name, so that its tables replace no others.
        """
        label = f"{self.name}-{self.recipe.name}"
        identity = config.identity(config.replace(self.recipe, seed=0))
        if self.recipe.name not in recipes.names() or identity != config.identity(recipes.get(self.recipe.name)):
            label += f"-{identity[:6]}"
        return output / "sweeps" / label


def make_sweep(
    name: str,
    question: str,
    recipe: Recipe,
    arms: Sequence[Arm],
    seeds: int,
    expected: str = "",
    axis: Axis | None = None,
) -> Sweep:
    """Return the sweep of every arm with the seeds 0 ... `seeds` - 1, seeds innermost.

    Raises ConfigError if two arms are the same training, or if a name cannot be that of a folder.
    """
    for what, text in (("sweep", name), ("recipe", recipe.name)):
        if not re.fullmatch(r"\w[\w.+-]*", text):
            raise ConfigError(
                f"the {what}'s name {text!r}: becomes that of a folder; letters, digits, _ . + and - only"
            )
    trials = []
    seen: dict[str, str] = {}
    for arm in arms:
        for seed in range(seeds):
            trial = Trial(arm.label, config.replace(recipe, **arm.fields, seed=seed))
            if trial.id in seen:
                raise ConfigError(f"arms '{seen[trial.id]}' and '{arm.label}' are the same training; leave one out")
            seen[trial.id] = arm.label
            trials.append(trial)
    return Sweep(name, question, recipe, tuple(arms), tuple(trials), expected, axis)


def records(sweep: Sweep, output: Path) -> list[Record | None]:
    """Return the record of each trial in order, None if it has not finished."""
    return [record.read_result(trial.folder(output)) for trial in sweep.trials]


def save_sweep(sweep: Sweep, output: Path) -> None:
    """Write the sweep's description into its folder, from which its tables and its MLflow runs can be made again."""
    seeds = sorted({trial.seed for trial in sweep.trials})
    description = {
        "name": sweep.name,
        "question": sweep.question,
        "expected": sweep.expected,
        "recipe": config.flatten(sweep.recipe),
        "arms": [vars(arm) for arm in sweep.arms],
        "seeds": len(seeds),
        "axis": sweep.axis and vars(sweep.axis),
    }
    files.write_json(sweep.folder(output) / SWEEP, description)


def load_sweep(folder: Path) -> Sweep:
    """Return the sweep that `save_sweep` described in `folder`. Raises ConfigError if there is none.

    Descriptions written before arms had a place on an axis still load: their arms are listed by name.
    """
    path = folder / SWEEP
    if not path.exists():
        raise ConfigError(f"{path}: there is no sweep here")
    saved = json.loads(path.read_text())
    arms = [_load_arm(arm) for arm in saved["arms"]]
    recipe = config.unflatten(saved["recipe"])
    axis = Axis(**saved["axis"]) if saved.get("axis") else None
    return make_sweep(saved["name"], saved["question"], recipe, arms, saved["seeds"], saved.get("expected", ""), axis)


def _load_arm(saved: dict[str, Any]) -> Arm:
    series = saved.get("series", "")
    return Arm(saved["label"], saved["fields"], saved.get("x"), series if isinstance(series, str) else tuple(series))


def sweep_folders(output: Path) -> list[Path]:
    """Return the folders of all sweeps under `output`, by name. Raises ConfigError if there is none."""
    folders = sorted(path.parent for path in output.glob(f"sweeps/*/{SWEEP}"))
    if not folders:
        raise ConfigError(f"--output {output}: there is no sweep in this folder")
    return folders
