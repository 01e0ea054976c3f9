"""The clips of a training and of a test: their order, their split over processes, and unreadable ones."""

from __future__ import annotations

import dataclasses
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory
from videos import write_grey

from stadapter.config import ConfigError, DataConfig
from stadapter.data import clips as clips_module
from stadapter.data import reader as reading_module
from stadapter.data.bad_clips import BadClip
from stadapter.data.clips import ClipDataset, GlobalBatches, epoch_order, steps_per_epoch, train_loader
from stadapter.data.lists.formats import ClipList
from stadapter.data.reader import Reading
from stadapter.data.video.decoding import ClipError

COUNT, GLOBAL, SEED = 11, 4, 5
STEP = 16  # of grey from one frame to the next
CONFIG = DataConfig("folder", COUNT, num_frames=4, frame_size=32, horizontal_flip=True)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> ClipList:
    """Write eleven readable clips, labelled with their index."""
    root = tmp_path_factory.mktemp("clips")
    paths = [f"{i}.mp4" for i in range(COUNT)]
    for i, path in enumerate(paths):
        write_grey(root / path, num_frames=6 + i % 5, step=STEP)
    return ClipList(
        "folder", "train", str(root), paths, list(range(COUNT)), [False] * COUNT, tuple(map(str, range(COUNT)))
    )


@pytest.fixture
def damaged(clips: ClipList, tmp_path: Path) -> ClipList:
    """Return the eleven clips with clips 3 and 4 unreadable."""
    for path in clips.paths:
        (tmp_path / path).write_bytes(b"" if path in ("3.mp4", "4.mp4") else (Path(clips.root) / path).read_bytes())
    return dataclasses.replace(clips, root=str(tmp_path))


def frame_numbers(pixels: Tensor) -> list[int]:
    return [round(frame.float().mean().item() / STEP) for frame in pixels.reshape(-1, 3, 32, 32)]


