"""Clips as batches of pixels: a data set whose items are pure functions of (seed, epoch, index), and its loaders.

The same global batch comes out whatever the number of processes, loader workers or passes it is split into. Loader
workers are started by a fork server, never forked from the training process, since neither a decoder nor CUDA survives
a fork with threads. A script that uses workers therefore guards its start by `if __name__ == "__main__":`.

Shapes: B clips in a micro-batch, G clips in a global batch, V views, T frames, S = frame_size.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from stadapter.config import ConfigError, DataConfig
from stadapter.data.bad_clips import BadClip
from stadapter.data.cache.tokens import Rows
from stadapter.data.lists import storage
from stadapter.data.lists.clip_list import ClipList
from stadapter.data.reader import Reading, Sampling, read_frames
from stadapter.data.sampling import dense_indices, uniform_indices
from stadapter.data.transforms import check_transforms, pixel_dtype, test_views, train_pixels
from stadapter.data.video.decoding import ClipError

TrainKey = tuple[int, int, int]  # showing (epoch * repeats + repeat), index of the clip, position in the global batch

# Random streams of one seed: the order of clips, and everything drawn for one clip.
_ORDER, _CLIP = 0, 1
_MAX_REPLACEMENTS = 10
_SOME_HAVE = ("pixels", "tokens", "row", "stamp")  # parts of an item that others of its batch may lack


class ClipDataset(Dataset[dict[str, Any]]):
    """The clips of a list as pixels.

    Training items, asked for by (showing, index) or (showing, index, position): pixels [T, 3, S, S].
    Testing items, asked for by index: pixels [V, T, 3, S, S]. Pixels are uint8, or float32 for `exact` resizing.
    Both: label int64 [] (or [2]: verb and noun), index int64 [], bad bool [], bad_clips tuple[BadClip, ...], and
    position int64 [] where it was given. A showing is an epoch, or with repeated augmentation one of its views of each
    clip.

    A clip that cannot be read is tried twice and then marked `bad`. In training the next readable clip stands in for
    it, with its own label; in testing its pixels are zeros, and it must be counted as wrong. `bad_clips` names each
    clip that could not be read on the way to this item.

    With `rows`, a clip whose row is kept has tokens [T, S, D] in place of pixels, and is not read. Of the others, `row`
    int64 [] is where the tokens of these pixels belong, with the `stamp` int64 [] that the file had before it was read,
    or -1 if they must not be kept.
    """

    def __init__(
        self,
        clips: ClipList,
        config: DataConfig,
        seed: int,
        train: bool,
        reading: Reading | None = None,
        rows: Rows | None = None,
    ) -> None:
        check_transforms(config)
        self.rows = rows
        self.config, self.seed, self.train = config, seed, train
        self.root, self.reading = clips.root, reading or Reading()
        # Tensors are handed to workers as shared memory, where lists of a million strings would be copied to each.
        encoded = [os.fsencode(path) for path in clips.paths]
        self._path_ends = torch.tensor([len(path) for path in encoded], dtype=torch.int64).cumsum(0)
        self._path_bytes = torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8)
        self._labels = torch.tensor(clips.labels, dtype=torch.int64)
        self._reversed = torch.tensor(clips.reversed, dtype=torch.bool)

    def __len__(self) -> int:
        return len(self._labels)

    def path(self, index: int) -> str:
        """Return the path or address of a clip."""
        start = int(self._path_ends[index - 1]) if index else 0
        encoded = self._path_bytes[start : int(self._path_ends[index])].numpy().tobytes()
        return storage.join(self.root, os.fsdecode(encoded))

    def __getitem__(self, key: int | tuple[int, int] | TrainKey) -> dict[str, Any]:
        if isinstance(key, tuple) != self.train:
            raise TypeError(f"key {key}: training items are asked for by (showing, index), testing items by index")
        if isinstance(key, tuple):
            showing, index = key[:2]
            item = self._train_item(showing, index)
            if len(key) == 3:
                item["position"] = torch.tensor(key[2])
            return item
        try:
            return self._item(key, self._shown(key, self._test_pixels, key), key, [])
        except ClipError as error:
            c = self.config
            shape = (c.test_temporal_views * c.test_spatial_views, c.num_frames, 3, c.frame_size, c.frame_size)
            shown = {"pixels": torch.zeros(shape, dtype=pixel_dtype(c))}
            if self.rows is not None:
                shown |= {"row": torch.tensor(key), "stamp": torch.tensor(-1)}
            return self._item(key, shown, key, [BadClip.of(key, error)])

    def _shown(self, index: int, read: Callable[..., Tensor], *key: int) -> dict[str, Tensor]:
        """Return a clip's pixels, or its tokens if they are kept. Raises ClipError if it cannot be read."""
        if self.rows is None:
            return {"pixels": _twice(read, *key)}
        stamp = self.rows.stamp(self.path(index))
        tokens = self.rows.read(index, stamp) if stamp >= 0 else None
        if tokens is not None:
            return {"tokens": tokens}
        return {"pixels": _twice(read, *key), "row": torch.tensor(index), "stamp": torch.tensor(stamp)}

    def _item(self, index: int, shown: dict[str, Tensor], source: int, bad_clips: list[BadClip]) -> dict[str, Any]:
        return {
            **shown,
            "label": self._labels[source].clone(),
            "index": torch.tensor(index),
            "bad": torch.tensor(bool(bad_clips)),
            "bad_clips": tuple(bad_clips),
        }

    def _train_item(self, showing: int, index: int) -> dict[str, Any]:
        """Return a clip, or the first readable one after it. Raises ClipError if there is none nearby."""
        bad_clips: list[BadClip] = []
        for offset in range(min(_MAX_REPLACEMENTS + 1, len(self))):
            source = (index + offset) % len(self)
            try:
                return self._item(index, self._shown(source, self._train_pixels, showing, source), source, bad_clips)
            except ClipError as error:
                bad_clips.append(BadClip.of(source, error))
                last = error
        raise ClipError(f"{self.path(index)}: it and the {offset} clips after it cannot be read; the last one: {last}")

    def _train_pixels(self, showing: int, index: int) -> Tensor:
        rng = np.random.default_rng((_CLIP, self.seed, showing, index))
        return train_pixels(self._frames(index, functools.partial(self._train_indices, rng=rng)), self.config, rng)

    def _test_pixels(self, index: int) -> Tensor:
        return test_views(self._frames(index, self._test_indices), self.config)

    def _frames(self, index: int, indices: Sampling) -> np.ndarray:
        frames = read_frames(self.path(index), indices, self.reading, self.config.decoded_short_side)
        if self._reversed[index]:
            # The same frames in opposite order, as if the reversed video were sampled at mirrored places.
            views = 1 if self.train else self.config.test_temporal_views
            frames = frames.reshape(views, -1, *frames.shape[1:])[:, ::-1].reshape(frames.shape)
        return frames

    def _train_indices(self, num_total: int, rng: np.random.Generator | None) -> list[int]:
        c = self.config
        if c.fixed_frames:  # those of a single test view, in the middle of the clip
            rng = None
        if c.sampling == "dense":
            return dense_indices(num_total, c.num_frames, c.frame_stride, rng)
        return uniform_indices(num_total, c.num_frames, rng)

    def _test_indices(self, num_total: int) -> list[int]:
        c = self.config
        if c.sampling == "uniform":
            return uniform_indices(num_total, c.num_frames)
        views = c.test_temporal_views
        return [
            i
            for view in range(views)
            for i in dense_indices(num_total, c.num_frames, c.frame_stride, view=view, num_views=views)
        ]


