"""`stadapter tune`: the best optimiser settings for a recipe and a strategy.

Searched on the validation split, one seed, so that a comparison can give each side its best settings without having
looked at the test split. This module is light; Ray and Optuna load when the search starts.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import time
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path

from stadapter import config, recipes
from stadapter.config import ConfigError, Recipe, Strategy
from stadapter.training.flags import add_clips_per_pass, add_data_root, add_set, add_weights, changed_fields
from stadapter.training.options import GPU_CLIPS_PER_PASS
from stadapter.trials import files
from stadapter.tuning.space import METRIC, Known, Range, Tried, apply, known_trials, search_space


def best_text(base_name: str, best: Recipe) -> str:
    """The recipe as Python that can be pasted, and as flags of an ablation script."""
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


def to_csv(tried: Sequence[Tried], space: Mapping[str, Range]) -> str:
    """One line per trial, the best first; values after fewer epochs below those of finished trials."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["trial_id", "status", "epochs", METRIC, *space])
    for one in sorted(tried, key=lambda t: (t.status != "finished", -(t.value or 0.0))):
        flat = config.flatten(one.recipe)
        value = "" if one.value is None else one.value
        writer.writerow([Tried.trial_of(one.recipe).id, one.status, one.epochs, value, *(flat[path] for path in space)])
    return buffer.getvalue()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command, beside --output."""
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
    """Search, print and save the best settings. 0: found; 1: no trial finished."""
    from stadapter.data.lists.formats import load_clips

    if options.trials < 1:
        raise ConfigError(f"--trials {options.trials}: must be at least 1")
    fields = changed_fields(options)
    recipe = recipes.get(options.recipe)
    if options.strategy:
        recipe = recipes.for_strategy(recipe, options.strategy)
    recipe = recipes.with_weights(config.replace(recipe, **fields), options.weights)
    for split in ("train", "val", "test"):
        load_clips(recipe.data, options.data_root, split)
    output = options.output.resolve()
    folder = output / "searches" / f"{options.recipe}-{recipe.strategy}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {options.output}: cannot be written ({error.strerror})") from None
    space = search_space(recipe)
    known = known_trials(recipe, space, output)
    print(f"Searching {', '.join(path.removeprefix('optim.') for path in space)} of {options.recipe} for")
    print(
        f"{recipe.strategy} on the validation split: {options.trials} new trials, {len(known)} known ones", flush=True
    )
    new = _search(recipe, space, known, output, options)
    old = [Tried(apply(recipe, point), "finished", recipe.optim.epochs, value) for point, value in known]
    tried = list({config.identity(one.recipe): one for one in [*old, *new]}.values())
    return _conclude(recipe, space, tried, folder, options.recipe)


def _search(
    recipe: Recipe, space: Mapping[str, Range], known: Sequence[Known], output: Path, options: argparse.Namespace
) -> list[Tried]:
    import torch

    from stadapter.training.options import TrainOptions

    there = torch.cuda.device_count()
    num_gpus = there if options.num_gpus is None else options.num_gpus
    if not 0 <= num_gpus <= there:
        raise ConfigError(f"--num-gpus {num_gpus}: this machine has {there}")
    from stadapter.cluster.ray_runtime import Cluster
    from stadapter.cluster.resources import Resources
    from stadapter.tuning.search import search

    cpus = max(1, (os.cpu_count() or 1) // num_gpus) if num_gpus else 1
    train_options = TrainOptions(
        data_root=options.data_root,
        weights_file=options.weights and options.weights.resolve(),
        num_workers=cpus - 1 if num_gpus else 0,
        clips_per_pass=options.clips_per_pass or (GPU_CLIPS_PER_PASS if num_gpus else None),
    )
    began, ended = time.monotonic(), 0

    def show(one: Tried) -> None:
        nonlocal ended
        ended += 1
        minutes, seconds = divmod(int(time.monotonic() - began), 60)
        flat = config.flatten(one.recipe)
        settings = "  ".join(f"{path.removeprefix('optim.')} {flat[path]:.3g}" for path in space)
        outcome = one.message or f"val top-1 {one.value:.1f} %  after epoch {one.epochs}"
        print(
            f"{minutes:3d}:{seconds:02d}  {ended}/{options.trials}  {one.status:<8}  {settings}  {outcome}", flush=True
        )

    with Cluster(Resources(num_gpus, 1, cpus)) as cluster:
        early = not options.no_early_stopping
        return search(cluster, recipe, space, options.trials, known, output, train_options, show, early_stopping=early)


def _conclude(recipe: Recipe, space: Mapping[str, Range], tried: Sequence[Tried], folder: Path, base_name: str) -> int:
    files.write_atomically(folder / "trials.csv", to_csv(tried, space).encode())
    finished = [one for one in tried if one.status == "finished" and one.value is not None]
    if not finished:
        print(f"No trial finished; see {folder / 'trials.csv'}. Lower rates may help: --set optim.base_lr=...")
        return 1
    best = max(finished, key=lambda one: one.value or 0.0)
    own = [one.value for one in finished if config.identity(one.recipe) == config.identity(recipe)]
    beside = f"; the recipe's own settings give {own[0]:.1f} %" if own else ""
    text = f"Best of {len(finished)} finished trials: val top-1 {best.value:.1f} %{beside}.\n"
    text += "One seed on the validation split: compare with new seeds before you believe a small gain.\n\n"
    text += best_text(base_name, best.recipe)
    files.write_atomically(folder / "best.txt", text.encode())
    print(f"\n{text}\nTrials: {folder / 'trials.csv'}")
    return 0