def collect(
    clips: ClipList, *, world_size: int = 1, micro_batch: int | None = None, num_workers: int = 0
) -> dict[int, Tensor]:
    """Return the pixels of steps 0 to 3 by step * G + position, gathered from all ranks."""
    gathered = {}
    for rank in range(world_size):
        loader = train_loader(
            ClipDataset(clips, CONFIG, SEED, train=True),
            GLOBAL,
            steps=range(4),
            rank=rank,
            world_size=world_size,
            micro_batch=micro_batch,
            num_workers=num_workers,
        )
        passes = len(loader) // 4
        for number, batch in enumerate(loader):
            for position, index, pixels in zip(batch["position"], batch["index"], batch["pixels"], strict=True):
                gathered[number // passes * GLOBAL + int(position)] = torch.cat([pixels.flatten(), index[None]])
    return gathered


def assert_equal_batches(first: dict[int, Tensor], second: dict[int, Tensor]) -> None:
    assert sorted(first) == sorted(second) == list(range(16))
    assert all(torch.equal(first[place], second[place]) for place in first)


def test_batches_are_the_same_with_2_loader_workers(clips: ClipList) -> None:
    assert_equal_batches(collect(clips), collect(clips, num_workers=2))


def test_batches_are_the_same_with_2_processes(clips: ClipList) -> None:
    assert_equal_batches(collect(clips), collect(clips, world_size=2))


def test_batches_are_the_same_in_micro_batches(clips: ClipList) -> None:
    assert_equal_batches(collect(clips), collect(clips, micro_batch=3))


def test_a_later_start_continues_the_same_batches(clips: ClipList) -> None:
    keys = [list(GlobalBatches(COUNT, GLOBAL, steps=steps, seed=SEED)) for steps in (range(6), range(3, 6))]
    assert keys[0][3:] == keys[1]


def test_loading_leaves_the_global_generator_alone(clips: ClipList) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    next(iter(train_loader(ClipDataset(clips, CONFIG, SEED, train=True), GLOBAL, steps=range(1))))
    assert torch.equal(torch.rand(1), expected)


def test_a_training_item_has_the_documented_shapes(clips: ClipList) -> None:
    item = ClipDataset(clips, CONFIG, SEED, train=True)[0, 2, 1]
    assert (item["pixels"].dtype, item["pixels"].shape) == (torch.uint8, (4, 3, 32, 32))
    assert [int(item[name]) for name in ("label", "index", "position", "bad")] == [2, 2, 1, 0]
    assert {item[name].dtype for name in ("label", "index", "position")} == {torch.int64}


def test_a_training_item_changes_with_epoch_and_seed_only(clips: ClipList) -> None:
    first, again, other_seed = (ClipDataset(clips, CONFIG, seed, train=True) for seed in (0, 0, 1))
    assert all(torch.equal(first[e, i]["pixels"], again[e, i]["pixels"]) for e in range(2) for i in range(COUNT))
    assert any(not torch.equal(first[0, i]["pixels"], first[1, i]["pixels"]) for i in range(COUNT))
    assert any(not torch.equal(first[0, i]["pixels"], other_seed[0, i]["pixels"]) for i in range(COUNT))


def test_an_epoch_shows_each_clip_at_most_once_and_drops_the_rest() -> None:
    keys = [key for batch in GlobalBatches(COUNT, GLOBAL, steps=range(4), seed=SEED) for key in batch]
    for epoch in (0, 1):
        indices = [index for e, index, _ in keys if e == epoch]
        assert indices == epoch_order(COUNT, SEED, epoch)[:8].tolist()
        assert len(set(indices)) == 8


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(epoch_order(COUNT, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    assert all(sorted(order) == list(range(COUNT)) for order in orders)


def test_an_uneven_share_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"global_batch = 4: cannot be shared evenly by 3"):
        GlobalBatches(COUNT, 4, steps=range(1), seed=0, world_size=3)


def test_fewer_clips_than_a_batch_are_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"global_batch = 12: the training list has only 11"):
        steps_per_epoch(COUNT, 12)


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 0), (3, 0), (2, 2)])
def test_testing_shows_every_clip_exactly_once(clips: ClipList, world_size: int, num_workers: int) -> None:
    seen = []
    for rank in range(world_size):
        dataset = ClipDataset(clips, CONFIG, SEED, train=False)
        for batch in clips_module.test_loader(dataset, 2, rank=rank, world_size=world_size, num_workers=num_workers):
            assert batch["pixels"].shape[1:] == (1, 4, 3, 32, 32)
            assert torch.equal(batch["label"], batch["index"])
            seen += batch["index"].tolist()
    assert sorted(seen) == list(range(COUNT))


def test_more_processes_than_clips_leave_an_empty_share(clips: ClipList) -> None:
    dataset = ClipDataset(clips, CONFIG, SEED, train=False)
    assert list(clips_module.test_loader(dataset, 2, rank=COUNT, world_size=COUNT + 1)) == []


def test_testing_takes_the_middle_frames(clips: ClipList) -> None:
    item = ClipDataset(clips, CONFIG, SEED, train=False)[3]  # nine frames
    assert frame_numbers(item["pixels"]) == [1, 3, 5, 7]


@pytest.mark.parametrize("num_frames", [3, 4])
def test_a_reversed_clip_shows_the_same_frames_backwards(clips: ClipList, num_frames: int) -> None:
    config = dataclasses.replace(CONFIG, num_frames=num_frames)
    backwards = dataclasses.replace(clips, reversed=[True] * COUNT)
    for index in range(COUNT):
        forward, back = (ClipDataset(c, config, SEED, train=False)[index]["pixels"] for c in (clips, backwards))
        assert torch.equal(back, forward.flip(1))


def test_every_temporal_view_of_a_reversed_clip_is_backwards(clips: ClipList) -> None:
    config = dataclasses.replace(CONFIG, sampling="dense", frame_stride=2, test_temporal_views=3)
    backwards = dataclasses.replace(clips, reversed=[True] * COUNT)
    forward, back = (ClipDataset(c, config, SEED, train=False)[4]["pixels"] for c in (clips, backwards))
    assert [frame_numbers(view) for view in forward] == [[0, 2, 4, 6], [2, 4, 6, 8], [3, 5, 7, 9]]
    assert torch.equal(back, forward.flip(1))


