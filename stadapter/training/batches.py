"""From lists of clips to the batches of a training and of a test, read as the options say.

Shapes: B clips in a pass, V views, T frames, S pixels a side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from stadapter.config import DataConfig, Recipe
from stadapter.data.bad_clips import BadClips
from stadapter.data.cache.frames import open_cache
from stadapter.data.cache.tokens import Rows
from stadapter.data.clips import ClipDataset, test_loader, train_loader
from stadapter.data.lists.formats import ClipList
from stadapter.data.lists.storage import default_local_copies
from stadapter.data.reader import Reading
from stadapter.training.options import TrainOptions
from stadapter.training.process_group import ProcessGroup


def make_dataset(
    clips: ClipList, data: DataConfig, seed: int, train_options: TrainOptions, *, train: bool, rows: Rows | None = None
) -> ClipDataset:
    """Return the clips as pixels, or as tokens where `rows` has them."""
    # All of the embedded data set fits in memory, and the next trial in this process finds it there.
    in_memory = data.dataset.startswith("embedded_") and train_options.num_workers == 0
    reading = Reading(
        decoder=train_options.decoder,
        time_limit_s=train_options.clip_time_limit_s,
        in_memory=in_memory,
        local_copies=default_local_copies(train_options.local_copies_gb),
        cache=open_cache(clips.root, train_options.cache_gb, train_options.decoder, data.decoded_short_side),
    )
    return ClipDataset(clips, data, seed, train=train, reading=reading, rows=rows)


def train_steps(
    clips: ClipList,
    bad_clips: BadClips,
    recipe: Recipe,
    train_options: TrainOptions,
    group: ProcessGroup,
    steps: range,
    rows: Rows | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Yield this process's share of the global batch of each step, as the list of passes that fit its memory.

    Raises BadClipsError, at the step of that clip, if too many clips cannot be read.
    """
    share = recipe.optim.global_batch // group.world_size
    clips_per_pass = min(train_options.clips_per_pass or share, share)
    batches = bad_clips.watch(
        train_loader(
            make_dataset(clips, recipe.data, recipe.seed, train_options, train=True, rows=rows),
            recipe.optim.global_batch,
            steps=steps,
            rank=group.rank,
            world_size=group.world_size,
            micro_batch=clips_per_pass,
            num_workers=train_options.num_workers,
            pin_memory=group.device.type == "cuda",
            remote_loader=train_options.remote_loader,
        )
    )
    passes = math.ceil(share / clips_per_pass)
    for _ in steps:
        yield [next(batches) for _ in range(passes)]


def test_batches(
    clips: ClipList,
    recipe: Recipe,
    train_options: TrainOptions,
    group: ProcessGroup,
    clips_per_pass: int,
    rows: Rows | None = None,
) -> Iterable[dict[str, Any]]:
    """Return this process's share of the clips, each once, with the recipe's test views: pixels [B, V, T, 3, S, S]."""
    return test_loader(
        make_dataset(clips, recipe.data, recipe.seed, train_options, train=False, rows=rows),
        clips_per_pass,
        rank=group.rank,
        world_size=group.world_size,
        num_workers=train_options.num_workers,
        pin_memory=group.device.type == "cuda",
        remote_loader=train_options.remote_loader,
    )


test_batches.__test__ = False  # type: ignore[attr-defined]  # pytest would collect the name
