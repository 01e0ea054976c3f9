"""Data-parallel training: measured on two processes here, and modelled for 8 to 512 GPUs.

    python -m benchmarks.scaling

Measured is the training loop itself (`stadapter.training.loop`) on the embedded model, one thread a process, its clips
in memory. Strong: the global batch stays and is shared. Weak: each process keeps as many clips. Beside them two
processes train without exchanging anything: what these cores lose by working at once is not the exchange's doing.

Modelled are the published recipes. A step is the time to compute a GPU's share of the global batch, plus what of a ring
all-reduce of the gradients is not hidden behind the backward pass. Every assumption is printed, and is a flag where no
data sheet gives it.

Sizes: G clips in a global batch, n GPUs or processes.
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

from benchmarks import data, reference_decoding
from stadapter import config, recipes
from stadapter.ablation.gpus import DEFAULT_GPU, GPUS
from stadapter.ablation.plan import Work, operations, rate_of
from stadapter.config import Recipe
from stadapter.data.bad_clips import BadClips
from stadapter.data.reader import Reading
from stadapter.model.cost import cost_of
from stadapter.training import hardware
from stadapter.training.loop import train_epoch
from stadapter.training.options import TrainOptions
from stadapter.training.process_group import ProcessGroup
from stadapter.training.state import Clock, TrainState, make_components

MODELLED = ("ssv2_clip_b16", "kinetics400_clip_b16")
NUMBERS_OF_GPUS = tuple(2**k for k in range(3, 10))
GPUS_PER_NODE = 8
BYTES_PER_GRADIENT = 4  # float32 under every precision; tests/training/test_loop.py counts them
WARM_UP_STEPS = 3


# --- measured


@dataclass(frozen=True)
class Case:
    """Two processes that train at once, or the first alone while the second sleeps."""

    name: str
    processes: int
    clips_per_process: int
    exchange: bool = True  # False: each trains by itself


@dataclass(frozen=True)
class Measured:
    """Medians over the steps of all rounds."""

    case: Case
    step_s: float
    exchange_s: float  # from the last gradient of a step to the end of its all-reduce; waiting for the other included


def cases(global_batch: int) -> list[Case]:
    """The first is what the others are compared with."""
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
    """Seconds of each step of this process, and of its exchange of gradients (0 in a world of one)."""
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
            ends.append(time.perf_counter())  # the loop asks for the next step's clips when it has ended one
            yield [batch]

    count = WARM_UP_STEPS + steps
    state = TrainState(folder, components, BadClips("train", 1, 1.0), {}, count, float("inf"), None, Clock())
    train_epoch(state, endless(), None)
    ends.append(time.perf_counter())
    took = [after - before for before, after in itertools.pairwise(ends)]
    assert len(took) == count
    per_step = len(exchanges) // count  # buckets; each runs after the one before
    assert len(exchanges) == per_step * count
    exchange = [sum(exchanges[step * per_step : (step + 1) * per_step]) for step in range(count)]
    return took[WARM_UP_STEPS:], exchange[WARM_UP_STEPS:]


def _timed_into(exchanges: list[float]) -> Callable[[object, dist.GradBucket], torch.futures.Future[torch.Tensor]]:
    def exchange(state, bucket):  # type: ignore[no-untyped-def]  # this interface refuses annotations that are text
        began = time.perf_counter()

        def note(done):  # type: ignore[no-untyped-def]  # likewise
            exchanges.append(time.perf_counter() - began)
            return done.value()

        return allreduce_hook(None, bucket).then(note)  # type: ignore[arg-type]  # None: the default group

    return exchange


def _measure_in(rank: int, folder: Path, global_batch: int, steps: int, rounds: int) -> None:
    """One of the two processes; the cases take turns."""
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
    """Every case; of two processes that exchange nothing the slower one counts."""
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
    """Clips per second and process of the other, over those of the one process."""
    speeds = [measured.case.clips_per_process / measured.step_s for measured in (one, other)]
    return speeds[1] / speeds[0]


# --- modelled


@dataclass(frozen=True)
class Network:
    """What a ring all-reduce runs over, in one direction."""

    within_node_gb_s: float  # of each GPU
    between_nodes_gb_s: float  # of each node
    hop_us: float  # latency of a message to the next GPU
    hidden: float  # share of the all-reduce that runs behind the backward pass


@dataclass(frozen=True)
class Step:
    """One optimiser step on n GPUs, in seconds."""

    gpus: int
    global_batch: int
    compute_s: float
    all_reduce_s: float
    hidden: float

    @property
    def seconds(self) -> float:
        return self.compute_s + (1 - self.hidden) * self.all_reduce_s

    @property
    def efficiency(self) -> float:
        """Against the same work on one GPU, which exchanges nothing."""
        return self.compute_s / self.seconds

    @property
    def clips_per_s_and_node(self) -> float:
        """What the loaders of a node must deliver."""
        return self.global_batch / self.seconds / max(1, self.gpus / GPUS_PER_NODE)


def ring_all_reduce_s(size: int, gpus: int, network: Network) -> float:
    """Of `size` bytes: 2 (n - 1) rounds, in each of which every GPU sends 1/n of them to the next one.

    The ring visits the nodes one after the other, so it crosses each node's link once a round.
    """
    if gpus == 1:
        return 0.0
    slowest = network.within_node_gb_s
    if gpus > GPUS_PER_NODE:
        slowest = min(slowest, network.between_nodes_gb_s)
    return 2 * (gpus - 1) * (size / gpus / (slowest * 1e9) + network.hop_us * 1e-6)


def shared_equally(global_batch: int, gpus: int) -> str:
    """Why it cannot be; empty if it can."""
    if gpus > global_batch:
        return f"not possible: {global_batch} clips to a step, less than one for each GPU"
    if global_batch % gpus:
        return f"not possible: {global_batch} clips to a step cannot be shared equally"
    return ""


def model_step(recipe: Recipe, global_batch: int, gpus: int, rate: float, network: Network) -> Step:
    """`rate`: operations per second of one GPU. ValueError where the batch cannot be shared equally."""
    if why := shared_equally(global_batch, gpus):
        raise ValueError(why)
    cost = cost_of(recipe)
    per_clip = operations(recipe, cost, Work(1, 0, 0, True)) / recipe.optim.epochs
    all_reduce_s = ring_all_reduce_s(cost.trainable_params * BYTES_PER_GRADIENT, gpus, network)
    return Step(gpus, global_batch, global_batch / gpus * per_clip / rate, all_reduce_s, network.hidden)


def clip_ms(recipe: Recipe, rounds: int) -> float:
    """CPU milliseconds to read one training clip here, on one core (see benchmarks/data.py)."""
    with tempfile.TemporaryDirectory() as scratch:
        path = reference_decoding.write_clip(Path(scratch) / "0.mp4", 0)
        way = data.ours(recipe.data, recipe.data.resize, train=True, reading=Reading())
        return data.measure({recipe.name: way}, [path], rounds)[recipe.name]


# --- printed


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


def print_modelled(recipe: Recipe, options: argparse.Namespace, network: Network, ms: float) -> None:
    G = options.global_batch or recipe.optim.global_batch
    rate, source = rate_of([], recipe, options.gpu)
    assert rate is not None  # the data sheet's
    cost = cost_of(recipe)
    print(f"{recipe.name}, {G} clips to a step, {options.gpu}\n")
    print(
        "| GPUs | clips per GPU | compute ms | all-reduce ms | ms per step | efficiency % | weak % | clips/s per node "
        "| cores per node |\n|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    at_first = G // NUMBERS_OF_GPUS[0]
    for gpus in NUMBERS_OF_GPUS:
        weak = model_step(recipe, at_first * gpus, gpus, rate, network).efficiency
        if why := shared_equally(G, gpus):
            print(f"| {gpus} | {why} | | | | | {100 * weak:.0f} | | |")
            continue
        step = model_step(recipe, G, gpus, rate, network)
        cells = [f"{gpus}", f"{G // gpus}", f"{1000 * step.compute_s:.1f}", f"{1000 * step.all_reduce_s:.1f}"]
        cells += [f"{1000 * step.seconds:.1f}", f"{100 * step.efficiency:.0f}", f"{100 * weak:.0f}"]
        cells += [f"{step.clips_per_s_and_node:.0f}", f"{step.clips_per_s_and_node * ms / 1000:.0f}"]
        print(f"| {' | '.join(cells)} |")
    gradients_mb = cost.trainable_params * BYTES_PER_GRADIENT / 1e6
    print(f"""
