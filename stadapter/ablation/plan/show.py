"""The plan of a sweep: the state of every trial and the cost of the missing ones, before anything is started."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stadapter.ablation.options import SweepOptions
from stadapter.ablation.plan.estimate import UNKNOWN_SIZE, Work, operations, rate_of, work_of
from stadapter.ablation.plan.gpus import DEFAULT_GPU, GPUS, gpu_named
from stadapter.ablation.plan.memory import Memory, memory_of
from stadapter.config import ConfigError, Recipe
from stadapter.model.cost import Cost, cost_of
from stadapter.results.grids import padded
from stadapter.training.options import GPU_CLIPS_PER_PASS
from stadapter.training.token_cache import check_pixels
from stadapter.trials.status import Entry
from stadapter.trials.sweep import Sweep, Trial

USABLE = 0.9  # of a GPU's memory: the rest is the libraries' and the allocator's
CHECKPOINT_BYTES = 2 * 12 + 4  # per trained parameter: two checkpoints of weight and two moments, and the outcome
MIB = 2**20


@dataclass(frozen=True)
class Devices:
    """The devices that a sweep is planned for."""

    num_gpus: int
    gpu: str | None  # None: the CPU
    processes: int  # per trial

    @property
    def capacity(self) -> float | None:
        """Usable bytes of one GPU; None on a CPU."""
        return USABLE * GPUS[self.gpu].memory_gib * 2**30 if self.gpu else None


@dataclass(frozen=True)
class ArmPlan:
    """The cost of an arm's trials."""

    label: str
    cost: Cost
    memory: Memory
    hours: float | None  # of one trial; None where no rate is known
    source: str  # of the rate
    todo: int  # trials to run


@dataclass(frozen=True)
class Plan:
    """The cost of a sweep."""

    sweep: Sweep
    states: tuple[tuple[Trial, str], ...]
    todo: int  # trials to run
    devices: Devices
    clips_per_pass: int
    work: Work
    arms: tuple[ArmPlan, ...]