def test_a_bad_clip_in_training_is_replaced_by_the_next_readable_one(damaged: ClipList) -> None:
    dataset = ClipDataset(damaged, CONFIG, SEED, train=True)
    item, neighbour = dataset[1, 3], dataset[1, 5]
    assert torch.equal(item["pixels"], neighbour["pixels"])
    assert [int(item[name]) for name in ("label", "index", "bad")] == [5, 3, 1]
    assert not neighbour["bad"]


def test_a_bad_clip_in_testing_is_zeros_and_says_so(damaged: ClipList) -> None:
    item = ClipDataset(damaged, CONFIG, SEED, train=False)[3]
    assert item["pixels"].shape == (1, 4, 3, 32, 32)
    assert not item["pixels"].any()
    assert [int(item[name]) for name in ("label", "index", "bad")] == [3, 3, 1]


def test_bad_clips_are_flagged_and_named_through_loader_workers(damaged: ClipList) -> None:
    dataset = ClipDataset(damaged, CONFIG, SEED, train=False)
    batches = list(clips_module.test_loader(dataset, 4, num_workers=2))
    assert [int(i) for batch in batches for i in batch["index"][batch["bad"]]] == [3, 4]
    why = "the file is empty (zero bytes)"
    expected = [BadClip(index, f"{damaged.root}/{index}.mp4: {why}") for index in (3, 4)]
    assert [bad for batch in batches for bad in batch["bad_clips"]] == expected


def test_every_clip_that_a_replacement_steps_over_is_named(damaged: ClipList) -> None:
    dataset = ClipDataset(damaged, CONFIG, SEED, train=True)
    batch = clips_module.collate([dataset[1, 2], dataset[1, 3], dataset[1, 4]])
    assert [bad.index for bad in batch["bad_clips"]] == [3, 4, 4]


def test_bad_clips_survive_pinned_memory() -> None:
    batch = {"bad_clips": [BadClip(3, "a.mp4: is empty")]}
    assert pin_memory(batch) == batch


def test_a_clip_that_reads_at_the_second_attempt_is_good(clips: ClipList, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [ClipError("storage hiccup")]
    decode = reading_module.decode

    def flaky(*args: object, **options: object) -> object:
        if failures:
            raise failures.pop()
        return decode(*args, **options)  # type: ignore[arg-type]

    expected = ClipDataset(clips, CONFIG, SEED, train=True)[0, 0]
    monkeypatch.setattr(reading_module, "decode", flaky)
    item = ClipDataset(clips, CONFIG, SEED, train=True)[0, 0]
    assert torch.equal(item["pixels"], expected["pixels"])
    assert not item["bad"]


def test_a_list_of_bad_clips_only_is_a_clip_error(clips: ClipList, tmp_path: Path) -> None:
    with pytest.raises(ClipError, match=r"0.mp4: it and the 10 clips after it"):
        ClipDataset(dataclasses.replace(clips, root=str(tmp_path)), CONFIG, SEED, train=True)[0, 0]


@pytest.mark.parametrize("train", [True, False])
def test_the_memory_cache_changes_no_pixel(clips: ClipList, train: bool) -> None:
    plain, cached = (ClipDataset(clips, CONFIG, SEED, train, Reading(in_memory=on)) for on in (False, True))
    for epoch in range(2):
        for index in range(COUNT):
            key = (epoch, index) if train else index
            assert torch.equal(plain[key]["pixels"], cached[key]["pixels"])


def test_the_memory_cache_decodes_a_clip_once(clips: ClipList, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_module, "_MEMORY", {})
    ClipDataset(clips, CONFIG, 0, train=True, reading=Reading(in_memory=True))[0, 0]
    monkeypatch.setattr(reading_module, "decode", None)
    ClipDataset(clips, CONFIG, 1, train=False, reading=Reading(in_memory=True))[0]


def test_the_memory_cache_leaves_long_clips_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_module, "_MEMORY", {})
    write_grey(tmp_path / "long.mp4", num_frames=70, step=1)
    clips = ClipList("folder", "train", str(tmp_path), ["long.mp4"], [0], [False], ("a",))
    plain, cached = (
        ClipDataset(clips, CONFIG, SEED, train=True, reading=Reading(in_memory=on)) for on in (False, True)
    )
    assert torch.equal(plain[0, 0]["pixels"], cached[0, 0]["pixels"])
    assert not reading_module._MEMORY


