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

from stadapter.config import Recipe
from stadapter.data.bad_clips import BadClips
from stadapter.data.lists.formats import ClipList
from stadapter.model.classifier import VideoClassifier
from stadapter.training.batches import test_batches
from stadapter.training.hardware import PRECISIONS, autocast
from stadapter.training.options import TrainOptions
from stadapter.training.process_group import ProcessGroup
from stadapter.training.token_cache import TokenCache, kept_splits
from stadapter.trials.record import Unreadable

Batches = Iterable[dict[str, Any]]


def evaluate_clips(
    model: VideoClassifier,
    recipe: Recipe,
    clips: ClipList,
    train_options: TrainOptions,
    group: ProcessGroup,
    clips_per_pass: int,
    *,
    token_cache: TokenCache | None = None,
    watch: Callable[[Batches], Batches] = iter,
) -> tuple[dict[str, float], Unreadable]:
    """Test a model on a list of clips, with the recipe's test views and precision.

    Called by every process of the `group`, and equal in all. `watch` is handed the batches and yields them: it may
    show progress, or raise to stop. With a token cache, a list whose tokens are kept is read from it. Returns the
    metrics of `evaluate` and the clips that could not be read. Raises BadClipsError if these are too many.
    """
    bad_clips = BadClips(clips.split, len(clips), train_options.max_bad_share)
    rows = logits_of = None
    if token_cache is not None and clips.split in kept_splits(recipe.data):
        rows, cache = token_cache.open_rows(clips), token_cache

        def logits_of(batch: dict[str, Any]) -> Tensor:
            return model(cache.tokens(batch, clips.split), start=cache.blocks).unsqueeze(1)

    batches = test_batches(clips, recipe, train_options, group, clips_per_pass, rows)
    metrics = evaluate(
        model,
        watch(bad_clips.watch(batches)),
        group.device,
        PRECISIONS[recipe.optim.precision],
        opposite_pairs=any(clips.reversed),
        label_groups=recipe.data.label_groups,
        distributed=group.world_size > 1,
        logits_of=logits_of,
    )
    if group.world_size > 1:
        bad_clips.gather()
    return metrics, bad_clips.summary()


@torch.inference_mode()
def evaluate(
    model: VideoClassifier,
    batches: Batches,
    device: torch.device,
    autocast_dtype: torch.dtype,
    *,
    opposite_pairs: bool = False,
    label_groups: tuple[int, int] | None = None,
    distributed: bool = False,
    logits_of: Callable[[dict[str, Any]], Tensor] | None = None,
) -> dict[str, float]:
    """Return accuracies in per cent over all clips of all processes, and the mean cross-entropy (`loss`).

    `batches` are this process's share: pixels [B, V, T, 3, H, W], label int64 [B], bad bool [B]. A bad clip could not
    be decoded: it counts as wrong and is reported in `bad_clips`.

    - With `opposite_pairs`, classes 2p and 2p + 1 are each other's time reversal, and `direction_top1` is the share of
      clips whose true class beats its reversal.
    - With `label_groups`, labels are (verb, noun), int64 [B, 2]. `verb_top1` and `noun_top1` are of each alone, `top1`
      and `top5` of the action, which is right if both are, and `loss` is the sum of both.
    - `logits_of` returns the logits [B, V, K] of a batch that lacks pixels for some clips.
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
        with autocast(device, autocast_dtype):
            logits_BVK = logits_of(batch).float() if logits_of else logits_of_views(model, batch["pixels"], device)
        if label_groups is None:
            counts = _count_classes(logits_BVK, label, opposite_pairs)
        else:
            counts = _count_actions(logits_BVK, label, label_groups)
        counts = {name: torch.where(good, value, 0) for name, value in counts.items()}
        counts |= {"clips": torch.ones(len(label), device=device), "bad_clips": ~good}
        totals += torch.stack([counts[name].sum().double() for name in names])
    if distributed:
        dist.all_reduce(totals)
    model.train(was_training)
    return _means(dict(zip(names, totals.tolist(), strict=True)))


def logits_of_views(model: VideoClassifier, pixels_BVTCHW: Tensor, device: torch.device) -> Tensor:
    """Return the logits of each view of each clip, float32 [B, V, K]."""
    B, V = pixels_BVTCHW.shape[:2]
    pixels = pixels_BVTCHW.to(device, non_blocking=True)
    logits: Tensor = model(pixels.flatten(0, 1)).float()
    return logits.unflatten(0, (B, V))


def mean_probability(logits_BVK: Tensor) -> Tensor:
    """Return probabilities [B, K] from logits [B, V, K]: softmax over classes, mean over views."""
    return F.softmax(logits_BVK, dim=-1).mean(dim=1)


def _means(totals: dict[str, float]) -> dict[str, float]:
    """Return accuracies in per cent of all clips, and the mean loss of those that could be read."""
    clips, bad = totals.pop("clips"), totals.pop("bad_clips")
    result = {name: 100 * total / clips for name, total in totals.items()}
    result["loss"] = totals["loss"] / max(1.0, clips - bad)
    if bad:
        result["bad_clips"] = bad
    return result


def _rank(score_BK: Tensor, true_B1: Tensor) -> Tensor:
    """Return how many classes beat the true one, [B].

    Ties and comparisons with NaN count against the true class, so a constant output earns nothing, and neither does a
    model whose weights are broken.
    """
    return (~(score_BK < true_B1)).sum(dim=1) - 1


def _loss(true_B1: Tensor) -> Tensor:
    return -true_B1.squeeze(1).clamp_min(1e-12).log()


def _count_classes(logits_BVK: Tensor, label_B: Tensor, opposite_pairs: bool) -> dict[str, Tensor]:
    """Return each metric's value for each clip, [B]."""
    prob_BK = mean_probability(logits_BVK)
    true_B1 = prob_BK.gather(1, label_B[:, None])
    rank_B = _rank(prob_BK, true_B1)
    counts = {"top1": rank_B < 1, "top5": rank_B < 5, "loss": _loss(true_B1)}
    if opposite_pairs:
        counts["direction_top1"] = (true_B1 > prob_BK.gather(1, (label_B ^ 1)[:, None])).squeeze(1)
    return counts


def _count_actions(logits_BVK: Tensor, label_B2: Tensor, groups: tuple[int, int]) -> dict[str, Tensor]:
    """Return each metric's value for each clip, [B]. An action's probability is its verb's times its noun's."""
    verb_BK, noun_BK = (mean_probability(part) for part in logits_BVK.split(groups, dim=-1))
    true_verb_B1, true_noun_B1 = verb_BK.gather(1, label_B2[:, :1]), noun_BK.gather(1, label_B2[:, 1:])
    verb, noun = _rank(verb_BK, true_verb_B1) < 1, _rank(noun_BK, true_noun_B1) < 1
    action_BK = (verb_BK[:, :, None] * noun_BK[:, None, :]).flatten(1)
    return {
        "top1": verb & noun,
        "top5": _rank(action_BK, true_verb_B1 * true_noun_B1) < 5,
        "verb_top1": verb,
        "noun_top1": noun,
        "loss": _loss(true_verb_B1) + _loss(true_noun_B1),
    }
