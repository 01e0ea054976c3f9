"""The result of a search as text: a table of its trials, and the best settings to paste."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from stadapter import config, recipes
from stadapter.config import Recipe
from stadapter.tuning.space import METRIC, Range, TrialOutcome, trial_of


def to_csv(trials: Sequence[TrialOutcome], space: Mapping[str, Range]) -> str:
    """Return one line per trial, the best first, and those that did not finish below those that did."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["trial_id", "status", "epochs", METRIC, *space])
    for one in sorted(trials, key=lambda t: (t.status != "finished", -(t.value or 0.0))):
        flat = config.flatten(one.recipe)
        value = "" if one.value is None else one.value
        writer.writerow([trial_of(one.recipe).id, one.status, one.epochs, value, *(flat[path] for path in space)])
    return buffer.getvalue()


def result_text(base_name: str, recipe: Recipe, best: TrialOutcome, finished: Sequence[TrialOutcome]) -> str:
    """Return the best value beside that of `recipe`, where the search started, and the best settings to paste."""
    start = [one.value for one in finished if config.identity(one.recipe) == config.identity(recipe)]
    beside = f"; the recipe's own settings give {start[0]:.1f} %" if start else ""
    return (
        f"Best of {len(finished)} finished trials: val top-1 {best.value:.1f} %{beside}.\n"
        "One seed on the validation split: compare with new seeds before you believe a small gain.\n\n"
        f"{best_text(base_name, best.recipe)}"
    )


def best_text(base_name: str, best: Recipe) -> str:
    """Return the recipe as Python that can be pasted, and as flags of an ablation script."""
    changed = config.difference(recipes.get(base_name), best)
    changed.pop("name", None)
    fields = "".join(f"    {path!r}: {value!r},\n" for path, value in changed.items())
    flags = " ".join(f"--set {path}={_flag(value)}" for path, value in changed.items())
    return (
        f"As Python:\n\nconfig.replace(recipes.{base_name}, **{{\n{fields}}})\n\n"
        f"As flags:\n\n--recipe {base_name} {flags}\n"
    )


def _flag(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
