"""The adapter, a training step and inference against a plain model: time, saved activations, peak memory.

    python -m benchmarks.step adapter      # alone, five kernels
    python -m benchmarks.step float32      # the model, ViT-B/16 (or --model embedded)
    python -m benchmarks.step bfloat16
    python -m benchmarks.step memory

Ours and the plain way (`reference_model.py`) take turns in one process with one thread and the same matrix products;
times are medians of its CPU seconds, and a ratio is the plain way's over ours. Outputs and gradients are compared in
the same run. "Products" is the profiled share of the plain way's time in matrix products and attention: speeding up all
the rest gains at most about 1 / share. The exit code is 1 if a target is missed or a result differs.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.reference_model import PlainAdapter, PlainClassifier
from stadapter import recipes
from stadapter.backbone.vit import EMBEDDED_SHAPE, ViT, VitShape, seed_weights
from stadapter.config import AdapterConfig
from stadapter.model.adapter import STAdapter
from stadapter.model.build import cast_frozen, freeze
from stadapter.model.classifier import VideoClassifier
from stadapter.model.state import trainable_parameters
from stadapter.training import hardware
from stadapter.training.hardware import PRECISIONS
from stadapter.training.optim import make_optimizer

CPU = torch.device("cpu")
VIT_B16 = VitShape(224, 16, 768, 12, 12, 3072, "quick_gelu", 1e-5, pre_norm=True, patch_bias=False)
MODELS = {
    "vit_b16": (VIT_B16, AdapterConfig(384, (3, 1, 1), placement="before_mhsa"), 1),
    "embedded": (EMBEDDED_SHAPE, AdapterConfig(48, (3, 3, 3), placement="before_mhsa"), 8),
}
FRAMES = 8
KERNELS = ((1, 1, 1), (3, 1, 1), (5, 1, 1), (1, 3, 3), (3, 3, 3))
KERNEL_TARGETS = {(3, 1, 1): 1.3, (3, 3, 3): 1.3}
OUTPUT_LIMIT, GRADIENT_LIMIT = 1e-5, 1e-4
# The least ratio to the plain way, for ViT-B/16.
TARGETS = {
    "float32": {"training step": 1.15},
    "bfloat16": {"training step": 1.3},
}
SAVED_LIMITS = {"ours": 0.67, "recompute": 0.45}

Work = Callable[[], object]


@dataclass(frozen=True)
class Pair:
    name: str
    plain: Work
    ours: Work
    target: float | None = None


def models(name: str) -> tuple[VideoClassifier, PlainClassifier, Tensor]:
    """Return our model, the plain one with equal weights, and pixels, uint8 [B, T, 3, H, W].

    No adapter is the identity.
    """
    shape, adapter, clips = MODELS[name]
    vit = ViT(shape)
    seed_weights(vit, 0)
    model = VideoClassifier(vit, 174, adapter)
    freeze(model, "st_adapter", train_final_norm=False)
    generator = torch.Generator().manual_seed(0)
    for module in model.before.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.normal_(module.weight, std=0.3, generator=generator)
    side = shape.image_size
    pixels = torch.randint(0, 256, (clips, FRAMES, 3, side, side), dtype=torch.uint8, generator=generator)
    return model, PlainClassifier(model, adapter.bottleneck_width, adapter.kernel_size), pixels


def loss_of(model: nn.Module, pixels: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = model(pixels)
    return F.cross_entropy(logits.float(), torch.arange(len(pixels)))


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, pixels: Tensor, dtype: torch.dtype) -> Work:
    def work() -> None:
        loss_of(model, pixels, dtype).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return work


def inference(model: nn.Module, pixels: Tensor, dtype: torch.dtype, mode: Callable[[], Any]) -> Work:
    def work() -> None:
        with mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model(pixels)

    return work


def measure(pairs: list[Pair], rounds: int) -> list[tuple[Pair, float, float]]:
    """Return each pair with its median CPU milliseconds, plain and ours.

    All ways take turns, so that a busy machine slows each alike; the first round warms up.
    """
    times: dict[tuple[str, bool], list[float]] = {}
    for number in range(rounds + 1):
        for pair in pairs:
            for is_ours, work in ((False, pair.plain), (True, pair.ours)):
                started = time.process_time()
                work()
                if number:
                    times.setdefault((pair.name, is_ours), []).append(1000 * (time.process_time() - started))
    medians = {key: statistics.median(values) for key, values in times.items()}
    return [(pair, medians[pair.name, False], medians[pair.name, True]) for pair in pairs]


def product_share(work: Work) -> float:
    """Return the share of CPU time spent in matrix products and attention."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        work()
    events = profiled.key_averages()
    products = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot_product_flash_attention")
    inside = sum(event.self_cpu_time_total for event in events if event.key.startswith(products))
    return inside / sum(event.self_cpu_time_total for event in events)


