"""The pretraining of the embedded backbone: `python -m tools.pretrain_embedded`, about 13 minutes of one core.

A small ViT learns which digits a still picture shows (CLS, multi-label) and which digit covers each patch. The dense
loss matters: it makes each patch token encode its own content, which adapters compare between frames. The model never
sees two frames of a clip, nor a handwritten digit of the video splits.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stadapter.backbone.vit import EMBEDDED_SHAPE, ViT, seed_weights
from stadapter.data.lists import embedded_rendering

MEAN, STD = 0.5, 0.5  # of pixels in [0, 1], every channel
BATCH, PEAK_LR, WARMUP_SHARE = 128, 2.5e-3, 0.05
CLS_WEIGHT, PATCH_WEIGHT = 10.0, 2.0
HELD_OUT_IMAGES = 2000

Stills = tuple[Tensor, Tensor, Tensor]  # uint8 [M, 3, H, W], digits present [M, 10], patch labels [M, 25]


class StillModel(nn.Module):
    """The backbone with its two pretraining heads; only the backbone is kept."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.vit = ViT(EMBEDDED_SHAPE)
        seed_weights(self.vit, seed)
        self.cls_head = nn.Linear(EMBEDDED_SHAPE.width, len(embedded_rendering.DIGIT_CLASSES))
        self.patch_head = nn.Linear(EMBEDDED_SHAPE.width, len(embedded_rendering.DIGIT_CLASSES) + 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return digit logits [M, 10] and patch logits [M, 25, 11] of images, uint8 [M, 3, H, W]."""
        tokens = self.vit((images.float() / 255 - MEAN) / STD)
        return self.cls_head(tokens[:, 0]).float(), self.patch_head(tokens[:, 1:]).float()


def render_stills(count: int, seed: int, split: str) -> Stills:
    images = np.empty((count, embedded_rendering.FRAME_SIZE, embedded_rendering.FRAME_SIZE, 3), np.uint8)
    present = np.empty((count, 10), np.float32)
    patches = np.empty((count, EMBEDDED_SHAPE.num_patches), np.int64)
    for index, still in enumerate(embedded_rendering.still_images(count, seed, split)):
        images[index], present[index], patches[index] = still
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.from_numpy(present), torch.from_numpy(patches)


def learning_rate(step: int, steps: int) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine to zero."""
    warmup = WARMUP_SHARE * steps
    if step < warmup:
        return PEAK_LR * (step + 1) / warmup
    return PEAK_LR * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@torch.no_grad()
def evaluate(model: StillModel, stills: Stills) -> dict[str, float]:
    """Return the shares of images with exactly the right digits, of right patches, and of right patches on digits."""
    cls_logits, patch_logits = zip(*(model(images) for images in stills[0].split(BATCH)), strict=True)
    right = torch.cat(patch_logits).argmax(-1) == stills[2]
    return {
        "digits_exact": ((torch.cat(cls_logits) > 0) == (stills[1] > 0)).all(1).float().mean().item(),
        "patch_accuracy": right.float().mean().item(),
        "digit_patch_accuracy": right[stills[2] != embedded_rendering.BACKGROUND].float().mean().item(),
    }


def has_fast_bfloat16() -> bool:
    """Return True if the CPU multiplies bfloat16 matrices natively; elsewhere it is slower than float32."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def pretrain(images: int, epochs: int, seed: int) -> Iterator[tuple[ViT, dict[str, float]]]:
    """Yield after every epoch the backbone with the epoch's losses and its accuracies on unseen digits."""
    start = time.perf_counter()
    print(f"rendering {images:,} still images ...", flush=True)
    stills, held_out = render_stills(images, seed, "pretraining"), render_stills(HELD_OUT_IMAGES, seed, "val")
    print(f"rendered in {time.perf_counter() - start:.0f} s; training {epochs} epochs", flush=True)

    torch.manual_seed(seed)
    model = StillModel(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    bfloat16 = has_fast_bfloat16()
    steps_per_epoch = images // BATCH
    for epoch in range(epochs):
        losses = torch.zeros(2)
        for batch, picked in enumerate(torch.randperm(images)[: steps_per_epoch * BATCH].split(BATCH)):
            pixels, present, patches = (part[picked] for part in stills)
            # Plain attention: on a CPU the backward pass of the fused bfloat16 kernel is several times slower.
            attention = sdpa_kernel(SDPBackend.MATH) if bfloat16 else contextlib.nullcontext()
            pixels = pixels[:, torch.randperm(3)]  # a random order of colour channels: six times the pictures for free
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16), attention:
                cls_logits, patch_logits = model(pixels)
            cls_loss = F.binary_cross_entropy_with_logits(cls_logits, present)
            patch_loss = F.cross_entropy(patch_logits.flatten(0, 1), patches.flatten())
            optimizer.zero_grad()
            (CLS_WEIGHT * cls_loss + PATCH_WEIGHT * patch_loss).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(epoch * steps_per_epoch + batch, epochs * steps_per_epoch)
            optimizer.step()
            losses += torch.stack([cls_loss.detach(), patch_loss.detach()])
        cls_mean, patch_mean = (losses / steps_per_epoch).tolist()
        summary = {"cls_loss": cls_mean, "patch_loss": patch_mean, **evaluate(model, held_out)}
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in summary.items())
        print(f"epoch {epoch + 1:>2}/{epochs}  {numbers}  {time.perf_counter() - start:.0f} s", flush=True)
        yield model.vit, summary


def save(vit: ViT, output: Path, **facts: object) -> None:
    """Write the weights in half precision, with `facts` as JSON in the metadata."""
    output.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().half().contiguous() for name, tensor in vit.state_dict().items()}
    partial = output.with_suffix(".partial")  # renamed when complete, so that a reader never finds half a file
    save_file(state, partial, metadata={name: json.dumps(value) for name, value in facts.items()})
    partial.replace(output)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.pretrain_embedded", description=__doc__)
    default = Path(__file__).parents[1] / "stadapter" / "backbone" / "embedded_vit.safetensors"
    parser.add_argument("--output", type=Path, default=default, help="file to write (default: %(default)s)")
    parser.add_argument("--images", type=int, default=60_000, help="still images (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=12, help="passes over them (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of pictures, weights and order (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.images < BATCH or args.epochs < 1:
        parser.error(f"needs at least {BATCH} images and 1 epoch")
    for epoch, (vit, summary) in enumerate(pretrain(args.images, args.epochs, args.seed), start=1):
        save(
            vit,
            args.output,
            shape=vars(EMBEDDED_SHAPE),
            normalisation={"mean": MEAN, "std": STD},
            pretraining={"images": args.images, "epochs": args.epochs, "finished": epoch, "seed": args.seed},
            world_version=embedded_rendering.WORLD_VERSION,
            results={name: round(value, 4) for name, value in summary.items()},
        )
    print(f"wrote {args.output} ({args.output.stat().st_size / 1e6:.2f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
