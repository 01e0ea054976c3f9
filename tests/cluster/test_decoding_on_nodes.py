"""Decoding on other nodes of a Ray cluster."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from safetensors.torch import load_file
from videos import write_grey

from stadapter.cluster import ray_runtime
from stadapter.cluster.decoding import decode_on_cluster
from stadapter.config import ConfigError, DataConfig, Recipe
from stadapter.data.clips import ClipDataset, test_loader, train_loader
from stadapter.data.lists.formats import ClipList
from stadapter.data.video.decoding import ClipError
from stadapter.training.loop import train
from stadapter.training.options import TrainOptions

COUNT, GLOBAL = 9, 4
CONFIG = DataConfig("folder", COUNT, num_frames=4, frame_size=32, horizontal_flip=True)


@pytest.fixture(scope="module")
def other_node() -> Iterator[str]:
    """Yield the id of the only node with CPUs. This process runs on another node, without CPUs."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=2)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield node.node_id
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> ClipList:
    """Return nine clips, of which the fourth is unreadable."""
    root = tmp_path_factory.mktemp("clips")
    paths = [f"{i}.mp4" for i in range(COUNT)]
    for i, path in enumerate(paths):
        write_grey(root / path, num_frames=6 + i % 5)
    (root / "3.mp4").write_bytes(b"")
    labels = list(range(COUNT))
    return ClipList("folder", "train", str(root), paths, labels, [False] * COUNT, tuple(map(str, labels)))


def assert_equal(here: list[dict[str, Any]], there: list[dict[str, Any]]) -> None:
    assert len(here) == len(there) > 0
    for one, other in zip(here, there, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if isinstance(value, torch.Tensor):
                assert (value.dtype, value.shape) == (other[name].dtype, other[name].shape)
                assert torch.equal(value, other[name])
            else:
                assert value == other[name]


def test_training_batches_are_the_loaders(clips: ClipList, other_node: str) -> None:
    dataset = ClipDataset(clips, CONFIG, seed=3, train=True)
    here, there = (
        list(train_loader(dataset, GLOBAL, steps=range(5), micro_batch=3, remote_loader=remote_loader))
        for remote_loader in (None, decode_on_cluster)
    )
    assert_equal(here, there)
    assert any(batch["bad"].any() for batch in there)


def test_testing_batches_are_the_loaders(clips: ClipList, other_node: str) -> None:
    config = dataclasses.replace(CONFIG, sampling="dense", frame_stride=1, test_temporal_views=2, resize="exact")
    dataset = ClipDataset(clips, config, seed=3, train=False)
    here, there = (
        list(test_loader(dataset, 2, remote_loader=remote_loader)) for remote_loader in (None, decode_on_cluster)
    )
    assert_equal(here, there)


def test_batches_are_made_on_the_other_node(clips: ClipList, other_node: str) -> None:
    class Telling(ClipDataset):
        def __getitem__(self, key: Any) -> dict[str, Any]:
            return {**super().__getitem__(key), "node": ray.get_runtime_context().get_node_id()}

    batches = decode_on_cluster(Telling(clips, CONFIG, 0, train=False), [[0, 1], [2]])
    assert [batch["node"] for batch in batches] == [[other_node] * 2, [other_node]]
    assert ray.get_runtime_context().get_node_id() != other_node


def test_an_error_arrives_with_its_own_type(clips: ClipList, other_node: str, tmp_path: Path) -> None:
    dataset = ClipDataset(dataclasses.replace(clips, root=str(tmp_path)), CONFIG, 0, train=True)
    with pytest.raises(ClipError, match=r"0.mp4: it and the 8 clips after it"):
        list(decode_on_cluster(dataset, [[(0, 0, 0)]]))


def test_an_empty_share_has_no_batches(clips: ClipList, other_node: str) -> None:
    dataset = ClipDataset(clips, CONFIG, 0, train=False)
    assert list(test_loader(dataset, 2, rank=COUNT, world_size=COUNT + 1, remote_loader=decode_on_cluster)) == []


def test_trials_leave_a_cpu_to_decode_on(other_node: str) -> None:
    assert ray_runtime.Cluster(ray_runtime.Resources()).trials_at_once() == 2
    assert ray_runtime.Cluster(ray_runtime.Resources(decode_on_cluster=True)).trials_at_once() == 1


def test_a_trial_that_leaves_no_cpu_is_a_config_error(other_node: str) -> None:
    cluster = ray_runtime.Cluster(ray_runtime.Resources(cpus_per_process=2, decode_on_cluster=True))
    with pytest.raises(ConfigError, match=r"--decode-on-cluster: a trial takes 2 of the 2 CPUs"):
        cluster._check_capacity()


def test_a_training_gives_the_same_numbers(
    tiny_recipe: Recipe, clip_folder: Path, tmp_path: Path, other_node: str
) -> None:
    here = train(tiny_recipe, tmp_path / "here", TrainOptions(clip_folder))
    there = train(tiny_recipe, tmp_path / "there", TrainOptions(clip_folder, remote_loader=decode_on_cluster))
    assert here.metrics == there.metrics
    trained = [load_file(tmp_path / place / "trained.safetensors") for place in ("here", "there")]
    assert trained[0].keys() == trained[1].keys()
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())