def off(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest expected value."""
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def differences(model: nn.Module, plain: nn.Module, run: Callable[[nn.Module], Tensor]) -> tuple[float, float]:
    """Return the largest differences of outputs and of gradients in float32, relative to the largest plain value."""
    expected = run(plain)
    expected.square().sum().backward()
    got = run(model)
    got.square().sum().backward()
    theirs = {name: p.grad for name, p in plain.named_parameters()}
    pairs = [(p.grad, theirs[name]) for name, p in trainable_parameters(model).items()]
    worst = max(off(mine, other) for mine, other in pairs if mine is not None and other is not None)
    if any((mine is None) != (other is None) for mine, other in pairs):
        worst = float("inf")
    output = off(got.detach(), expected.detach())
    for module in (model, plain):
        module.zero_grad(set_to_none=True)
    return output, worst


def adapter_pairs(kernel: tuple[int, int, int]) -> tuple[list[Pair], tuple[float, float]]:
    """Return ViT-B/16's adapter on one clip as a pair, forward and backward, and the differences of results."""
    torch.manual_seed(0)
    shape, config, _ = MODELS["vit_b16"]
    plain = PlainAdapter(shape.width, config.bottleneck_width, kernel)
    ours = STAdapter(shape.width, config.bottleneck_width, kernel)
    ours.load_state_dict(plain.state_dict())
    x_MSD = torch.randn(FRAMES, 1 + shape.num_patches, shape.width, requires_grad=True)
    gradient = torch.randn_like(x_MSD)

    def work(adapter: nn.Module) -> Work:
        return lambda: torch.autograd.grad(adapter(x_MSD, FRAMES), [x_MSD, *adapter.parameters()], gradient)

    name = "x".join(map(str, kernel))
    pair = Pair(f"adapter {name}", work(plain), work(ours), KERNEL_TARGETS.get(kernel))
    return [pair], differences(ours, plain, lambda adapter: adapter(x_MSD, FRAMES))


def model_pairs(name: str, precision: str) -> tuple[list[Pair], tuple[float, float]]:
    model, plain, pixels = models(name)
    found = differences(model, plain, lambda module: module(pixels))
    dtype = PRECISIONS[precision]
    if precision != "float32":
        cast_frozen(model, dtype)  # as a training does
    trained = trainable_parameters(plain).values()
    step = (
        training_step(plain, torch.optim.AdamW(trained, lr=1e-4), pixels, dtype),
        training_step(model, make_optimizer(model, recipes.ssv2_clip_b16.optim), pixels, dtype),
    )
    infer = (inference(plain, pixels, dtype, torch.no_grad), inference(model, pixels, dtype, torch.inference_mode))
    targets = TARGETS[precision] if name == "vit_b16" else {}
    pairs = [Pair("training step", *step, targets.get("training step"))]
    pairs.append(Pair("inference", *infer, targets.get("inference")))
    return pairs, found


def saved_bytes(model: nn.Module, run: Callable[[], Tensor]) -> int:
    """Return the bytes that a graph saves for the backward pass, without parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()  # noqa: F841  # keeps the graph alive, so that no address is used twice
    return sum(kept.values())


def memory_of(way: str, name: str, precision: str) -> tuple[float, float]:
    """Return the MiB saved by a forward pass, and the MiB by which a training step raises resident memory."""
    model, plain, pixels = models(name)
    dtype = PRECISIONS[precision]
    model.recompute = way == "recompute"
    if precision != "float32":
        cast_frozen(model, dtype)
    module: nn.Module = plain if way == "plain" else model
    optimizer = (
        torch.optim.AdamW(trainable_parameters(plain).values())
        if way == "plain"
        else make_optimizer(model, recipes.ssv2_clip_b16.optim)
    )
    loss_of(module, pixels[:, :1], dtype).backward()  # let libraries allocate what they keep
    module.zero_grad(set_to_none=True)
    hardware.reset_peak_memory(CPU)
    before = hardware.peak_memory_mib(CPU)
    training_step(module, optimizer, pixels, dtype)()
    after = hardware.peak_memory_mib(CPU)
    peak = float("nan") if before is None or after is None else after - before
    return saved_bytes(module, lambda: loss_of(module, pixels, dtype)) / 2**20, peak


def print_memory(name: str) -> bool:
    missed = False
    print(f"{'':34}{'saved MiB':>10}{'peak MiB':>10}{'x plain':>9}{'limit':>9}")
    for precision in ("float32", "bfloat16"):
        reference = float("nan")
        for way in ("plain", "ours", "recompute"):
            command = [sys.executable, "-m", "benchmarks.step", "memory", "--model", name]
            command += ["--way", way, "--precision", precision]  # separate processes: freed memory may stay resident
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            saved, peak = map(float, output.split())
            reference = saved if way == "plain" else reference
            limit = SAVED_LIMITS.get(way) if (name, precision) == ("vit_b16", "float32") else None
            missed = missed or (limit is not None and saved / reference > limit)
            shown = "" if limit is None else f"<= {limit:g}"
            print(f"{precision + ', ' + way:34}{saved:10.1f}{peak:10.1f}{saved / reference:9.3f}{shown:>9}")
    return missed


def print_times(groups: list[tuple[list[Pair], tuple[float, float]]], rounds: int) -> bool:
    missed = False
    print(f"{'':34}{'plain ms':>10}{'ours ms':>10}{'x plain':>9}{'target':>9}{'products':>10}")
    for pair, plain_ms, ours_ms in measure([pair for pairs, _ in groups for pair in pairs], rounds):
        ratio = plain_ms / ours_ms
        missed = missed or (pair.target is not None and ratio < pair.target)
        target = "" if pair.target is None else f">= {pair.target:g}"
        share = product_share(pair.plain)
        print(f"{pair.name:34}{plain_ms:10.1f}{ours_ms:10.1f}{ratio:9.2f}{target:>9}{share:10.0%}", flush=True)
    output, gradient = (max(values) for values in zip(*(found for _, found in groups), strict=True))
    print(
        f"\nfloat32 outputs differ by {output:.1e} of the largest (limit {OUTPUT_LIMIT:.0e}), "
        f"gradients by {gradient:.1e} (limit {GRADIENT_LIMIT:.0e})"
    )
    return missed or not (output <= OUTPUT_LIMIT and gradient <= GRADIENT_LIMIT)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=["adapter", "float32", "bfloat16", "memory"])
    parser.add_argument("--model", choices=list(MODELS), default="vit_b16", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--way", choices=["plain", "ours", "recompute"], help=argparse.SUPPRESS)
    parser.add_argument("--precision", default="float32", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.way:
        print(*memory_of(options.way, options.model, options.precision))
        return 0
    print(
        f"{datetime.date.today()}, {hardware.cpu_name()}, one thread, load {os.getloadavg()[0]:.1f}, "
        f"torch {torch.__version__}, {options.model}, {FRAMES} frames, median of {options.rounds}"
    )
    if options.what == "memory":
        missed = print_memory(options.model)
    elif options.what == "adapter":
        missed = print_times([adapter_pairs(kernel) for kernel in KERNELS], options.rounds)
    else:
        missed = print_times([model_pairs(options.model, options.what)], options.rounds)
    if missed:
        print("a target is missed")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