def test_uniform_sampling_with_many_temporal_views_is_a_config_error(clips: ClipList) -> None:
    with pytest.raises(ConfigError, match=r"test_temporal_views = 3"):
        ClipDataset(clips, dataclasses.replace(CONFIG, test_temporal_views=3), SEED, train=False)


def test_paths_survive_packing(clips: ClipList) -> None:
    names = ["a.mp4", "räum te/é.mp4", "z.webm"]
    packed = ClipDataset(
        dataclasses.replace(clips, paths=names, labels=[0, 1, 2], reversed=[False] * 3), CONFIG, 0, True
    )
    assert [packed.path(i) for i in range(3)] == [f"{clips.root}/{name}" for name in names]


def test_repeated_augmentation_shows_each_clip_of_a_batch_in_several_views(clips: ClipList) -> None:
    config = dataclasses.replace(CONFIG, random_resized_crop=(0.3, 1.0), repeated_augmentation=2)
    once, *_ = train_loader(ClipDataset(clips, CONFIG, SEED, train=True), GLOBAL, steps=range(1))
    twice, *_ = train_loader(ClipDataset(clips, config, SEED, train=True), GLOBAL, steps=range(1))
    assert twice["index"].tolist() == [int(index) for index in once["index"][:2] for _ in range(2)]
    assert twice["position"].tolist() == list(range(GLOBAL))
    assert not torch.equal(twice["pixels"][0], twice["pixels"][1])


def test_repeated_augmentation_shows_every_clip_once_per_view_in_an_epoch() -> None:
    batches = GlobalBatches(12, GLOBAL, steps=range(12), seed=SEED, repeats=2)
    keys = [key[:2] for batch in batches for key in batch]
    assert batches.epoch_steps == 6
    assert sorted(keys[:24]) == [(showing, index) for showing in (0, 1) for index in range(12)]
    assert sorted(keys[24:]) == [(showing, index) for showing in (2, 3) for index in range(12)]


def test_repeated_augmentation_is_the_same_in_two_processes() -> None:
    whole = list(GlobalBatches(COUNT, GLOBAL, steps=range(6), seed=SEED, repeats=2))
    halves = [GlobalBatches(COUNT, GLOBAL, steps=range(6), seed=SEED, rank=r, world_size=2, repeats=2) for r in (0, 1)]
    assert [[*a, *b] for a, b in zip(*halves, strict=True)] == whole


def test_labels_of_two_heads_travel_together(clips: ClipList) -> None:
    pairs = dataclasses.replace(clips, labels=[(i, COUNT - i) for i in range(COUNT)])
    batch = next(iter(clips_module.test_loader(ClipDataset(pairs, CONFIG, SEED, train=False), 3)))
    assert batch["label"].tolist() == [[0, 11], [1, 10], [2, 9]]


def test_exact_resizing_gives_floats_and_zeros_of_the_same_kind_for_a_bad_clip(damaged: ClipList) -> None:
    dataset = ClipDataset(damaged, dataclasses.replace(CONFIG, resize="exact"), SEED, train=False)
    assert {dataset[i]["pixels"].dtype for i in (2, 3)} == {torch.float32}


def test_loader_workers_share_the_list_instead_of_copying_it(clips: ClipList) -> None:
    long = dataclasses.replace(
        clips, paths=[f"{i:040d}.mp4" for i in range(50_000)], labels=[0] * 50_000, reversed=[False] * 50_000
    )
    assert len(ForkingPickler.dumps(ClipDataset(long, CONFIG, SEED, train=True))) < 10_000
