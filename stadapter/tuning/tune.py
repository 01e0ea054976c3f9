"""`stadapter tune`: the best optimiser settings for a recipe and a strategy.

Searched on the validation split, one seed, so that a comparison can give each side its best settings without having
looked at the test split. From Python, without argparse and without printing:

    plan = plan_search(SearchOptions(recipe="embedded", strategy="lora", trials=8))
    result = run_search(plan, on_trial=print)

The command, at the end, fills the options and prints. This module is light; Ray and Optuna load when the search starts.
"""

from __future__ import annotations

import argparse
import os
import time
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stadapter import config, recipes
from stadapter.cluster.resources import Resources
from stadapter.config import ConfigError, Recipe, Strategy
from stadapter.data.lists.formats import load_clips
from stadapter.training.flags import add_clips_per_pass, add_data_root, add_set, add_weights, changed_fields
from stadapter.training.options import GPU_CLIPS_PER_PASS, TrainOptions
from stadapter.trials import files
from stadapter.trials.sweep import DEFAULT_OUTPUT
from stadapter.tuning.report import result_text, to_csv
from stadapter.tuning.space import KnownTrial, Range, TrialOutcome, apply, known_trials, search_space


@dataclass(frozen=True)
class SearchOptions:
    """The request for a search: its recipe, its share of this machine, and the folder of its trials."""

    recipe: str = "embedded"  # a named recipe
    strategy: str | None = None  # None: the recipe's
    trials: int = 16  # new ones
    fields: Mapping[str, Any] = field(default_factory=dict)  # of the recipe, by dotted path, that are changed first
    data_root: str | None = None
    weights: Path | None = None
    early_stopping: bool = True
    num_gpus: int | None = None  # None: all that there are; one per trial
    clips_per_pass: int | None = None
    output: Path = DEFAULT_OUTPUT


@dataclass(frozen=True)
class SearchPlan:
    """A search that can start: its inputs are there and its folder can be written."""

    options: SearchOptions
    recipe: Recipe
    space: Mapping[str, Range]
    known: tuple[KnownTrial, ...]
    folder: Path  # of trials.csv and best.txt


@dataclass(frozen=True)
class SearchResult:
    """All trials of a search, the known ones among them, and the best of those that finished."""

    trials: tuple[TrialOutcome, ...]
    best: TrialOutcome | None  # None: no trial finished
    text: str  # of best.txt; "" without a best


def plan_search(options: SearchOptions) -> SearchPlan:
    """Check the options and return the search. Raises ConfigError for options that cannot work."""
    if options.trials < 1:
        raise ConfigError(f"--trials {options.trials}: must be at least 1")
    recipe = recipes.get(options.recipe)
    if options.strategy:
        recipe = recipes.for_strategy(recipe, options.strategy)
    recipe = recipes.with_weights(config.replace(recipe, **options.fields), options.weights)
    for split in ("train", "val", "test"):
        load_clips(recipe.data, options.data_root, split)
    output = options.output.resolve()
    folder = output / "searches" / f"{options.recipe}-{recipe.strategy}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {options.output}: cannot be written ({error.strerror})") from None
    space = search_space(recipe)
    return SearchPlan(options, recipe, space, tuple(known_trials(recipe, space, output)), folder)


def run_search(plan: SearchPlan, on_trial: Callable[[TrialOutcome], None]) -> SearchResult:
    """Run the search, write trials.csv and best.txt into its folder, and return the result.

    `on_trial` is called with each new trial that has ended. Ctrl-C ends the search, and the trials that have ended by
    then count. Raises ConfigError if this machine has fewer GPUs than asked for.
    """
    new = _search(plan, on_trial)
    epochs = plan.recipe.optim.epochs
    old = [TrialOutcome(apply(plan.recipe, one.settings), "finished", epochs, one.value) for one in plan.known]
    trials = tuple({config.identity(one.recipe): one for one in [*old, *new]}.values())
    files.write_atomically(plan.folder / "trials.csv", to_csv(trials, plan.space).encode())
    finished = [one for one in trials if one.status == "finished" and one.value is not None]
    if not finished:
        return SearchResult(trials, None, "")
    best = max(finished, key=lambda one: one.value or 0.0)
    text = result_text(plan.options.recipe, plan.recipe, best, finished)
    files.write_atomically(plan.folder / "best.txt", text.encode())
    return SearchResult(trials, best, text)


