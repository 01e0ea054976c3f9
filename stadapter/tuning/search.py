"""The search for optimiser settings on Ray Tune with Optuna.

Apart from `cluster.runner`, because the two use Tune in ways that exclude each other: a sweep enumerates its trials and
runs each to its end, a search lets Optuna choose the next one and stops bad ones early. Both train by `train_here`.

A trial of a search lies in its own folder of the ledger like any other. One that is stopped early leaves its epochs and
its checkpoint but no result, so that it does not look finished; a later sweep of it continues from there.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from stadapter.cluster.failure import ERROR, read_error, write_error
from stadapter.cluster.ray_environment import tune
from stadapter.cluster.ray_runtime import Cluster
from stadapter.cluster.runner import train_here

# isort: split
# After ray_environment, which sets what Ray reads while it is imported.
import optuna
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search.optuna import OptunaSearch

from stadapter.cluster.resources import Resources
from stadapter.config import Recipe
from stadapter.training.options import TrainOptions
from stadapter.trials import record
from stadapter.tuning.space import METRIC, KnownTrial, Range, TrialOutcome, apply, trial_of

FAILED_VALUE = 0.0  # the search's value of a training that diverged: nothing is worse


def search(
    cluster: Cluster,
    recipe: Recipe,
    space: Mapping[str, Range],
    trials: int,
    known: Sequence[KnownTrial],
    output: Path,
    train_options: TrainOptions,
    on_trial: Callable[[TrialOutcome], None],
    *,
    early_stopping: bool = True,
) -> list[TrialOutcome]:
    """Run `trials` trials within `space`, chosen by Optuna's TPE, which starts from the `known` ones.

    The recipe's own settings come first unless they are known. `on_trial` is called in this process with each trial
    that has ended. Returns all of them; after Ctrl-C, those that had ended.
    """
    resources = cluster.resources
    ended: list[TrialOutcome] = []
    # Ctrl-C ends the search, and the trials that have ended by then count.
    with tempfile.TemporaryDirectory(prefix="stadapter-search-") as scratch, contextlib.suppress(KeyboardInterrupt):
        tune.Tuner(
            tune.with_resources(
                _tune_function(recipe, output, train_options, resources),
                {"cpu": resources.cpus_per_process, "gpu": 1 if resources.num_gpus else 0},
            ),
            tune_config=tune.TuneConfig(
                search_alg=_searcher(recipe, space, known),
                scheduler=_scheduler(recipe.optim.epochs) if early_stopping else None,
                num_samples=trials,
                reuse_actors=True,
                max_concurrent_trials=cluster.trials_at_once(),
            ),
            run_config=tune.RunConfig(
                name="search", storage_path=scratch, verbose=0, callbacks=[_Ended(recipe, output, ended, on_trial)]
            ),
        ).fit()
    return ended


def _tune_function(
    recipe: Recipe, output: Path, train_options: TrainOptions, resources: Resources
) -> Callable[[dict[str, float]], None]:
    """Return the function that Tune calls with the settings of each trial."""

    def run(settings: dict[str, float]) -> None:
        trial_recipe = apply(recipe, settings)
        folder = trial_of(trial_recipe).folder(output)
        (folder / ERROR).unlink(missing_ok=True)
        try:
            if record.read_result(folder) is None:
                train_here(trial_recipe, folder, train_options, resources)
            # Once more, for a trial that had nothing left to train: the search waits for a value from each.
            tune.report(record.read_metrics(folder)[-1])
        except Exception as error:  # of any kind: it fails this trial alone, and the folder says why
            write_error(folder, error)
            if not (folder / ERROR).exists():
                raise  # the folder cannot be written: without an exception the trial would not look failed
            tune.report({METRIC: FAILED_VALUE, "epoch": trial_recipe.optim.epochs})

    return run


def _searcher(recipe: Recipe, space: Mapping[str, Range], known: Sequence[KnownTrial]) -> OptunaSearch:
    """Return Optuna's TPE, told the `known` trials; unless they hold the recipe's settings, it tries those first."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    start = {path: limits.clip(limits.start) for path, limits in space.items()}
    searcher = OptunaSearch(
        {path: optuna.distributions.FloatDistribution(r.low, r.high, log=r.log) for path, r in space.items()},
        metric=METRIC,
        mode="max",
        points_to_evaluate=None if any(one.settings == start for one in known) else [start],
        # The seed changes with what is known, or the same command begun again would draw the same points.
        sampler=optuna.samplers.TPESampler(seed=recipe.seed + 1000 * len(known), multivariate=True),
    )
    for one in known:
        searcher.add_evaluated_point(dict(one.settings), one.value)
    return searcher


def _scheduler(epochs: int) -> AsyncHyperBandScheduler | None:
    """Return ASHA with one look, half-way, after which the best third goes on; None for a single epoch.

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
    """Tune's callbacks that read from a trial's folder how it ended, and pass it on."""

    def __init__(
        self, recipe: Recipe, output: Path, ended: list[TrialOutcome], on_trial: Callable[[TrialOutcome], None]
    ) -> None:
        self.recipe, self.output, self.ended, self.on_trial = recipe, output, ended, on_trial

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._end(trial.config, "")

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._end(trial.config, "its process died (out of memory, or killed)")

    def _end(self, settings: dict[str, float], died: str) -> None:
        recipe = apply(self.recipe, settings)
        folder = trial_of(recipe).folder(self.output)
        epochs = record.read_metrics(folder)
        message = died or read_error(folder) or ""
        status: Literal["finished", "stopped", "failed"] = "failed" if message else "stopped"
        if record.read_result(folder):
            status = "finished"
        value = epochs[-1][METRIC] if epochs and status != "failed" else None
        outcome = TrialOutcome(recipe, status, len(epochs), value, message)
        self.ended.append(outcome)
        self.on_trial(outcome)