def make_plan(
    sweep: Sweep, selected: Sequence[Trial], todo: Sequence[Trial], entries: Sequence[Entry], options: SweepOptions
) -> Plan:
    """Count and estimate the trials `todo`. Raises ConfigError if options contradict each other or the recipes."""
    if options.training.token_cache_gb:
        for trial in sweep.trials:
            check_pixels(trial.recipe)
    devices = _devices(options)
    global_batch = sweep.recipe.optim.global_batch
    at_most = options.training.clips_per_pass or (GPU_CLIPS_PER_PASS if devices.gpu else global_batch)
    clips_per_pass = min(at_most, global_batch // devices.processes)
    work = work_of(sweep.recipe, options.training.data_root)
    arms = []
    for arm in sweep.arms:
        recipe = next(trial.recipe for trial in sweep.trials if trial.arm == arm.label)
        count = sum(trial.arm == arm.label for trial in todo)
        arms.append(
            _plan_arm(arm.label, recipe, count, entries, devices, clips_per_pass, work, options.training.recompute)
        )
    chosen, again = {trial.id for trial in selected}, {trial.id for trial in todo}
    states = tuple((entry.trial, _state(entry, chosen, again)) for entry in entries)
    return Plan(sweep, states, len(todo), devices, clips_per_pass, work, tuple(arms))


def _plan_arm(
    label: str, recipe: Recipe, todo: int, entries: Sequence[Entry], devices: Devices, clips_per_pass: int, work: Work,
    recompute: bool,
) -> ArmPlan:  # fmt: skip
    cost = cost_of(recipe)
    memory = memory_of(recipe, cost, clips_per_pass, recompute=recompute)
    rate, source = rate_of(entries, recipe, devices.gpu)
    hours = operations(recipe, cost, work) / rate / devices.processes / 3600 if rate else None
    return ArmPlan(label, cost, memory, hours, source, todo)


def _state(entry: Entry, selected: set[str], todo: set[str]) -> str:
    if entry.trial.id not in selected:
        return f"{entry.status}, left out by --only"
    return "done, to run again (--force)" if entry.result is not None and entry.trial.id in todo else entry.status


def _devices(options: SweepOptions) -> Devices:
    """Return the devices to plan for: those asked for, this machine's, or DEFAULT_GPU if --num-gpus names none here."""
    there = torch.cuda.device_count() or (1 if options.gpu else 0)
    num_gpus = there if options.num_gpus is None else options.num_gpus
    options.check_gpus(num_gpus)
    if options.gpu and not num_gpus:
        raise ConfigError(f"--gpu {options.gpu}: --num-gpus 0 plans for the CPU; leave one of them out")
    return Devices(num_gpus, _gpu(options) if num_gpus else None, options.processes(num_gpus))


def _gpu(options: SweepOptions) -> str:
    if options.gpu:
        return options.gpu
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        if found := gpu_named(name):
            return found
        raise ConfigError(f"--plan: nothing is known of this machine's {name}; name a similar one with --gpu")
    return DEFAULT_GPU


def to_text(plan: Plan, options: SweepOptions) -> str:
    """Return the plan as it is printed: trials, a table of arms, and how to read it."""
    width = max(len(trial.name) for trial, _ in plan.states)
    return "\n".join(
        [
            f"{plan.sweep.question}\n",
            f"recipe {plan.sweep.recipe.name}: {len(plan.states)} trials, {plan.todo} to run; nothing is started\n",
            *(f"  {trial.name:<{width}}  {trial.id}  {state}" for trial, state in plan.states),
            "",
            *padded(_rows(plan)),
            "",
            *_notes(plan, options),
        ]
    )


def _rows(plan: Plan) -> list[list[str]]:
    head = ["arm", "trainable", "GMACs/view", "reduced/step", f"memory, {plan.clips_per_pass} clips", "GPU", "h/trial"]
    capacity, shared = plan.devices.capacity, plan.devices.processes > 1
    return [
        head,
        *(
            [
                arm.label,
                f"{arm.cost.trainable_params:,}",
                f"{arm.cost.macs_per_view / 1e9:.4g}",
                f"{arm.cost.trainable_params * 4 / MIB:.1f} MiB" if shared else "-",
                _memory_text(arm.memory),
                "-" if capacity is None else arm.memory.fits(capacity),
                "-" if arm.hours is None else f"{arm.hours:.3g}",
            ]
            for arm in plan.arms
        ),
    ]


def _memory_text(memory: Memory) -> str:
    least, most = ((memory.fixed + part) / MIB for part in (memory.activations_least, memory.activations_most))
    return f"{most:,.0f} MiB" if least == most else f"{least:,.0f} to {most:,.0f} MiB"


def _notes(plan: Plan, options: SweepOptions) -> list[str]:
    """Return the assumptions and the sums."""
    gpu, processes = plan.devices.gpu, plan.devices.processes
    on = f"{plan.devices.num_gpus} x {gpu}" if gpu else "the CPU"
    lines = [f"Planned for {on}, {processes} {'GPU' if gpu else 'process'}{'s' if processes > 1 else ''} per trial."]
    lines.append("Memory: weights, gradients, optimiser and saved activations, without the libraries' own.")
    if gpu and not options.gpu and not torch.cuda.is_available():
        lines.append(f"No GPU is here and --gpu names none: {DEFAULT_GPU} is assumed.")
    if not plan.work.is_known:
        lines.append(
            f"The data set's lists are not here (--data-root): hours are for {UNKNOWN_SIZE:,} training clips, without "
            "validation and test."
        )
    sources = sorted({arm.source for arm in plan.arms})
    lines.append(f"Hours: {'; '.join(sources)}; of computing, if the decoding keeps up.")
    lines += _hours_in_all(plan, options)
    checkpoints = sum(arm.todo * arm.cost.trainable_params * CHECKPOINT_BYTES for arm in plan.arms)
    cache_gb, token_cache_gb = options.training.cache_gb, options.training.token_cache_gb
    frames = f", and up to {cache_gb:g} GB of decoded frames." if cache_gb else "."
    lines.append(f"Disk: {checkpoints / MIB:,.0f} MiB of checkpoints and results{frames}")
    if token_cache_gb:
        lines.append(
            f"--cache-prefix: up to {token_cache_gb:g} GB of tokens on each node; the hours are without it, an "
            "upper bound for arms with frozen lower blocks."
        )
    return lines


def _hours_in_all(plan: Plan, options: SweepOptions) -> list[str]:
    hours = [(arm.hours, arm.todo) for arm in plan.arms]
    if not plan.todo or any(per_trial is None for per_trial, _ in hours):
        return []
    total = sum(per_trial * count for per_trial, count in hours if per_trial is not None)
    gpu, processes = plan.devices.gpu, plan.devices.processes
    slots = plan.devices.num_gpus * options.trials_per_gpu if gpu else os.cpu_count() or 1
    at_once = min(max(1, slots // processes), plan.todo)
    kind = "GPU-hours" if gpu else "hours of processes"
    return [
        f"In all: {total * processes:.3g} {kind} for {plan.todo} trials; {total / at_once:.3g} hours with "
        f"{at_once} at a time."
    ]
