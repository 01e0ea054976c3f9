"""Decoding on other machines of the Ray cluster, through Ray Data.

For machines whose CPUs cannot feed their GPUs. The data set, its keys and their order are those of the dataloaders in
`data.clips`; only the place where an item is made changes, so the pixels are identical. Each task makes one batch and
takes one CPU of any node that has one free; the data must lie where all nodes see it.
"""

from __future__ import annotations

import functools
import itertools
import logging
import pickle
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from stadapter.cluster.ray_environment import ray

# isort: split
# After ray_environment, which sets what Ray reads while it is imported.
from ray.data import DataContext, from_items

from stadapter.data.clips import ClipDataset, collate

_BATCHES_PER_RUN = 1000  # Ray Data takes all keys of a run at its start
_HELD_BATCHES = 4  # fetched but not yet used, besides those in Ray's object store

logging.getLogger("ray.data").setLevel(logging.ERROR)


def decode_on_cluster(dataset: ClipDataset, batches: Iterable[Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Yield the batches that a dataloader would make of these lists of keys, in their order. Ray must be up.

    Raises an error of the data set here, with its type.
    """
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    token, reference = uuid.uuid4().hex, ray.put(dataset)

    def make(rows: Any) -> Any:  # {"keys": [1]} -> {"batch": [1]}, both of bytes
        made = [_make_batch(token, reference, keys) for keys in rows["keys"]]
        return {"batch": np.array(made, dtype=object)}

    remaining = iter(batches)
    while run := list(itertools.islice(remaining, _BATCHES_PER_RUN)):
        keys = [{"keys": pickle.dumps(list(batch))} for batch in run]
        # Ray Data spreads its tasks over all nodes, although a trial that calls it is bound to its own resources.
        made = from_items(keys, override_num_blocks=len(keys)).map_batches(make, batch_size=1, num_cpus=1)
        for rows in made.iter_batches(batch_size=1, prefetch_batches=_HELD_BATCHES, batch_format="numpy"):
            batch = pickle.loads(rows["batch"][0])
            if isinstance(batch, Exception):
                raise batch
            yield {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in batch.items()}


def _make_batch(token: str, reference: Any, keys: bytes) -> bytes:
    """Return a batch, or the exception that it raised, pickled: Ray would run a task that fails again and again."""
    try:
        dataset = _dataset(token, reference)
        batch = collate([dataset[key] for key in pickle.loads(keys)])
    except Exception as error:
        return pickle.dumps(error)
    arrays = {name: v.numpy() if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
    return pickle.dumps(arrays, protocol=5)


@functools.lru_cache(maxsize=3)
def _dataset(token: str, reference: Any) -> ClipDataset:
    """Return the data set of this token, fetched once by every worker process."""
    return ray.get(reference)
