"""Training steps of depth arms with the token cache (`--cache-prefix`), without it, and of a plain model.

    python -m benchmarks.token_cache

ViT-B/16 at 8 frames, one clip, float32: adapters before the attention of the last blocks. All ways take turns in one
process with one thread; times are medians of its CPU seconds. With the cache a step starts by reading and checking the
clip's row, from a file in memory; without it, from decoded pixels. Both train a model from the same weights: the losses
of all steps and the final weights are compared. "Of arithmetic" is the ratio of the operations that PyTorch counts in a
step, which is the speed-up if all operations were equally fast. The plain model (reference_model.py) computes every
block in every step; the targets are ratios to it. The exit code is 1 if a target is missed or a result differs.
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
TARGETS = {1: 15.0, 2: None, 3: 4.0, 6: None}  # least ratio, by the number of last blocks with adapters
LIMIT = 1e-5  # of losses, relative; of weights, in units of the tensor's largest
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
    """A model in training, from cached tokens if it has a token cache, else from pixels."""

    model: VideoClassifier | PlainClassifier
    optimizer: torch.optim.Optimizer
    dataset: ClipDataset
    token_cache: TokenCache | None
    pixels: Tensor
    label: Tensor
    seconds: list[float] = field(default_factory=list)
    reading_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    flops: int = 0  # of a step

    def step(self) -> None:
        started = time.process_time()
        if self.token_cache is None:
            logits = self.model(self.pixels)
        else:
            tokens = self.token_cache.tokens(_batch(self.dataset), "train")
            self.reading_s.append(time.process_time() - started)
            logits = self.model(tokens, start=self.token_cache.blocks)
        loss = F.cross_entropy(logits, self.label)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.seconds.append(time.process_time() - started)
        self.losses.append(float(loss.detach()))


def _batch(dataset: ClipDataset) -> dict[str, Any]:
    return next(iter(train_loader(dataset, 1, steps=range(1))))


def make_ways(recipe: Recipe, clips: ClipList) -> tuple[Way, Way, Way]:
    """Return three ways: plain, without the token cache, and with it. The cache already holds the clip."""
    first = build_model(recipe)
    without, cached = _way(recipe, clips, first, first), _way(recipe, clips, build_model(recipe), first, cached=True)
    simple = PlainClassifier(first, recipe.adapter.bottleneck_width, recipe.adapter.kernel_size)
    adam = torch.optim.AdamW(trainable_parameters(simple).values(), lr=RATE)
    return Way(simple, adam, without.dataset, None, without.pixels, without.label), without, cached


def _way(
    recipe: Recipe, clips: ClipList, model: VideoClassifier, first: VideoClassifier, *, cached: bool = False
) -> Way:
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.normal_(module.weight, std=0.3, generator=generator)  # so that no adapter is the identity
    model.vit = first.vit  # frozen, so that all can share one
    optimizer = make_optimizer(model, recipe.optim)
    for group in optimizer.param_groups:
        group["lr"] = RATE
    token_cache = open_token_cache(model, recipe, 1, "auto", CPU) if cached else None
    rows = token_cache.open_rows(clips) if token_cache else None
    dataset = ClipDataset(clips, recipe.data, 0, train=True, rows=rows)
    batch = _batch(dataset)
    if token_cache:
        token_cache.tokens(batch, "train")
        assert _batch(dataset)["cached"].all()
    return Way(model, optimizer, dataset, token_cache, batch["pixels"], batch["label"])


def take_turns(arms: dict[int, tuple[Way, Way, Way]], rounds: int) -> None:
    """Let each way take a step in turn: once to warm up and count operations, then `rounds` times."""
    for number in range(rounds + 1):
        for way in (way for ways in arms.values() for way in ways):
            with FlopCounterMode(display=False) if number == 0 else contextlib.nullcontext() as counter:
                way.step()
            if counter is not None:
                way.flops = counter.get_total_flops()


@dataclass(frozen=True)
class Compared:
    """The median milliseconds of a step in the three ways of one depth, and the differences of their results."""

    last: int  # blocks with adapters
    plain_ms: float
    without_ms: float
    cached_ms: float
    reading_ms: float
    of_arithmetic: float
    loss_difference: float  # relative
    weight_difference: float  # in units of each tensor's largest value

    @property
    def is_missed(self) -> bool:
        target = TARGETS.get(self.last)
        is_slow = target is not None and self.plain_ms / self.cached_ms < target
        return is_slow or not max(self.loss_difference, self.weight_difference) <= LIMIT

    def __str__(self) -> str:
        target = TARGETS.get(self.last)
        shown = "" if target is None else f">= {target:g}"
        return (
            f"{f'the last {self.last}':14}{self.plain_ms:10.1f}{self.without_ms:12.1f}{self.cached_ms:11.1f}"
            f"{self.reading_ms:15.1f}{self.plain_ms / self.cached_ms:9.2f}{shown:>8}"
            f"{self.without_ms / self.cached_ms:11.2f}{self.of_arithmetic:15.2f}"
            f"   losses differ by {self.loss_difference:.1e}, weights by {self.weight_difference:.1e}"
        )


def compare(last: int, simple: Way, without: Way, cached: Way) -> Compared:
    """Return the medians and differences of all steps after the warm-up."""
    columns = (simple.seconds, without.seconds, cached.seconds, cached.reading_s)
    plain_ms, without_ms, cached_ms, reading_ms = (1000 * statistics.median(values[1:]) for values in columns)
    theirs = {name: p.detach() for name, p in trainable_parameters(without.model).items()}
    return Compared(
        last,
        plain_ms,
        without_ms,
        cached_ms,
        reading_ms,
        of_arithmetic=without.flops / cached.flops,
        loss_difference=max(abs(a - b) / abs(a) for a, b in zip(without.losses, cached.losses, strict=True)),
        weight_difference=max(
            float((p.detach() - theirs[name]).abs().max() / theirs[name].abs().max().clamp_min(1e-30))
            for name, p in trainable_parameters(cached.model).items()
        ),
    )


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
        take_turns(arms, options.rounds)
    rows = [compare(last, *ways) for last, ways in arms.items()]
    print(
        f"{'adapters in':14}{'plain ms':>10}{'without ms':>12}{'cached ms':>11}{'of it reading':>15}{'x plain':>9}"
        f"{'target':>8}{'x without':>11}{'of arithmetic':>15}"
    )
    print("\n".join(map(str, rows)))
    print(f"losses and weights may differ by {LIMIT:.0e}")
    is_missed = any(row.is_missed for row in rows)
    if is_missed:
        print("a target is missed")
    return int(is_missed)


if __name__ == "__main__":
    sys.exit(main())
