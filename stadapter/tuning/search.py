"""The search for optimiser settings on Ray Tune with Optuna.

A module of its own beside `sweep` because the two use Tune in ways that exclude each other: a sweep enumerates its
trials itself and runs every one to its end, a search lets Optuna choose the next one and stops bad ones early. What
they share, Ray's start and the training inside a Tune function, is `sweep`'s.

A trial of a search is a trial like any other, in its own folder of the ledger. One that is stopped early leaves its
epochs and checkpoint there but no result, so that it does not look finished; a later sweep of it continues from there.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stadapter.cluster.failure import ERROR, read_error, write_error
from stadapter.cluster.ray_environment import tune
from stadapter.cluster.ray_runtime import Cluster
from stadapter.cluster.runner import train_here

# isort: split
# After `sweep`, which sets the environment that Ray reads when it is imported.
import optuna
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search.optuna import OptunaSearch

from stadapter.config import Recipe
from stadapter.training.options import TrainOptions
from stadapter.trials import record
from stadapter.tuning.space import METRIC, Known, Range, Tried, apply

FAILED_VALUE = 0.0  # what the search learns from a training that diverged: nothing is worse


def search(
    cluster: Cluster,
    recipe: Recipe,
    space: Mapping[str, Range],
    trials: int,
    known: Sequence[Known],
    output: Path,
    train_options: TrainOptions,
    on_trial: Callable[[Tried], None],
    *,
    early_stopping: bool = True,
) -> list[Tried]:
    """Run `trials` trials within `space`, chosen by Optuna's TPE, which starts from the `known` ones.

    The recipe's own settings come first unless they are known. `on_trial` is called in this process with each trial
    that has ended. Returns all of them; after Ctrl-C, those that had ended.
    """
    resources = cluster.resources

    def run(settings: dict[str, float]) -> None:
        trial_recipe = apply(recipe, settings)
        folder = Tried.trial_of(trial_recipe).folder(output)
        (folder / ERROR).unlink(missing_ok=True)
        try:
            if record.read_result(folder) is None:
                train_here(trial_recipe, folder, train_options, resources)
            # Once more, for a trial that had nothing left to train: the search waits for a value from each.
            tune.report(record.read_metrics(folder)[-1])
        except Exception as error:  # it is this trial's: told in its folder, and the search goes on
            write_error(folder, error)
            if not (folder / ERROR).exists():
                raise  # the folder cannot be written, and nothing else would say that the trial failed
            tune.report({METRIC: FAILED_VALUE, "epoch": trial_recipe.optim.epochs})

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    own = {path: limits.clip(limits.own) for path, limits in space.items()}
    searcher = OptunaSearch(
        {path: optuna.distributions.FloatDistribution(r.low, r.high, log=r.log) for path, r in space.items()},
        metric=METRIC,
        mode="max",
        points_to_evaluate=None if any(point == own for point, _ in known) else [own],
        # Another start for the same command begun again with more known, or it would draw the same points.
        sampler=optuna.samplers.TPESampler(seed=recipe.seed + 1000 * len(known), multivariate=True),
    )
    for point, value in known:
        searcher.add_evaluated_point(dict(point), value)
    tried: list[Tried] = []
    # Ctrl-C ends the search, and what has ended by then counts.
    with tempfile.TemporaryDirectory(prefix="stadapter-search-") as scratch, contextlib.suppress(KeyboardInterrupt):
        tune.Tuner(
            tune.with_resources(run, {"cpu": resources.cpus_per_process, "gpu": 1 if resources.num_gpus else 0}),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=_scheduler(recipe.optim.epochs) if early_stopping else None,
                num_samples=trials,
                reuse_actors=True,
                max_concurrent_trials=cluster.trials_at_once(),
            ),
            run_config=tune.RunConfig(
                name="search", storage_path=scratch, verbose=0, callbacks=[_Ended(recipe, output, tried, on_trial)]
            ),
        ).fit()
    return tried


def _scheduler(epochs: int) -> AsyncHyperBandScheduler | None:
    """ASHA with one look, half-way: the best third goes on.

    Not earlier, because the warm-up, which is searched too, takes up to half of the epochs. `max_t` lies beyond the
    last epoch, or ASHA would stop trials that are about to be tested.
    """
    if epochs < 2:
        return None
    return AsyncHyperBandScheduler(
        time_attr="epoch", metric=METRIC, mode="max", max_t=epochs + 1, grace_period=(epochs + 1) // 2,
        reduction_factor=3,
    )  # fmt: skip


class _Ended(tune.Callback):
    """Says how each trial ended, from what its folder holds."""

    def __init__(self, recipe: Recipe, output: Path, tried: list[Tried], on_trial: Callable[[Tried], None]) -> None:
        self.recipe, self.output, self.tried, self.on_trial = recipe, output, tried, on_trial

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._end(trial.config, "")

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._end(trial.config, "its process died (out of memory, or killed)")

    def _end(self, settings: dict[str, float], died: str) -> None:
        recipe = apply(self.recipe, settings)
        folder = Tried.trial_of(recipe).folder(self.output)
        epochs = record.read_metrics(folder)
        message = died or read_error(folder) or ""
        status = "finished" if record.read_result(folder) else "failed" if message else "stopped"
        value = epochs[-1][METRIC] if epochs and status != "failed" else None
        ended = Tried(recipe, status, len(epochs), value, message)
        self.tried.append(ended)
        self.on_trial(ended)