def _search(plan: SearchPlan, on_trial: Callable[[TrialOutcome], None]) -> list[TrialOutcome]:
    """Run the trials of the search on a Ray that is started for it on this machine."""
    options = plan.options
    num_gpus = _num_gpus(options.num_gpus)
    # Late, since Ray and Optuna take seconds to load.
    from stadapter.cluster.ray_runtime import Cluster
    from stadapter.tuning.search import search

    cpus = max(1, (os.cpu_count() or 1) // num_gpus) if num_gpus else 1
    train_options = TrainOptions(
        data_root=options.data_root,
        weights_file=options.weights and options.weights.resolve(),
        num_workers=cpus - 1 if num_gpus else 0,
        clips_per_pass=options.clips_per_pass or (GPU_CLIPS_PER_PASS if num_gpus else None),
    )
    with Cluster(Resources(num_gpus, 1, cpus)) as cluster:
        return search(
            cluster, plan.recipe, plan.space, options.trials, plan.known, options.output.resolve(), train_options,
            on_trial, early_stopping=options.early_stopping,
        )  # fmt: skip


def _num_gpus(wanted: int | None) -> int:
    """Return how many GPUs to use. Raises ConfigError if there are fewer."""
    import torch  # late: it takes a second to load

    there = torch.cuda.device_count()
    if wanted is None:
        return there
    if not 0 <= wanted <= there:
        raise ConfigError(f"--num-gpus {wanted}: this machine has {there}")
    return wanted


# --- The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command, beside --output."""
    parser.add_argument("--recipe", default="embedded", metavar="NAME", help="what is tuned (default: %(default)s)")
    parser.add_argument(
        "--strategy", choices=typing.get_args(Strategy), help="what is trained (default: what the recipe says)"
    )
    parser.add_argument("--trials", type=int, default=16, metavar="N", help="new trials (default: %(default)s)")
    add_set(parser)
    add_data_root(parser)
    add_weights(parser)
    parser.add_argument("--no-early-stopping", action="store_true", help="train every trial to its end")
    parser.add_argument("--num-gpus", type=int, metavar="N", help="one per trial (default: all that there are)")
    add_clips_per_pass(parser)


def run(options: argparse.Namespace) -> int:
    """Search, print and save the best settings, and return the exit code: 0 if a trial finished, else 1."""
    plan = plan_search(_search_options(options))
    print(f"Searching {', '.join(map(_short, plan.space))} of {options.recipe} for")
    print(
        f"{plan.recipe.strategy} on the validation split: {options.trials} new trials, {len(plan.known)} known ones",
        flush=True,
    )
    result = run_search(plan, _printer(plan))
    if result.best is None:
        print(f"No trial finished; see {plan.folder / 'trials.csv'}. Lower rates may help: --set optim.base_lr=...")
        return 1
    print(f"\n{result.text}\nTrials: {plan.folder / 'trials.csv'}")
    return 0


def _search_options(options: argparse.Namespace) -> SearchOptions:
    return SearchOptions(
        recipe=options.recipe,
        strategy=options.strategy,
        trials=options.trials,
        fields=changed_fields(options),
        data_root=options.data_root,
        weights=options.weights,
        early_stopping=not options.no_early_stopping,
        num_gpus=options.num_gpus,
        clips_per_pass=options.clips_per_pass,
        output=options.output,
    )


def _printer(plan: SearchPlan) -> Callable[[TrialOutcome], None]:
    """Return a function that prints each trial that has ended, with the time since now and how many have ended."""
    began, ended = time.monotonic(), 0

    def show(one: TrialOutcome) -> None:
        nonlocal ended
        ended += 1
        minutes, seconds = divmod(int(time.monotonic() - began), 60)
        count = f"{ended}/{plan.options.trials}"
        print(f"{minutes:3d}:{seconds:02d}  {count}  {one.status:<8}  {_line(one, plan)}", flush=True)

    return show


def _line(one: TrialOutcome, plan: SearchPlan) -> str:
    flat = config.flatten(one.recipe)
    settings = "  ".join(f"{_short(path)} {flat[path]:.3g}" for path in plan.space)
    outcome = one.message or f"val top-1 {one.value:.1f} %  after epoch {one.epochs}"
    return f"{settings}  {outcome}"


def _short(path: str) -> str:
    return path.removeprefix("optim.")
