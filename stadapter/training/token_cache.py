"""The token cache: what leaves a model's frozen lower blocks, computed once per clip and kept on this node's disk.

Below the first trained or adapted block, tokens depend on the clip's pixels and the frozen weights alone. A clip that
has the same pixels in every epoch (`check_pixels`) has the same tokens: later epochs, other seeds and other arms of the
same depth read them, and neither decode the clip nor compute those blocks. The tokens of a clip are computed from it
alone, never in a batch with others, so no bit of a training depends on which of them were there when it began.

One file holds the rows of one list of clips, for one set of frozen blocks:

    header   magic, number of rows, T, S, D, name of the type
    marks    uint64 per clip: 0 while its row is missing, else 2^32 + the CRC-32 of its file's identity and its bytes
    rows     tokens [clips, T, S, D]

A mark is written after its row, and checked against the row and the clip's file when they are read. A row that is cut
short, damaged, or of a file that has changed is computed again. Two processes that write a row write the same bytes.

Shapes: B clips, T frames, S = 1 + N tokens (CLS alone where nothing else is read), D width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stadapter.config import RESULTS_VERSION, ConfigError, DataConfig, Recipe
from stadapter.data.cache.frames import decode_settings
from stadapter.data.cache.quota import GB, Quota
from stadapter.data.cache.tokens import FLAG, MAGIC, Rows
from stadapter.data.lists.bounded_folder import cache_folder
from stadapter.data.lists.clip_list import ClipList
from stadapter.model.build import meta_model
from stadapter.model.classifier import VideoClassifier
from stadapter.trials.record import TokensUsed
from stadapter.version import __version__

# Fields of `data` that change a clip's pixels from epoch to epoch, and the value at which they do not.
FIXED: dict[str, Any] = {
    "fixed_frames": True,
    "short_side_jitter": None,
    "random_resized_crop": None,
    "horizontal_flip": False,
    "rand_augment": None,
    "random_erasing": 0.0,
    "repeated_augmentation": 1,
}
# Fields that decide the pixels of a clip then. The others decide which clips there are, and how logits are counted.
PIXELS = ("num_frames", "frame_size", "sampling", "frame_stride", "decoded_short_side", "resize")


def check_pixels(recipe: Recipe) -> None:
    """Raise ConfigError unless a clip has the same pixels in every epoch, and its blocks are the package's own."""
    random = {name: value for name, value in FIXED.items() if getattr(recipe.data, name) != value}
    if random:
        name = next(iter(random))
        sets = " ".join(f"--set data.{field}={str(value).lower()}" for field, value in random.items())
        raise ConfigError(
            f"{FLAG}: data.{name} = {getattr(recipe.data, name)} changes a clip's pixels from epoch to epoch, so no "
            f"tokens can be kept; leave the flag out, or train without that ({sets}), which is another training"
        )
    if recipe.own.model:
        raise ConfigError(
            f"{FLAG}: own.model = {recipe.own.model}: what a model of your own computes below its trained blocks is "
            "not known; leave the flag out"
        )


def kept_splits(data: DataConfig) -> tuple[str, ...]:
    """Return the splits whose tokens are kept: not the test if it has several views, since it happens only once."""
    one_view = data.test_temporal_views * data.test_spatial_views == 1
    return ("train", "val", "test") if one_view else ("train", "val")


@dataclass
class TokenCache:
    """The rows of each list of clips, and the model whose lowest `blocks` blocks fill them."""

    model: VideoClassifier
    blocks: int
    shape: tuple[int, int, int]  # (T, S, D) of a clip's tokens
    key: dict[str, Any]  # everything besides the clips that tokens depend on
    limit_bytes: int
    device: torch.device
    rows: dict[str, Rows] = field(default_factory=dict)  # by split
    found: dict[str, int] = field(default_factory=dict)  # rows that were there at the start, by split

    def open_rows(self, clips: ClipList) -> Rows:
        """Return the rows of this list, which are opened once."""
        if clips.split not in self.rows:
            is_train = clips.split == "train"  # other lists may name the same clips: they share their rows
            text = json.dumps([self.key, clips.root, clips.fingerprint(), is_train], sort_keys=True)
            folder = cache_folder("prefix") / hashlib.sha256(text.encode()).hexdigest()[:16]
            rows = Rows(Quota(folder, self.limit_bytes, FLAG), len(clips), self.shape)
            self.rows[clips.split], self.found[clips.split] = rows, rows.count()
        return self.rows[clips.split]

    def tokens(self, batch: dict[str, Any], split: str) -> Tensor:
        """Return the tokens of a batch, [B, T, S, D]: those that were read, and those that are computed and kept now.

        The batch is of `ClipDataset`'s items with the split's rows.
        """
        is_kept = batch["cached"].tolist()
        if all(is_kept):
            kept: Tensor = batch["tokens"]
            return kept.to(self.device, non_blocking=True)
        fresh = []
        for place, pixels in enumerate(batch["pixels"].to(self.device, non_blocking=True)):
            # [T, 3, H, W], or a test's single view [1, T, 3, H, W]
            tokens = self.model.tokens_before(self.blocks, pixels.view(1, *pixels.shape[-4:]))[0]
            if (stamp := int(batch["stamp"][place])) >= 0:
                self.rows[split].write(int(batch["row"][place]), stamp, tokens)
            fresh.append(tokens)
        remaining, known = iter(fresh), iter(batch.get("tokens", ()))
        return torch.stack([next(known).to(self.device) if kept else next(remaining) for kept in is_kept])

    def summary(self) -> TokensUsed:
        """Return the rows at the start of this launch and now. A record holds them, since its times depend on them."""
        return TokensUsed(self.blocks, {split: rows.count() for split, rows in self.rows.items()}, dict(self.found))


