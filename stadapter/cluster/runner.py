"""Trials on Ray: each in one process, or each in several.

A trial that fits one process runs inside a Tune function whose process the next trial uses again. A trial that needs
several processes is a Tune function that starts Ray Train inside and holds no CPU itself: two that held one would wait
for each other's for ever. Either way the work is `stadapter.training.loop.train`, and the trial's folder is the only
result: Tune's own results are not read, so a driver that dies loses nothing.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from stadapter.cluster.events import Event, Events
from stadapter.cluster.failure import ERROR, write_error
from stadapter.cluster.ray_environment import tune
from stadapter.cluster.ray_runtime import Cluster
from stadapter.cluster.resources import Resources
from stadapter.config import Recipe
from stadapter.training.loop import train
from stadapter.training.options import TrainOptions
from stadapter.training.process_group import ProcessGroup
from stadapter.training.state import Stopped
from stadapter.trials import lock, record
from stadapter.trials.stop import GentleStop, Standstill, moving, watch
from stadapter.trials.sweep import Trial

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

EPOCHS_POLL_S = 0.5
STANDSTILL_S = 2400.0  # without a step or a batch of a test; longer than torch waits for a process that is behind
MOVES = ".moves"  # in a trial's folder: touched while several processes train it


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

    Returns when all have ended. Once `stop` is asked for, running trials write a checkpoint and the others do not
    start. `command` names this launch to another one that meets its trials.

    `on_event` is called in this process with each event of a trial: see `cluster.events`.
    """
    resources = cluster.resources
    folders = [trial.folder(output).resolve() for trial in trials]
    run = _tune_function(trials, folders, train_options, resources, stop.file.resolve() if stop else None, command)
    with tempfile.TemporaryDirectory(prefix="stadapter-tune-") as scratch:
        tune.Tuner(
            tune.with_resources(run, _share(resources)),
            param_space={"trial": tune.grid_search(list(range(len(trials))))},
            tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=cluster.trials_at_once()),
            run_config=tune.RunConfig(
                name="sweep", storage_path=scratch, verbose=0, callbacks=[Events(trials, folders, on_event, stop)]
            ),
        ).fit()


def _tune_function(
    trials: Sequence[Trial],
    folders: Sequence[Path],
    train_options: TrainOptions,
    resources: Resources,
    stop_file: Path | None,
    command: str,
) -> Callable[[dict[str, int]], None]:
    """Return the function that Tune calls for each trial, with the trial's number, in a process of its choice."""
    recipes = [trial.recipe for trial in trials]
    training = train_in_several_processes if resources.processes_per_trial > 1 else train_here

    def run(config: dict[str, int]) -> None:
        recipe, folder = recipes[config["trial"]], folders[config["trial"]]
        ended, message = "stopped", ""
        try:
            if stop_file is None or not stop_file.exists():
                training(recipe, folder, train_options, resources, stop_file=stop_file, wait=False, command=command)
                ended = "finished"
        except Stopped:
            pass
        except lock.Busy as error:
            ended, message = "busy", str(error)
        except Exception as error:  # of any kind: it fails this trial alone, and the folder says why
            message = write_error(folder, error)
            if resources.num_gpus and "CUDA error" in str(error):
                raise  # the process cannot use its GPU again: Tune starts another for the next trial
            ended = "failed"
        tune.report({"ended": ended, "message": message})

    return run


def _share(resources: Resources) -> dict[str, float]:
    """Return the resources that Tune holds for one trial's function."""
    if resources.processes_per_trial > 1:
        # Any cluster's head has this resource; a tiny share places the waiting function there, without a CPU.
        return {"cpu": 0, "node:__internal_head__": 0.001}
    return {"cpu": resources.cpus_per_process, "gpu": 1 / resources.trials_per_gpu if resources.num_gpus else 0}


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
    """Train in this process, that of a Tune function, as the folder's only writer, and report every epoch to Tune.

    If another process writes the folder, `wait` for its end; `command` names this process to those that wait.
    Raises Busy if another process writes the folder and `wait` is False, and Stopped once there is a `stop_file`.
    """
    torch.set_num_threads(resources.cpus_per_process)
    group = ProcessGroup(device=torch.device("cuda" if resources.num_gpus else "cpu"))
    should_stop = watch(stop_file) if stop_file else None
    with _writing(folder, command, wait=wait):
        train(recipe, folder, train_options, group, lambda metrics: tune.report(metrics), should_stop=should_stop)
    if resources.num_gpus:
        torch.cuda.empty_cache()  # the next trial in this process starts with an empty GPU


