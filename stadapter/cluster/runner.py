"""Trials on Ray: each in a process of its own, or in several.

A trial that fits one process runs inside a Tune function whose process the next trial uses again. A trial that needs
several processes is a Tune function that starts Ray Train inside and holds no CPU itself, or two CPUs would wait for
each other for ever. Either way the work is `stadapter.training.loop.train`, and what it writes into the trial's folder
is the only result: Tune's own results are not read, so a driver that dies loses nothing.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stadapter.cluster.ray_environment import tune
from stadapter.cluster.ray_runtime import Cluster
from stadapter.cluster.resources import Resources
from stadapter.config import Recipe
from stadapter.training.loop import train
from stadapter.training.options import TrainOptions
from stadapter.training.process_group import ProcessGroup
from stadapter.training.state import Stopped
from stadapter.trials import files, lock, record
from stadapter.trials.stop import GentleStop, Standstill, moving, watch
from stadapter.trials.sweep import Trial

EPOCHS_POLL_S = 0.5
STANDSTILL_S = 2400.0  # without a step or a batch of a test; longer than torch waits for a process that is behind
MOVES = ".moves"  # in a trial's folder: touched while several processes train it
ERROR = "error.txt"  # in a trial's folder: why it failed last
Event = Callable[[str, Trial, dict[str, Any]], None]


def run_trials(
    cluster: Cluster,
    trials: Sequence[Trial],
    output: Path,
    train_options: TrainOptions,
    on_event: Event,
    stop: GentleStop | None = None,
    command: str = "",
) -> None:
    """Run the trials, each once, each in its folder under `output`. One that fails costs no other.

    `on_event` is called in this process with "started", "epoch" (and its metrics) and how the trial ended: "finished",
    "failed" (and the `message`; the folder has error.txt), "stopped" or "busy" (another process writes the folder; the
    `message` says which). Returns when all have ended. Where `stop` asks for it, running trials write a checkpoint and
    the others do not start. `command` is what another launch that meets these trials is told.
    """
    resources = cluster.resources
    folders = [trial.folder(output).resolve() for trial in trials]
    recipes = [trial.recipe for trial in trials]
    stop_file = stop.file.resolve() if stop else None
    several = resources.processes_per_trial > 1

    def run(config: dict[str, int]) -> None:
        recipe, folder = recipes[config["trial"]], folders[config["trial"]]
        ended, message = "stopped", ""
        try:
            if stop_file is None or not stop_file.exists():
                training = _train_in_several_processes if several else train_here
                training(recipe, folder, train_options, resources, stop_file=stop_file, wait=False, command=command)
                ended = "finished"
        except Stopped:
            pass
        except lock.Busy as error:
            ended, message = "busy", str(error)
        except Exception as error:  # whatever it is, it is this trial's: told in its folder, and the others go on
            message = write_error(folder, error)
            if resources.num_gpus and "CUDA error" in str(error):
                raise  # the process cannot use its GPU again: Tune starts another for the next trial
            ended = "failed"
        tune.report({"ended": ended, "message": message})

    if several:
        # Any cluster's head has this resource; a tiny share places the waiting function there, without a CPU.
        share: dict[str, float] = {"cpu": 0, "node:__internal_head__": 0.001}
    else:
        share = {"cpu": resources.cpus_per_process, "gpu": 1 / resources.trials_per_gpu if resources.num_gpus else 0}
    with tempfile.TemporaryDirectory(prefix="stadapter-tune-") as scratch:
        tune.Tuner(
            tune.with_resources(run, share),
            param_space={"trial": tune.grid_search(list(range(len(trials))))},
            tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=cluster.trials_at_once()),
            run_config=tune.RunConfig(
                name="sweep", storage_path=scratch, verbose=0, callbacks=[_Events(trials, folders, on_event, stop)]
            ),
        ).fit()


class _Events(tune.Callback):
    """Tune's callbacks as events of the sweep."""

    def __init__(
        self, trials: Sequence[Trial], folders: Sequence[Path], on_event: Event, stop: GentleStop | None
    ) -> None:
        self.trials, self.folders, self.on_event, self.stop = trials, folders, on_event, stop
        self.started: set[int] = set()
        self.ended: dict[int, tuple[str, str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks for a restart that never comes; a mirror's connections cannot be

    def setup(self, *arguments: Any, **info: Any) -> None:
        if self.stop is not None:
            self.stop.listen()  # Tune has just taken SIGUSR1

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        if self.stop is None or not self.stop.asked:
            self.started.add(trial.config["trial"])
            self.on_event("started", self.trials[trial.config["trial"]], {})

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        if "ended" in result:
            self.ended[trial.config["trial"]] = result["ended"], result["message"]
        elif "epoch" in result:
            self.on_event("epoch", self.trials[trial.config["trial"]], result)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        number = trial.config["trial"]
        kind, message = self.ended[number]
        if number in self.started:
            self.on_event(kind, self.trials[number], {"message": message})

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        number = trial.config["trial"]
        told = self.folders[number] / ERROR
        message = last_line(told) if told.exists() else "its process died (out of memory, or killed)"
        self.on_event("failed", self.trials[number], {"message": message})


def train_here(
    recipe: Recipe,
    folder: Path,
    train_options: TrainOptions,
    resources: Resources,
    *,
    stop_file: Path | None = None,
    wait: bool = True,
    command: str = "",
) -> None:
    """Train in this process, a Tune function's, as the folder's only writer, and report every epoch to Tune.

    Where another process writes the folder: waits for its end, or without `wait` raises Busy. Raises Stopped once
    there is a `stop_file`.
    """
    torch.set_num_threads(resources.cpus_per_process)
    group = ProcessGroup(device=torch.device("cuda" if resources.num_gpus else "cpu"))
    should_stop = watch(stop_file) if stop_file else None
    with lock.writing(folder, command, wait=wait):
        (folder / ERROR).unlink(missing_ok=True)
        train(recipe, folder, train_options, group, lambda metrics: tune.report(metrics), should_stop=should_stop)
    if resources.num_gpus:
        torch.cuda.empty_cache()  # the next trial in this process starts with an empty GPU


def _train_in_several_processes(
    recipe: Recipe,
    folder: Path,
    train_options: TrainOptions,
    resources: Resources,
    *,
    stop_file: Path | None,
    wait: bool,
    command: str,
) -> None:
    from ray import train as ray_train
    from ray.train.torch import TorchConfig, TorchTrainer, get_device

    if not wait and (owner := lock.owner_of(folder)):  # before Ray Train writes what it keeps there
        raise lock.Busy(f"{folder.name} is being written by {owner}")

    def worker(config: dict[str, Any]) -> None:
        context = ray_train.get_context()
        torch.set_num_threads(resources.cpus_per_process)
        group = ProcessGroup(context.get_world_rank(), context.get_world_size(), get_device())
        should_stop = moving(watch(stop_file) if stop_file else lambda: False, folder / MOVES)  # rank 0 asks it
        with contextlib.ExitStack() as held:
            busy = [False]
            if group.rank == 0:  # the one that writes
                try:
                    held.enter_context(lock.writing(folder, command, wait=wait))
                    (folder / ERROR).unlink(missing_ok=True)
                except lock.Busy:
                    busy = [True]
            dist.broadcast_object_list(busy, device=group.device)
            if busy[0]:
                return
            with contextlib.suppress(Stopped):
                train(recipe, folder, train_options, group, should_stop=should_stop)

    known = {line["epoch"] for line in record.read_metrics(folder)}

    def report_epochs() -> None:
        for line in record.read_metrics(folder):
            if line["epoch"] not in known:
                known.add(line["epoch"])
                tune.report(line)

    per_worker = {"CPU": resources.cpus_per_process} | ({"GPU": 1} if resources.num_gpus else {})
    trainer = TorchTrainer(
        worker,
        train_loop_config={},
        torch_config=TorchConfig(backend="nccl" if resources.num_gpus else "gloo"),
        scaling_config=ray_train.ScalingConfig(
            num_workers=resources.processes_per_trial,
            use_gpu=resources.num_gpus > 0,
            resources_per_worker=per_worker,
        ),
        run_config=ray_train.RunConfig(
            name="ray_train",
            storage_path=str(folder),
        ),
    )
    # The epochs are read from the folder, by the one thread that reports to Tune. Ray's own way from Train to Tune has
    # a second thread report into the same queue of one place: when the last epoch meets this function's end there, both
    # wait for ever.
    standstill = Standstill(folder / MOVES)
    with ThreadPoolExecutor(1) as pool:
        fitting = pool.submit(trainer.fit)
        while wait_for([fitting], timeout=EPOCHS_POLL_S).not_done:
            report_epochs()
            if (seconds := standstill.seconds()) > STANDSTILL_S:
                _end_processes(folder, seconds)
        fitting.result()
    report_epochs()
    with contextlib.suppress(OSError):  # a read-only disk: what else it broke is told, not this
        (folder / MOVES).unlink(missing_ok=True)
    # Workers return without a word when they were stopped, and when another process had the folder.
    if not (folder / record.RESULT).exists():
        if stop_file is not None and stop_file.exists():
            raise Stopped
        raise lock.Busy(f"{folder.name} was being written by {lock.owner_of(folder) or 'another process'}")


def _end_processes(folder: Path, seconds: float) -> None:
    """Fail a trial whose processes wait for each other for ever. They go with this one, which Tune replaces."""
    write_error(folder, TimeoutError(f"its processes did nothing for {seconds / 60:.0f} min and were ended"))
    os._exit(1)


def write_error(folder: Path, error: Exception) -> str:
    """Leave why a trial failed in its folder, the cause as the last line; returns that line."""
    text = files.without_passwords("".join(traceback.format_exception(error)))
    cause = files.without_passwords((str(error).strip().splitlines() or [type(error).__name__])[-1])
    with contextlib.suppress(OSError):  # a full or read-only disk may be the very error; the sweep is told anyway
        folder.mkdir(parents=True, exist_ok=True)
        files.write_atomically(folder / ERROR, f"{text}\n{cause}\n".encode())
    return cause


def last_line(path: Path) -> str:
    """Why a trial failed, from its error file."""
    return path.read_text().strip().splitlines()[-1] if path.exists() else "ended without a result"
