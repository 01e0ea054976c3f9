"""Predictions of a trained model for videos: probabilities of its classes, with the recipe's test views.

Shapes: B clips in a pass, V views, K classes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from stadapter.config import ConfigError, DataConfig, Recipe
from stadapter.data.lists.formats import VIDEO_SUFFIXES, ClipList
from stadapter.inference.trained import CLIPS_PER_PASS, put_on
from stadapter.model.classifier import VideoClassifier
from stadapter.training.batches import test_batches
from stadapter.training.evaluate import logits_of_views, mean_probability
from stadapter.training.hardware import PRECISIONS, autocast
from stadapter.training.options import TrainOptions
from stadapter.training.process_group import ProcessGroup


def find_videos(places: Sequence[str | Path]) -> list[str]:
    """Return the named files, and the videos in the named folders at any depth, in order.

    Raises ConfigError if a folder has no video.
    """
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
    """Yield each video with the probabilities of its classes, float32 [K], or with the reason it cannot be read.

    With a verb and a noun head, the probabilities of the verbs come first, then those of the nouns. Computed in the
    recipe's precision on a GPU, in float32 on a CPU.
    """
    train_options, device, data = train_options or TrainOptions(), device or torch.device("cpu"), recipe.data
    clips = ClipList(data.dataset, "test", "", list(videos), [0] * len(videos), [False] * len(videos), ())
    clips_per_pass = train_options.clips_per_pass or CLIPS_PER_PASS
    batches = test_batches(clips, recipe, train_options, ProcessGroup(device=device), clips_per_pass)
    # On a CPU half precision takes ten times as long, and no record asks for its digits here.
    precision = recipe.optim.precision if device.type == "cuda" else "float32"
    put_on(model, precision, device).eval()
    for batch in batches:
        with autocast(device, PRECISIONS[precision]):
            logits_BVK = logits_of_views(model, batch["pixels"], device)
        parts = logits_BVK.split(data.label_groups or (data.num_classes,), dim=-1)
        prob_BK = torch.cat([mean_probability(part) for part in parts], dim=-1).cpu()
        reasons = {bad.index: bad.reason for bad in batch["bad_clips"]}
        for index, prob_K in zip(batch["index"].tolist(), prob_BK, strict=True):
            yield videos[index], reasons.get(index, prob_K)


def top_classes(
    prob_K: Tensor, data: DataConfig, class_names: Sequence[str], count: int
) -> list[list[tuple[str, float]]]:
    """Return each head's `count` most probable classes with their probabilities.

    A class is called by its number if there are no names.
    """
    sizes = data.label_groups or (data.num_classes,)
    if len(class_names) != data.num_classes:
        kinds = ("class",) if data.label_groups is None else ("verb", "noun")
        class_names = [f"{kind} {number}" for kind, size in zip(kinds, sizes, strict=True) for number in range(size)]
    tops, first = [], 0
    for part in prob_K.split(sizes):
        best = part.topk(min(count, len(part)))
        names = [class_names[first + index] for index in best.indices.tolist()]
        tops.append(list(zip(names, best.values.tolist(), strict=True)))
        first += len(part)
    return tops
