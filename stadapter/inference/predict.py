"""What a trained model sees in videos: probabilities of its classes, by the recipe's own test views.

Shapes: B clips in a pass, V views, K classes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from stadapter.config import ConfigError, DataConfig, Recipe
from stadapter.data.clips import test_loader
from stadapter.data.lists.formats import VIDEO_SUFFIXES, ClipList
from stadapter.inference.trained import CLIPS_PER_PASS, put_on
from stadapter.model.classifier import VideoClassifier
from stadapter.training.evaluate import mean_probability
from stadapter.training.options import TrainOptions
from stadapter.training.runtime import PRECISIONS, make_dataset


def find_videos(places: Sequence[str | Path]) -> list[str]:
    """The files named, and all videos in the folders named, at any depth, in order. ConfigError where there is none."""
    found: list[str] = []
    for place in places:
        if not os.path.isdir(place):
            found.append(os.fspath(place))
            continue
        inside = sorted(
            os.path.join(folder, name)
            for folder, _, names in os.walk(place)
            for name in names
            if name.lower().endswith(VIDEO_SUFFIXES)
        )
        if not inside:
            raise ConfigError(
                f"{place}: there is no video in this folder (a file ending in {', '.join(VIDEO_SUFFIXES)})"
            )
        found += inside
    return found


@torch.inference_mode()
def predict(
    model: VideoClassifier,
    recipe: Recipe,
    videos: Sequence[str],
    train_options: TrainOptions | None = None,
    device: torch.device | None = None,
) -> Iterator[tuple[str, Tensor | str]]:
    """Each video in turn, with the probabilities of its classes, float32 [K], or why it cannot be read. In the
    recipe's precision on a GPU, in float32 on a CPU.

    With a verb and a noun head, the probabilities of the verbs come first, then those of the nouns.
    """
    train_options, device, data = train_options or TrainOptions(), device or torch.device("cpu"), recipe.data
    clips = ClipList(data.dataset, "test", "", list(videos), [0] * len(videos), [False] * len(videos), ())
    batches = test_loader(
        make_dataset(clips, data, recipe.seed, train_options, train=False),
        train_options.clips_per_pass or CLIPS_PER_PASS,
        num_workers=train_options.num_workers,
    )
    # On a CPU half precision takes ten times as long, and no record asks for its digits here.
    precision = recipe.optim.precision if device.type == "cuda" else "float32"
    dtype = PRECISIONS[precision]
    put_on(model, precision, device).eval()
    for batch in batches:
        pixels = batch["pixels"].to(device, non_blocking=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits_BVK = model(pixels.flatten(0, 1)).float().unflatten(0, pixels.shape[:2])
        parts = logits_BVK.split(data.label_groups or (data.num_classes,), dim=-1)
        prob_BK = torch.cat([mean_probability(part) for part in parts], dim=-1).cpu()
        reasons = {bad.index: bad.reason for bad in batch["bad_clips"]}
        for index, prob_K in zip(batch["index"].tolist(), prob_BK, strict=True):
            yield videos[index], reasons.get(index, prob_K)


def top_classes(
    prob_K: Tensor, data: DataConfig, class_names: Sequence[str], count: int
) -> list[list[tuple[str, float]]]:
    """The `count` most probable classes and their probabilities, of each head by itself. A class is called by its
    number where there are no names."""
    if len(class_names) != data.num_classes:
        kinds = ("class",) if data.label_groups is None else ("verb", "noun")
        groups = zip(kinds, data.label_groups or (data.num_classes,), strict=True)
        class_names = [f"{kind} {number}" for kind, size in groups for number in range(size)]
    tops, first = [], 0
    for part in prob_K.split(data.label_groups or (data.num_classes,)):
        best = part.topk(min(count, len(part)))
        tops.append(
            [(class_names[first + i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
        )
        first += len(part)
    return tops