- the global batch is the recipe's and stays, so it bounds the number of GPUs; weak: {at_first} clips per GPU on all of
  them, which is another global batch, hence another recipe
- compute: {cost.macs_per_view / 1e9:.1f} GMACs a clip forward, two operations each, the backward pass as in `--plan`;
  {source};
  the same for few clips per GPU as for many; nothing for the optimiser, nor for starting kernels
- all-reduce: {cost.trainable_params:,} trained parameters x {BYTES_PER_GRADIENT} bytes = {gradients_mb:.1f} MB,
  in one ring over all GPUs, {GPUS_PER_NODE} to a node (NCCL's trees need fewer hops);
  assumed: {network.within_node_gb_s:g} GB/s within a node, {network.between_nodes_gb_s:g} between two,
  {network.hop_us:g} us a hop, {100 * network.hidden:.0f} % of it hidden behind the backward pass
- clips/s per node: what that step asks of the loaders; cores per node: at the {ms:.1f} CPU ms that a training clip
  (10 s, 340x256, H.264, no cache) took on one core here; a node with fewer cores waits for them
""")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--steps", type=int, default=20, metavar="N", help="measured, per round (default: %(default)s)")
    add("--rounds", type=int, default=3, metavar="N", help="(default: %(default)s)")
    add("--gpu", choices=sorted(GPUS), default=DEFAULT_GPU, metavar="NAME", help="modelled (default: %(default)s)")
    add("--global-batch", type=int, metavar="N", help="modelled (default: the recipe's)")
    add(
        "--within-node", type=float, default=240, metavar="GB/S",
        help="of each GPU in one direction (default: %(default)s, 80 %% of the A100's NVLink)",
    )  # fmt: skip
    add(
        "--between-nodes", type=float, default=20, metavar="GB/S",
        help="of each node in one direction (default: %(default)s, 80 %% of one adapter of 200 Gbit/s)",
    )  # fmt: skip
    add("--hop-us", type=float, default=10, metavar="US", help="latency to the next GPU (default: %(default)s)")
    add("--hidden", type=float, default=0, metavar="SHARE", help="of the all-reduce (default: %(default)s, the worst)")
    options = parser.parse_args(arguments)
    if not 0 <= options.hidden <= 1:
        parser.error("--hidden: a share, in [0, 1]")
    network = Network(options.within_node, options.between_nodes, options.hop_us, options.hidden)
    load = os.getloadavg()[0]
    found = measure(recipes.embedded.optim.global_batch, options.steps, options.rounds)
    print(f"{datetime.date.today()}, {hardware.cpu_name()}, {os.cpu_count()} cores, torch {torch.__version__},")
    print(f"load {load:.1f} before, {os.getloadavg()[0]:.1f} after\n")
    print_measured(found, options.steps, options.rounds)
    print()
    torch.set_num_threads(1)
    for name in MODELLED:
        recipe = recipes.get(name)
        print_modelled(recipe, options, network, clip_ms(recipe, options.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
