"""The arithmetic of training: loss, learning rate, optimiser, dropout. Pure functions of the recipe and the step.

Shapes: B clips in a pass, G clips in a global batch, D width, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter

import torch
import torch.nn.functional as F
from torch import Tensor

from stadapter.config import OptimConfig, derive_seed
from stadapter.model.classifier import VideoClassifier
from stadapter.model.state import trainable_parameters


def summed_loss(logits_BK: Tensor, label_B: Tensor, groups: tuple[int, int] | None, smoothing: float) -> Tensor:
    """Return the cross-entropy summed over clips, [].

    With `groups`, labels are [B, 2], each group of classes has a loss, and these are added.
    """
    if groups is None:
        return F.cross_entropy(logits_BK, label_B, label_smoothing=smoothing, reduction="sum")
    heads = zip(logits_BK.split(groups, dim=1), label_B.unbind(1), strict=True)
    return torch.stack([summed_loss(logits, label, None, smoothing) for logits, label in heads]).sum()


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float) -> float:
    """Return the rate of 0-based `step`: linear from peak / warmup_steps to peak, then half a cosine down to 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: VideoClassifier, optim: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over the trained parameters, without decay on biases and norms.

    Each group's rate is the schedule's times its `lr_factor`: `optim.backbone_lr_factor` for the backbone.
    """
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, p in trainable_parameters(model).items():
        lr_factor = optim.backbone_lr_factor if name.startswith("vit.") else 1.0
        groups.setdefault((lr_factor, optim.weight_decay if p.ndim > 1 else 0.0), []).append(p)
    return torch.optim.AdamW(
        [
            {"params": params, "lr": optim.peak_lr * lr_factor, "lr_factor": lr_factor, "weight_decay": weight_decay}
            for (lr_factor, weight_decay), params in sorted(groups.items(), key=itemgetter(0), reverse=True)
        ],
        betas=optim.betas,
        fused=True,
    )


def diverged(train_losses: Sequence[float], *num_classes: int) -> bool:
    """Return True if the last epoch's mean loss is above 0.98 ln K, that is, no better than guessing, or is NaN.

    `num_classes` is one K per head, whose losses are summed. The accuracy of such a training says nothing about its
    arm. A rate that is too high is the usual cause; a task that cannot be learned by construction (two classes that
    only time tells apart, and no temporal kernel) looks the same.
    """
    return not train_losses[-1] < 0.98 * sum(map(math.log, num_classes))


def dropout_mask(seed: int, step: int, global_batch: int, width: int, p: float) -> Tensor:
    """Return the factors of the head's input in one step: float32 [G, D] of 0 and 1 / (1 - p).

    They are drawn for the whole global batch, so a clip has the same mask in whichever process computes it.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "dropout", step))
    keep_GD = torch.rand(global_batch, width, generator=generator) >= p
    return keep_GD / (1 - p)
