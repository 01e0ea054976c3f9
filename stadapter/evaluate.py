"""Multi-view testing: softmax over classes, mean over a clip's views, every clip counted once whatever the world size.

Shapes: B clips, V views, T frames, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from stadapter.model import VideoClassifier


@torch.inference_mode()
def evaluate(
    model: VideoClassifier,
    batches: Iterable[dict[str, Tensor]],
    device: torch.device,
    autocast_dtype: torch.dtype,
    *,
    opposite_pairs: bool = False,
    distributed: bool = False,
) -> dict[str, float]:
    """Accuracies in per cent over all clips of all processes, and the mean cross-entropy (`loss`).

    `batches` are this process's share: pixels uint8 [B, V, T, 3, H, W], label int64 [B], bad bool [B]. A bad clip could
    not be decoded: it counts as wrong and is reported in `bad_clips`. With `opposite_pairs`, classes 2p and 2p + 1 are
    each other's time reversal, and `direction_top1` is the share of clips whose own class beats its reversal.
    """
    was_training = model.training
    model.eval()
    # clips, top-1, top-5, direction, sum of losses, bad: whole numbers below 2^53 stay exact in float64
    totals = torch.zeros(6, dtype=torch.float64, device=device)
    for batch in batches:
        pixels = batch["pixels"].to(device, non_blocking=True)
        label = batch["label"].to(device, non_blocking=True)
        good = ~batch["bad"].to(device, non_blocking=True)
        B, V = pixels.shape[:2]
        with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype != torch.float32):
            logits = model(pixels.flatten(0, 1))
        prob_BK = F.softmax(logits.float(), dim=-1).view(B, V, -1).mean(dim=1)
        own_B1 = prob_BK.gather(1, label[:, None])
        # The rank of the true class; ties count against it, so that a constant output earns nothing.
        beaten_by_B = (prob_BK >= own_B1).sum(dim=1) - 1
        direction = torch.zeros_like(good)
        if opposite_pairs:
            direction = (own_B1 > prob_BK.gather(1, (label ^ 1)[:, None])).squeeze(1) & good
        loss = torch.where(good, -own_B1.squeeze(1).clamp_min(1e-12).log(), 0.0).sum()
        totals += torch.stack(
            [
                torch.tensor(B, device=device),
                ((beaten_by_B < 1) & good).sum(),
                ((beaten_by_B < 5) & good).sum(),
                direction.sum(),
                loss,
                (~good).sum(),
            ]
        ).double()
    if distributed:
        dist.all_reduce(totals)
    model.train(was_training)
    clips, top1, top5, directed, loss_sum, bad = totals.tolist()
    result = {"top1": 100 * top1 / clips, "top5": 100 * top5 / clips, "loss": loss_sum / max(1.0, clips - bad)}
    if opposite_pairs:
        result["direction_top1"] = 100 * directed / clips
    if bad:
        result["bad_clips"] = bad
    return result
