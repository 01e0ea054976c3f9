"""Multi-view testing: softmax over classes, mean over a clip's views, every clip counted once whatever the world size.

Shapes: B clips, V views, T frames, K classes; with a verb and a noun head, K1 and K2 of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from stadapter.model.classifier import VideoClassifier


@torch.inference_mode()
def evaluate(
    model: VideoClassifier,
    batches: Iterable[dict[str, Any]],
    device: torch.device,
    autocast_dtype: torch.dtype,
    *,
    opposite_pairs: bool = False,
    label_groups: tuple[int, int] | None = None,
    distributed: bool = False,
    logits_of: Callable[[dict[str, Any]], Tensor] | None = None,
) -> dict[str, float]:
    """Accuracies in per cent over all clips of all processes, and the mean cross-entropy (`loss`).

    `batches` are this process's share: pixels [B, V, T, 3, H, W], label int64 [B], bad bool [B]. A bad clip could not
    be decoded: it counts as wrong and is reported in `bad_clips`. With `opposite_pairs`, classes 2p and 2p + 1 are each
    other's time reversal, and `direction_top1` is the share of clips whose own class beats its reversal. With
    `label_groups`, labels are (verb, noun), int64 [B, 2]: `top1` and `top5` are of the action, which is right when both
    are, `verb_top1` and `noun_top1` of each alone, and `loss` is the sum of both.

    `logits_of` gives the logits [B, V, K] of a batch that has no pixels, or not for all of its clips.
    """
    was_training = model.training
    model.eval()
    names = ["clips", "bad_clips", "top1", "top5", "loss"]
    names += ["direction_top1"] if opposite_pairs else []
    names += ["verb_top1", "noun_top1"] if label_groups else []
    # Sums over clips: whole numbers below 2^53 stay exact in float64.
    totals = torch.zeros(len(names), dtype=torch.float64, device=device)
    for batch in batches:
        label = batch["label"].to(device, non_blocking=True)
        good = ~batch["bad"].to(device, non_blocking=True)
        B = len(label)
        with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype != torch.float32):
            if logits_of is None:
                pixels = batch["pixels"].to(device, non_blocking=True)
                logits_BVK = model(pixels.flatten(0, 1)).float().unflatten(0, (B, -1))
            else:
                logits_BVK = logits_of(batch).float()
        if label_groups is None:
            counts = _count_classes(logits_BVK, label, opposite_pairs)
        else:
            counts = _count_actions(logits_BVK, label, label_groups)
        counts = {name: torch.where(good, value, 0) for name, value in counts.items()}
        counts |= {"clips": torch.ones(B, device=device), "bad_clips": ~good}
        totals += torch.stack([counts[name].sum().double() for name in names])
    if distributed:
        dist.all_reduce(totals)
    model.train(was_training)
    found = dict(zip(names, totals.tolist(), strict=True))
    clips, bad = found.pop("clips"), found.pop("bad_clips")
    result = {name: 100 * total / clips for name, total in found.items()}
    result["loss"] = found["loss"] / max(1.0, clips - bad)
    if bad:
        result["bad_clips"] = bad
    return result


def mean_probability(logits_BVK: Tensor) -> Tensor:
    """Logits [B, V, K] -> probabilities [B, K]: softmax over classes, mean over views."""
    return F.softmax(logits_BVK, dim=-1).mean(dim=1)


def _rank(score_BK: Tensor, own_B1: Tensor) -> Tensor:
    """How many classes beat the true one, [B]; ties count against it, so that a constant output earns nothing, and so
    do comparisons with NaN, so that a model whose weights are broken does not either."""
    return (~(score_BK < own_B1)).sum(dim=1) - 1


def _loss(own_B1: Tensor) -> Tensor:
    return -own_B1.squeeze(1).clamp_min(1e-12).log()


def _count_classes(logits_BVK: Tensor, label_B: Tensor, opposite_pairs: bool) -> dict[str, Tensor]:
    """{metric: value of each clip, [B]}"""
    prob_BK = mean_probability(logits_BVK)
    own_B1 = prob_BK.gather(1, label_B[:, None])
    rank_B = _rank(prob_BK, own_B1)
    counts = {"top1": rank_B < 1, "top5": rank_B < 5, "loss": _loss(own_B1)}
    if opposite_pairs:
        counts["direction_top1"] = (own_B1 > prob_BK.gather(1, (label_B ^ 1)[:, None])).squeeze(1)
    return counts


def _count_actions(logits_BVK: Tensor, label_B2: Tensor, groups: tuple[int, int]) -> dict[str, Tensor]:
    """{metric: value of each clip, [B]}; an action's probability is its verb's times its noun's."""
    verb_BK, noun_BK = (mean_probability(part) for part in logits_BVK.split(groups, dim=-1))
    own_verb_B1, own_noun_B1 = verb_BK.gather(1, label_B2[:, :1]), noun_BK.gather(1, label_B2[:, 1:])
    verb, noun = _rank(verb_BK, own_verb_B1) < 1, _rank(noun_BK, own_noun_B1) < 1
    action_BK = (verb_BK[:, :, None] * noun_BK[:, None, :]).flatten(1)
    return {
        "top1": verb & noun,
        "top5": _rank(action_BK, own_verb_B1 * own_noun_B1) < 5,
        "verb_top1": verb,
        "noun_top1": noun,
        "loss": _loss(own_verb_B1) + _loss(own_noun_B1),
    }
