"""Data-parallel training on two processes, measured on this machine.

    python -m benchmarks.scaling

Times the training loop (`stadapter.training.loop`) on the embedded model, one thread a process, clips in memory:

- strong scaling: the processes share the global batch of one process;
- weak scaling: each process has the batch of one process;
- each alone: two processes exchange no gradients, which shows how much the cores slow each other down.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from stadapter import config, recipes
from stadapter.config import Recipe
from stadapter.data.bad_clips import BadClips
from stadapter.model.cost import cost_of
from stadapter.training import hardware
from stadapter.training.loop import train_epoch
from stadapter.training.options import TrainOptions
from stadapter.training.process_group import ProcessGroup
from stadapter.training.state import Clock, TrainState, make_components

BYTES_PER_GRADIENT = 4  # float32 under every precision; tests/training/test_loop.py counts them
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Case:
    """A way to train: in both processes, or in the first while the second sleeps."""

    name: str
    processes: int
    clips_per_process: int
    exchange: bool = True  # gradients; False: each process trains alone


@dataclass(frozen=True)
class Measured:
    """The medians of a case over the steps of all rounds."""

    case: Case
    step_s: float
    exchange_s: float  # from a step's last gradient to the end of its all-reduce, waiting included


def cases(global_batch: int) -> list[Case]:
    """Return the cases to measure. The first is the baseline of the others."""
    half = global_batch // 2
    return [
        Case("1 process", 1, global_batch),
        Case("2, strong", 2, half),
        Case("2, each alone", 2, half, exchange=False),
        Case("2, weak", 2, global_batch),
        Case("2, each alone", 2, global_batch, exchange=False),
    ]


def time_steps(
    recipe: Recipe, group: ProcessGroup, clips: int, steps: int, folder: Path
) -> tuple[list[float], list[float]]:
    """Return the seconds of each step of this process, and of each exchange of gradients (0 with one process)."""
    recipe = config.replace(recipe, **{"optim.global_batch": clips * group.world_size})
    components = make_components(recipe, TrainOptions(), group)
    exchanges: list[float] = []
    if isinstance(components.replica, DistributedDataParallel):
        components.replica.register_comm_hook(None, _timed_into(exchanges))
    size, T = recipe.data.frame_size, recipe.data.num_frames
    generator = torch.Generator().manual_seed(group.rank)
    batch = {
        "pixels": torch.randint(0, 256, (clips, T, 3, size, size), dtype=torch.uint8, generator=generator),
        "label": torch.randint(0, recipe.data.num_classes, (clips,), generator=generator),
        "position": torch.arange(clips),
    }
    ends: list[float] = []

    def endless() -> Iterator[list[dict[str, Any]]]:
        while True:
            ends.append(time.perf_counter())  # the loop asks for the next clips after each step
            yield [batch]

    count = WARM_UP_STEPS + steps
    state = TrainState(folder, components, BadClips("train", 1, 1.0), {}, count, float("inf"), None, Clock())
    train_epoch(state, endless(), None)
    ends.append(time.perf_counter())
    took = [after - before for before, after in itertools.pairwise(ends)]
    assert len(took) == count
    per_step = len(exchanges) // count  # buckets, reduced one after the other
    assert len(exchanges) == per_step * count
    exchange = [sum(exchanges[step * per_step : (step + 1) * per_step]) for step in range(count)]
    return took[WARM_UP_STEPS:], exchange[WARM_UP_STEPS:]


def _timed_into(exchanges: list[float]) -> Callable[[object, dist.GradBucket], torch.futures.Future[torch.Tensor]]:
    def exchange(state, bucket):  # type: ignore[no-untyped-def]  # the interface rejects annotations as text
        began = time.perf_counter()

        def note(done):  # type: ignore[no-untyped-def]  # likewise
            exchanges.append(time.perf_counter() - began)
            return done.value()

        return allreduce_hook(None, bucket).then(note)  # type: ignore[arg-type]  # None: the default group

    return exchange


def _measure_in(rank: int, folder: Path, global_batch: int, steps: int, rounds: int) -> None:
    """Measure all cases in turns in one of the two processes, and write the times to a file."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=timedelta(minutes=10))
    found: list[tuple[list[float], list[float]]] = [([], []) for _ in cases(global_batch)]
    try:
        for _ in range(rounds):
            for number, case in enumerate(cases(global_batch)):
                dist.barrier()  # sleeps on a socket
                if rank < case.processes:
                    group = ProcessGroup(rank, 2) if case.processes == 2 and case.exchange else ProcessGroup()
                    times = time_steps(recipes.embedded, group, case.clips_per_process, steps, folder)
                    for kept, new in zip(found[number], times, strict=True):
                        kept += new
        dist.barrier()
    finally:
        dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(found))


def measure(global_batch: int, steps: int, rounds: int) -> list[Measured]:
    """Return the medians of every case. Of two processes, the slower one counts."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = (Path(scratch), global_batch, steps, rounds)
        multiprocessing.spawn(_measure_in, arguments, nprocs=2)
        by_rank = [json.loads((Path(scratch) / f"{rank}.json").read_text()) for rank in range(2)]
    found = []
    for case, *times in zip(cases(global_batch), *by_rank, strict=True):
        medians = [[statistics.median(part) for part in rank] for rank in times[: case.processes]]
        found.append(Measured(case, max(step for step, _ in medians), max(exchange for _, exchange in medians)))
    return found


def efficiency(one: Measured, other: Measured) -> float:
    """Return the clips per second and process of `other`, relative to `one`."""
    speeds = [measured.case.clips_per_process / measured.step_s for measured in (one, other)]
    return speeds[1] / speeds[0]


def print_measured(found: list[Measured], steps: int, rounds: int) -> None:
    print("| embedded | clips per process | ms per step | efficiency % | all-reduce % |\n|---|---:|---:|---:|---:|")
    for measured in found:
        case = measured.case
        exchanged = f"{100 * measured.exchange_s / measured.step_s:.1f}" if case.processes > 1 and case.exchange else ""
        print(
            f"| {case.name} | {case.clips_per_process} | {1000 * measured.step_s:.1f} | "
            f"{100 * efficiency(found[0], measured):.0f} | {exchanged} |"
        )
    size = cost_of(recipes.embedded).trainable_params * BYTES_PER_GRADIENT
    print(f"""
- medians of {rounds} rounds of {steps} steps, the cases in turns; gloo over loopback; one thread a process
- efficiency: clips per second and process against the one process's
- all-reduce: from a step's last gradient until {size:,} bytes are summed, waiting for the other process included
- clips are in memory, so that reading them is not measured""")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="measured, per round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of all cases (default: %(default)s)")
    options = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    found = measure(recipes.embedded.optim.global_batch, options.steps, options.rounds)
    print(f"{datetime.date.today()}, {hardware.cpu_name()}, {os.cpu_count()} cores, torch {torch.__version__},")
    print(f"load {load:.1f} before, {os.getloadavg()[0]:.1f} after\n")
    print_measured(found, options.steps, options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