@contextlib.contextmanager
def _writing(folder: Path, command: str, *, wait: bool) -> Iterator[None]:
    """Hold the lock of a trial's folder within a context, and forget why the trial failed last."""
    with lock.writing(folder, command, wait=wait):
        (folder / ERROR).unlink(missing_ok=True)
        yield


def train_in_several_processes(
    recipe: Recipe,
    folder: Path,
    train_options: TrainOptions,
    resources: Resources,
    *,
    stop_file: Path | None = None,
    wait: bool = True,
    command: str = "",
) -> None:
    """Train in `resources.processes_per_trial` processes and report every epoch to Tune, as `train_here` does in one.

    Raises Busy if another process writes the folder and `wait` is False, and Stopped once there is a `stop_file`.
    """
    from ray import train as ray_train  # late: one process needs no Ray Train
    from ray.train.torch import get_device

    if not wait and (owner := lock.owner_of(folder)):  # before Ray Train writes into the folder
        raise lock.Busy(f"{folder.name} is being written by {owner}")

    def worker(config: dict[str, Any]) -> None:
        torch.set_num_threads(resources.cpus_per_process)
        context = ray_train.get_context()
        group = ProcessGroup(context.get_world_rank(), context.get_world_size(), get_device())
        # Rank 0 alone calls it.
        should_stop = moving(watch(stop_file) if stop_file else lambda: False, folder / MOVES)
        with contextlib.ExitStack() as held:
            if _hold_folder(held, folder, command, group, wait=wait):
                with contextlib.suppress(Stopped):
                    train(recipe, folder, train_options, group, should_stop=should_stop)

    _fit(_trainer(worker, folder, resources), folder)
    with contextlib.suppress(OSError):  # a read-only disk: the trial's own error says so
        (folder / MOVES).unlink(missing_ok=True)
    # The workers return normally when they were stopped, and when another process had the folder.
    if not (folder / record.RESULT).exists():
        if stop_file is not None and stop_file.exists():
            raise Stopped
        raise lock.Busy(f"{folder.name} was being written by {lock.owner_of(folder) or 'another process'}")


def _hold_folder(held: contextlib.ExitStack, folder: Path, command: str, group: ProcessGroup, *, wait: bool) -> bool:
    """Let rank 0, which alone writes, hold the folder's lock. Returns False on every rank if it is another's."""
    busy = [False]
    if group.rank == 0:
        try:
            held.enter_context(_writing(folder, command, wait=wait))
        except lock.Busy:
            busy = [True]
    dist.broadcast_object_list(busy, device=group.device)
    return not busy[0]


def _trainer(worker: Callable[[dict[str, Any]], None], folder: Path, resources: Resources) -> TorchTrainer:
    from ray import train as ray_train
    from ray.train.torch import TorchConfig, TorchTrainer

    return TorchTrainer(
        worker,
        train_loop_config={},
        torch_config=TorchConfig(backend="nccl" if resources.num_gpus else "gloo"),
        scaling_config=ray_train.ScalingConfig(
            num_workers=resources.processes_per_trial,
            use_gpu=resources.num_gpus > 0,
            resources_per_worker={"CPU": resources.cpus_per_process} | ({"GPU": 1} if resources.num_gpus else {}),
        ),
        run_config=ray_train.RunConfig(name="ray_train", storage_path=str(folder)),
    )


def _fit(trainer: TorchTrainer, folder: Path) -> None:
    """Run Ray Train, report to Tune the epochs that appear in the folder, and end processes that do nothing any more.

    One thread reads the epochs and reports them. Ray's own way from Train to Tune has a second thread report into the
    same queue of one place: when the last epoch meets this function's end there, both wait for ever.
    """
    known = {line["epoch"] for line in record.read_metrics(folder)}

    def report_epochs() -> None:
        for line in record.read_metrics(folder):
            if line["epoch"] not in known:
                known.add(line["epoch"])
                tune.report(line)

    standstill = Standstill(folder / MOVES)
    with ThreadPoolExecutor(1) as pool:
        fitting = pool.submit(trainer.fit)
        while wait_for([fitting], timeout=EPOCHS_POLL_S).not_done:
            report_epochs()
            if (seconds := standstill.seconds()) > STANDSTILL_S:
                _end_processes(folder, seconds)
        fitting.result()
    report_epochs()


def _end_processes(folder: Path, seconds: float) -> None:
    """Fail a trial whose processes wait for each other for ever. They go with this one, which Tune replaces."""
    write_error(folder, TimeoutError(f"its processes did nothing for {seconds / 60:.0f} min and were ended"))
    os._exit(1)