def _twice(read: Callable[..., Tensor], *key: int) -> Tensor:
    try:
        return read(*key)
    except ClipError:  # storage hiccups pass
        return read(*key)


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch of a `ClipDataset`'s items: tensors with a first dimension of B, and one list of all `bad_clips`.

    Of a data set with `rows`, also `cached` bool [B]: tokens are those of the items that have them, in their order, and
    pixels, row and stamp those of the others.
    """
    bad_clips = [bad for item in items for bad in item["bad_clips"]]
    apart = {"bad_clips", *_SOME_HAVE}
    batch = default_collate([{name: v for name, v in item.items() if name not in apart} for item in items])
    for name in _SOME_HAVE:
        if found := [item[name] for item in items if name in item]:
            batch[name] = default_collate(found)
    if any("tokens" in item or "row" in item for item in items):
        batch["cached"] = torch.tensor(["tokens" in item for item in items])
    return batch | {"bad_clips": bad_clips}


def steps_per_epoch(num_clips: int, global_batch: int, repeats: int = 1) -> int:
    """Return the number of complete global batches in an epoch, which shows each clip `repeats` times.

    Raises ConfigError if there is none.
    """
    if num_clips < global_batch // repeats:
        raise ConfigError(f"optim.global_batch = {global_batch}: the training list has only {num_clips} clips")
    return num_clips // (global_batch // repeats)


def epoch_order(num_clips: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order in which an epoch shows the clips: int64 [num_clips], a permutation."""
    return np.random.default_rng((_ORDER, seed, epoch)).permutation(num_clips)