def open_token_cache(
    model: VideoClassifier, recipe: Recipe, gigabytes: float, decoder: str, device: torch.device
) -> TokenCache | None:
    """Return the token cache of a training, or None without the flag or without frozen lower blocks.

    Raises ConfigError if the recipe's tokens cannot be kept (`check_pixels`).
    """
    if not gigabytes:
        return None
    check_pixels(recipe)
    if not (blocks := model.frozen_blocks()):
        return None
    key = {
        "format": MAGIC.hex(),
        "versions": [RESULTS_VERSION, torch.__version__, __version__],
        "weights": _digest(model, blocks),
        "blocks": blocks,
        "shape": repr(model.vit.shape),
        "tokens": tokens_shape(model, recipe),
        "data": {name: getattr(recipe.data, name) for name in PIXELS},
        "reading": decode_settings(decoder, recipe.data.decoded_short_side),
        "computed": [recipe.optim.precision, device.type],
    }
    return TokenCache(model, blocks, tokens_shape(model, recipe), key, int(gigabytes * GB), device)


def tokens_shape(model: VideoClassifier, recipe: Recipe) -> tuple[int, int, int]:
    """Return (T, S, D) of a clip's tokens behind the model's frozen blocks."""
    shape = model.vit.shape
    cls_only = model.frozen_blocks() == shape.depth and model.reads_cls_only()
    return recipe.data.num_frames, 1 if cls_only else 1 + shape.num_patches, shape.width


def describe(recipes: Sequence[Recipe], gigabytes: float, clips: int | None = None) -> list[str]:
    """Return lines for the user: where tokens are kept, the bytes per clip of each depth, and if they fit the limit.

    With the number of `clips` to keep, also the disk that they need.
    """
    found = dict(_bytes_per_clip(recipe) for recipe in recipes)
    lines = [f"token cache: {cache_folder('prefix')}, at most {gigabytes:g} GB per node"]
    for (blocks, depth), row_bytes in sorted(found.items()):
        if not blocks:
            lines.append("  trained from the first block on: nothing to keep, computed as without the flag")
            continue
        need = "" if clips is None else f", {clips * row_bytes / GB:.2g} GB for {clips:,} clips"
        lines.append(f"  the lowest {blocks} of {depth} blocks are frozen: {row_bytes / 1e6:.2g} MB per clip{need}")
    need_bytes = (clips or 0) * sum(size for (blocks, _), size in found.items() if blocks)
    if need_bytes > gigabytes * GB:
        share = gigabytes * GB / need_bytes
        lines.append(f"  room for {100 * share:.0f} % of that: the other clips are computed each time")
    return lines


def _bytes_per_clip(recipe: Recipe) -> tuple[tuple[int, int], int]:
    """Return (frozen blocks, all blocks) of the recipe's model, and the bytes of a clip's tokens in float32."""
    model = meta_model(recipe)
    T, S, D = tokens_shape(model, recipe)
    return (model.frozen_blocks(), model.vit.shape.depth), 4 * T * S * D


def _digest(model: VideoClassifier, blocks: int) -> str:
    """Return the SHA-256 of all tensors that the tokens behind the lowest blocks are computed with."""
    vit, digest = model.vit, hashlib.sha256()
    above = ("norm.", *(f"blocks.{index}." for index in range(blocks, len(vit.blocks))))
    tensors = [(name, t) for name, t in [*vit.named_parameters(), *vit.named_buffers()] if not name.startswith(above)]
    for name, tensor in [*sorted(tensors), ("mean", model.mean_311), ("std", model.std_311)]:
        digest.update(f"{name} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().float().contiguous().cpu().numpy().data)
    return digest.hexdigest()
