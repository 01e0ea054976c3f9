"""Training steps of depth arms from cached tokens (`--cache-prefix`), against the same arms without, and a plain model.

    python -m benchmarks.token_cache

ViT-B/16 at 8 frames, one clip, float32: adapters before the attention of the last blocks. Both ways take turns in one
process with one thread; times are medians of its CPU seconds. With the cache a step begins with reading the clip's row
(checked, from a file that is in memory); without it, with pixels that are decoded already. Each way trains a model of
its own from the same weights: losses of all steps, and the weights at the end, are compared. "Of arithmetic" is the
ratio of the operations that PyTorch counts in a step: what equally fast ones would give. The plain model
(model_reference.py) computes every block in every step, with PyTorch's default matrix products; the targets are ratios
to it. The exit code is 1 if a target is missed or a result differs.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import reference_decoding
from benchmarks.reference_model import PlainClassifier
from stadapter import config, recipes
from stadapter.config import Recipe
from stadapter.data.clips import ClipDataset, train_loader
from stadapter.data.lists.clip_list import ClipList
from stadapter.model.build import build_model
from stadapter.model.classifier import VideoClassifier
from stadapter.model.state import trainable_parameters
from stadapter.training import hardware
from stadapter.training.optim import make_optimizer
from stadapter.training.token_cache import TokenCache, open_token_cache

CPU = torch.device("cpu")
TARGETS = {1: 15.0, 2: None, 3: 4.0, 6: None}  # last k blocks -> least ratio
LIMIT = 1e-5  # of losses, relative, and of weights, of the largest
RATE = 1e-3
RECIPE = config.replace(
    recipes.ssv2_clip_b16,
    **{
        "backbone.weights": "seed:0",
        "adapter.placement": "before_mhsa",
        "data.fixed_frames": True,
        "data.random_resized_crop": None,
        "data.rand_augment": None,
        "optim.global_batch": 1,
        "optim.precision": "float32",
    },
)


@dataclass
class Way:
    """One model in training: from cached tokens where there is a `prefix`, else from pixels."""

    model: VideoClassifier | PlainClassifier
    optimizer: torch.optim.Optimizer
    dataset: ClipDataset
    prefix: TokenCache | None
    pixels: Tensor
    label: Tensor
    seconds: list[float] = field(default_factory=list)
    reading_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    flops: int = 0  # of a step

    def step(self) -> None:
        started = time.process_time()
        if self.prefix is None:
            logits = self.model(self.pixels)
        else:
            tokens = self.prefix.tokens(_batch(self.dataset), "train")
            self.reading_s.append(time.process_time() - started)
            logits = self.model(tokens, start=self.prefix.blocks)
        loss = F.cross_entropy(logits, self.label)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.seconds.append(time.process_time() - started)
        self.losses.append(float(loss.detach()))


def _batch(dataset: ClipDataset) -> dict[str, Any]:
    return next(iter(train_loader(dataset, 1, steps=range(1))))


def make_ways(recipe: Recipe, clips: ClipList) -> tuple[Way, Way, Way]:
    """Plain, without the cache, and with it, which holds the clip already."""
    ways: list[Way] = []
    first = build_model(recipe)
    for is_cached in (False, True):
        model = build_model(recipe) if is_cached else first
        generator = torch.Generator().manual_seed(0)
        for module in model.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.normal_(module.weight, std=0.3, generator=generator)  # no adapter the identity
        model.vit = first.vit  # frozen: one is enough
        optimizer = make_optimizer(model, recipe.optim)
        for group in optimizer.param_groups:
            group["lr"] = RATE
        prefix = open_token_cache(model, recipe, 1, "auto", CPU) if is_cached else None
        dataset = ClipDataset(clips, recipe.data, 0, train=True, rows=prefix.open_rows(clips) if prefix else None)
        batch = _batch(dataset)
        if prefix:
            prefix.tokens(batch, "train")
            assert _batch(dataset)["cached"].all()
        ways.append(Way(model, optimizer, dataset, prefix, batch["pixels"], batch["label"]))
    simple = PlainClassifier(first, recipe.adapter.bottleneck_width, recipe.adapter.kernel_size)
    adam = torch.optim.AdamW(trainable_parameters(simple).values(), lr=RATE)
    return Way(simple, adam, ways[0].dataset, None, ways[0].pixels, ways[0].label), ways[0], ways[1]


def differences(without: Way, cached: Way) -> tuple[float, float]:
    """Of losses, relative, and of weights, in units of each tensor's largest value."""
    loss = max(abs(a - b) / abs(a) for a, b in zip(without.losses, cached.losses, strict=True))
    theirs = {name: p.detach() for name, p in trainable_parameters(without.model).items()}
    weight = max(
        float((p.detach() - theirs[name]).abs().max() / theirs[name].abs().max().clamp_min(1e-30))
        for name, p in trainable_parameters(cached.model).items()
    )
    return loss, weight


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="after one to warm up (default: %(default)s)"
    )
    parser.add_argument("--last", type=int, nargs="+", default=list(TARGETS), metavar="K", help="(default: 1 2 3 6)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(
        f"{datetime.date.today()}, {hardware.cpu_name()}, one thread, load {os.getloadavg()[0]:.1f}, "
        f"torch {torch.__version__}, ViT-B/16, 8 frames, float32, median of {options.rounds}"
    )
    with tempfile.TemporaryDirectory() as folder:
        os.environ["STADAPTER_CACHE"] = folder
        clip = reference_decoding.write_clip(Path(folder) / "clip.mp4", 0, seconds=2)
        clips = ClipList("list", "train", folder, [clip.name], [0], [False], ("a",))
        arms = {
            last: make_ways(config.replace(RECIPE, **{"adapter.blocks": tuple(range(12 - last, 12))}), clips)
            for last in options.last
        }
        for number in range(options.rounds + 1):
            for ways in arms.values():
                for way in ways:
                    with FlopCounterMode(display=False) if number == 0 else contextlib.nullcontext() as counter:
                        way.step()
                    if counter is not None:
                        way.flops = counter.get_total_flops()
    missed = False
    print(
        f"{'adapters in':14}{'plain ms':>10}{'without ms':>12}{'cached ms':>11}{'of it reading':>15}{'x plain':>9}"
        f"{'target':>8}{'x without':>11}{'of arithmetic':>15}"
    )
    for last, (simple, without, cached) in arms.items():
        plain_ms, without_ms, ours_ms, reading_ms = (
            1000 * statistics.median(values[1:])
            for values in (simple.seconds, without.seconds, cached.seconds, cached.reading_s)
        )
        target, ratio = TARGETS.get(last), plain_ms / ours_ms
        loss, weight = differences(without, cached)
        missed = missed or (target is not None and ratio < target) or not max(loss, weight) <= LIMIT
        shown = "" if target is None else f">= {target:g}"
        print(
            f"{f'the last {last}':14}{plain_ms:10.1f}{without_ms:12.1f}{ours_ms:11.1f}{reading_ms:15.1f}"
            f"{ratio:9.2f}{shown:>8}{without_ms / ours_ms:11.2f}{without.flops / cached.flops:15.2f}"
            f"   losses differ by {loss:.1e}, weights by {weight:.1e}"
        )
    print(f"losses and weights may differ by {LIMIT:.0e}")
    if missed:
        print("a target is missed")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