# Makes batches in place of this machine's loader processes: (data set, lists of keys) -> batches in their order.
RemoteLoader = Callable[[ClipDataset, Iterable[Sequence[Any]]], Iterable[dict[str, Any]]]


class GlobalBatches(Sampler[list[TrainKey]]):
    """The keys that one process reads in a range of optimiser steps, a micro-batch at a time.

    Step s belongs to epoch s // steps_per_epoch and takes the next G clips of that epoch's order; an incomplete last
    batch is dropped. With repeated augmentation it takes the next G / repeats clips, each `repeats` times. Process
    `rank` takes a contiguous share of G / world clips, in chunks of at most `micro_batch`.
    """

    def __init__(
        self,
        num_clips: int,
        global_batch: int,
        *,
        steps: range,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batch: int | None = None,
        repeats: int = 1,
    ) -> None:
        if global_batch % world_size:
            raise ConfigError(f"optim.global_batch = {global_batch}: cannot be shared evenly by {world_size} processes")
        self.num_clips, self.global_batch, self.steps, self.seed = num_clips, global_batch, steps, seed
        self.repeats = repeats
        self.epoch_steps = steps_per_epoch(num_clips, global_batch, repeats)
        self.share = global_batch // world_size
        self.first = rank * self.share
        self.micro_batch = min(micro_batch or self.share, self.share)
        self.passes_per_step = -(-self.share // self.micro_batch)

    def __len__(self) -> int:
        return len(self.steps) * self.passes_per_step

    def __iter__(self) -> Iterator[list[TrainKey]]:
        order, order_epoch = np.empty(0, np.int64), -1
        for step in self.steps:
            epoch, step_in_epoch = divmod(step, self.epoch_steps)
            if epoch != order_epoch:
                order, order_epoch = epoch_order(self.num_clips, self.seed, epoch), epoch
            start = step_in_epoch * (self.global_batch // self.repeats)
            for offset in range(0, self.share, self.micro_batch):
                positions = range(self.first + offset, self.first + min(offset + self.micro_batch, self.share))
                yield [self._key(epoch, order, start, position) for position in positions]

    def _key(self, epoch: int, order: np.ndarray, start: int, position: int) -> TrainKey:
        clip, repeat = divmod(position, self.repeats)
        return epoch * self.repeats + repeat, int(order[start + clip]), position


def train_loader(
    dataset: ClipDataset,
    global_batch: int,
    *,
    steps: range,
    rank: int = 0,
    world_size: int = 1,
    micro_batch: int | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
    remote_loader: RemoteLoader | None = None,
) -> Iterable[dict[str, Any]]:
    """Return this process's micro-batches for the steps, in order.

    A batch holds pixels [B, T, 3, S, S], label, index and position (in the global batch) int64 [B], bad bool [B], and
    bad_clips, a list of those that could not be read.
    """
    batches = GlobalBatches(
        len(dataset),
        global_batch,
        steps=steps,
        seed=dataset.seed,
        rank=rank,
        world_size=world_size,
        micro_batch=micro_batch,
        repeats=dataset.config.repeated_augmentation,
    )
    if remote_loader is not None:
        return remote_loader(dataset, batches)
    return DataLoader(dataset, batch_sampler=batches, pin_memory=pin_memory, **_loading(num_workers))


def test_loader(
    dataset: ClipDataset,
    batch: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
    remote_loader: RemoteLoader | None = None,
) -> Iterable[dict[str, Any]]:
    """Return this process's share of the clips: every `world_size`-th one, none twice.

    A batch holds pixels [B, V, T, 3, S, S], label and index int64 [B], bad bool [B], and bad_clips, a list of those
    that could not be read. The last batch may be smaller, and a share may be empty.
    """
    share = range(rank, len(dataset), world_size)
    batches = [list(share[start : start + batch]) for start in range(0, len(share), batch)]
    if remote_loader is not None:
        return remote_loader(dataset, batches)
    return DataLoader(dataset, batch_sampler=batches, pin_memory=pin_memory, **_loading(num_workers))


test_loader.__test__ = False  # type: ignore[attr-defined]  # a name that pytest would collect


def _loading(num_workers: int) -> dict[str, Any]:
    # A loader without a generator draws a number from torch's global one: loading must not shift the model's random
    # numbers.
    loading = {"collate_fn": collate, "num_workers": num_workers, "generator": torch.Generator()}
    if num_workers == 0:
        return loading
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once, not by every worker
    return {**loading, "multiprocessing_context": context, "persistent_workers": True}
