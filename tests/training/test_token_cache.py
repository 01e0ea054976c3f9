"""A training with the token cache gives the numbers of one without, and reads no clip twice."""

from __future__ import annotations

import argparse
import dataclasses
import pickle
import shutil
from pathlib import Path
from typing import Any

import made_up
import pytest
import torch
from safetensors.torch import load_file

from stadapter import config
from stadapter.ablation.plan.estimate import rate_of
from stadapter.commands.main import main as command
from stadapter.config import ConfigError, DataConfig, Recipe
from stadapter.data import clips as clips_module
from stadapter.data.cache.quota import Quota
from stadapter.data.cache.tokens import Rows
from stadapter.data.lists.clip_list import Split
from stadapter.data.lists.formats import load_clips
from stadapter.model.build import build_model
from stadapter.results.table import make_rows, notes
from stadapter.training.flags import add_reading_flags, reading_flags
from stadapter.training.hardware import cpu_name
from stadapter.training.loop import train
from stadapter.training.options import TrainOptions
from stadapter.training.state import Stopped
from stadapter.training.token_cache import (
    FIXED,
    PIXELS,
    TokenCache,
    check_pixels,
    describe,
    open_token_cache,
    tokens_shape,
)
from stadapter.trials import record
from stadapter.trials.record import TokensUsed
from stadapter.trials.status import Entry, Failures

CPU = torch.device("cpu")
ROW_BYTES = 4 * 26 * 96 * 4  # frames, tokens, width, float32


@pytest.fixture(scope="module")
def fixed(tiny_recipe: Recipe) -> Recipe:
    """Return a recipe with adapters in the last two of six blocks, on clips that look the same in every epoch."""
    return config.replace(tiny_recipe, **{"data.fixed_frames": True, "optim.head_dropout": 0.3})


@pytest.fixture
def cached(clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainOptions:
    """Return options with a token cache, which is empty at the start of each test."""
    monkeypatch.setenv("STADAPTER_CACHE", str(tmp_path / "cache"))
    return TrainOptions(clip_folder, token_cache_gb=1)


@pytest.fixture(scope="module")
def plain(fixed: Recipe, train_options: TrainOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the same training without the cache."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("plain")
    train(fixed, folder, train_options)
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of clips that this process has read, which grows."""
    seen: list[str] = []
    read = clips_module.read_frames

    def counted(path: str, *more: Any) -> Any:
        seen.append(path)
        return read(path, *more)

    monkeypatch.setattr(clips_module, "read_frames", counted)
    return seen


def losses(folder: Path) -> list[float]:
    return [line[name] for line in record.read_metrics(folder) for name in ("train_loss", "val_loss")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / record.TRAINED)


def assert_bitwise(folder: Path, expected: Path) -> None:
    assert losses(folder) == losses(expected)
    mine, theirs = weights(folder), weights(expected)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def make_token_cache(recipe: Recipe, gigabytes: float = 1) -> TokenCache:
    found = open_token_cache(build_model(recipe), recipe, gigabytes, "auto", CPU)
    assert found is not None
    return found


def rows_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("cache/prefix/*/rows"))


def test_losses_and_weights_are_those_of_a_training_without_it(
    fixed: Recipe, plain: Path, cached: TrainOptions, tmp_path: Path, reads: list[str]
) -> None:
    result = train(fixed, tmp_path / "run", cached)
    assert losses(tmp_path / "run") == pytest.approx(losses(plain), rel=1e-5)
    for name, expected in weights(plain).items():
        torch.testing.assert_close(weights(tmp_path / "run")[name], expected, rtol=1e-5, atol=1e-5)
    # Every clip is read once: in the second epoch, and in the test of the list that validation has seen, none is.
    assert len(reads) == len(set(reads)) == 16 + 7
    assert result.trial_id == config.identity(fixed)
    assert record.read_result(plain).prefix_cache is None  # type: ignore[index]
    kept = {"train": 16, "val": 7, "test": 7}
    assert dataclasses.asdict(result.prefix_cache) == {
        "blocks": 4, "rows": kept, "rows_at_start": {"train": 0, "val": 0, "test": 7}
    }  # fmt: skip


def test_other_seeds_share_the_rows_and_other_depths_have_their_own(
    fixed: Recipe, cached: TrainOptions, tmp_path: Path, reads: list[str]
) -> None:
    short = config.replace(fixed, **{"optim.epochs": 1})
    train(short, tmp_path / "first", cached)
    reads.clear()
    result = train(config.replace(short, seed=1), tmp_path / "seed", cached)
    assert reads == []
    assert result.prefix_cache.rows_at_start == {"train": 16, "val": 7, "test": 7}
    result = train(config.replace(short, **{"adapter.blocks": (5,)}), tmp_path / "deeper", cached)
    assert (result.prefix_cache.blocks, len(reads)) == (5, 16 + 7)
    assert len(rows_files(tmp_path)) == 4  # two lists for each depth


def test_no_bit_depends_on_which_rows_there_are(fixed: Recipe, cached: TrainOptions, tmp_path: Path) -> None:
    """Train from an empty cache, then with a resumption, then with room for few rows, so that batches are mixed."""
    train(fixed, tmp_path / "cold", cached)
    for file in rows_files(tmp_path):
        file.unlink()
    done: list[Any] = []
    with pytest.raises(Stopped):
        train(fixed, tmp_path / "stopped", cached, on_step=done.append, should_stop=lambda: len(done) >= 2)
    train(fixed, tmp_path / "stopped", cached)
    assert_bitwise(tmp_path / "stopped", tmp_path / "cold")
    for file in rows_files(tmp_path):
        file.unlink()
    small = TrainOptions(cached.data_root, token_cache_gb=6 * ROW_BYTES / 1e9)
    result = train(fixed, tmp_path / "small", small)
    assert 2 <= result.prefix_cache.rows["train"] <= 6
    assert sum(file.stat().st_blocks for file in rows_files(tmp_path)) * 512 <= 8 * ROW_BYTES
    assert_bitwise(tmp_path / "small", tmp_path / "cold")


def test_a_damaged_row_is_computed_again(fixed: Recipe, cached: TrainOptions, tmp_path: Path, reads: list[str]) -> None:
    short = config.replace(fixed, **{"optim.epochs": 1})
    train(short, tmp_path / "first", cached)
    (train_rows,) = (file for file in rows_files(tmp_path) if file.stat().st_size > 16 * ROW_BYTES)
    with open(train_rows, "r+b") as file:
        file.seek(-ROW_BYTES - 100, 2)  # in the row before the last one
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    reads.clear()
    train(short, tmp_path / "again", cached)
    assert len(reads) == 1
    assert_bitwise(tmp_path / "again", tmp_path / "first")


def test_unreadable_clips_are_replaced_and_reported_as_without(
    fixed: Recipe, clip_folder: Path, cached: TrainOptions, tmp_path: Path
) -> None:
    shutil.copytree(clip_folder, tmp_path / "clips")
    for split in ("train", "val"):
        broken = sorted((tmp_path / "clips" / split).glob("*/*.mp4"))[1]
        broken.write_bytes(b"no video")
    usual = TrainOptions(tmp_path / "clips", max_bad_share=0.5)
    without = train(fixed, tmp_path / "without", usual)
    result = train(fixed, tmp_path / "with", dataclasses.replace(usual, token_cache_gb=1))
    assert result.bad_clips == without.bad_clips
    assert [result.bad_clips[split].clips for split in ("train", "test")] == [1, 1]
    assert losses(tmp_path / "with") == pytest.approx(losses(tmp_path / "without"), rel=1e-5)
    assert result.prefix_cache.rows == {"train": 15, "val": 6, "test": 6}


@pytest.mark.filterwarnings("ignore:the adapter behind the attention of the last block")
@pytest.mark.parametrize(
    ("changes", "blocks"),
    [
        ({"adapter.blocks": (4, 5)}, 4),
        ({"adapter.blocks": (5,), "adapter.placement": "parallel"}, 5),
        ({"adapter.blocks": (5,), "adapter.placement": "both"}, 5),
        ({"adapter.blocks": None}, 0),
        ({"strategy": "linear_probe"}, 6),
        ({"strategy": "attentional_pooling"}, 6),
        ({"strategy": "temporal"}, 6),
        ({"strategy": "partial"}, 4),
        ({"strategy": "lora"}, 0),
        ({"strategy": "prompt"}, 0),
        ({"strategy": "bitfit"}, 0),
        ({"strategy": "full_space_time"}, 0),
    ],
)
def test_a_model_goes_on_from_the_tokens_behind_its_frozen_blocks(
    changes: dict[str, Any], blocks: int, fixed: Recipe
) -> None:
    recipe = config.replace(fixed, **changes)
    model = build_model(recipe)
    assert model.frozen_blocks() == blocks
    pixels = torch.randint(0, 256, (2, 4, 3, 60, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    if blocks:
        tokens = model.tokens_before(blocks, pixels)
        assert tokens.shape == (2, *tokens_shape(model, recipe))
        assert not tokens.requires_grad
        assert torch.equal(model(tokens, start=blocks), model(pixels))
    else:
        assert open_token_cache(model, recipe, 1, "auto", CPU) is None
        assert "trained from the first block on: nothing to keep" in describe([recipe], 1)[1]


def test_other_weights_pixels_clips_and_precisions_have_other_rows(
    fixed: Recipe, clip_folder: Path, cached: TrainOptions
) -> None:
    def file(split: Split = "train", **changes: Any) -> Path:
        recipe = config.replace(fixed, **changes)
        clips = load_clips(recipe.data, clip_folder, split)
        return make_token_cache(recipe).open_rows(clips).file

    assert file() == file() == file(seed=3, **{"adapter.kernel_size": (1, 1, 1), "optim.base_lr": 1.0})
    others = [
        file("val"),
        *(
            file(**{path: value})
            for path, value in {
                "backbone.weights": "seed:1",
                "data.num_frames": 2,
                "data.frame_stride": 1,
                "data.resize": "exact",
                "data.decoded_short_side": 60,
                "optim.precision": "bfloat16",
                "adapter.blocks": (5,),
            }.items()
        ),
    ]
    assert len({file(), *others}) == 1 + len(others)


def test_a_row_is_of_one_file_as_it_was(tmp_path: Path) -> None:
    clip = tmp_path / "a.mp4"
    clip.write_bytes(b"one")
    rows = Rows(Quota(tmp_path / "cache" / "own", 10**6, "--cache-prefix"), 3, (2, 3, 4))
    tokens = torch.randn(2, 3, 4)
    before = rows.stamp(str(clip))
    rows.write(1, before, tokens)
    found = pickle.loads(pickle.dumps(rows)).read(1, before)  # as in a loader worker
    assert torch.equal(found, tokens)
    assert rows.read(0, before) is None
    clip.write_bytes(b"another")
    assert rows.stamp(str(clip)) != before
    assert rows.read(1, rows.stamp(str(clip))) is None
    assert rows.stamp(f"{clip}#frames=0,5") != rows.stamp(f"{clip}#frames=5,9")
    assert rows.stamp(str(tmp_path / "gone.mp4")) == -1


def test_rows_keep_the_type_that_the_forward_gives(tmp_path: Path) -> None:
    rows = Rows(Quota(tmp_path / "own", 10**6, "--cache-prefix"), 2, (2, 3, 4))
    tokens = torch.randn(2, 3, 4).to(torch.bfloat16)
    rows.write(0, 7, tokens)
    assert torch.equal(rows.read(0, 7), tokens)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="another type"):
        rows.write(1, 7, tokens.float())
    assert rows.count() == 1


def test_every_field_of_the_data_is_known_to_decide_pixels_or_not() -> None:
    """A new field must enter one of these sets, or the cache might keep rows of pixels that change with the epoch."""
    of_clips = {"dataset", "num_classes", "label_groups", "test_temporal_views", "test_spatial_views"}
    assert {f.name for f in dataclasses.fields(DataConfig)} == {*FIXED, *PIXELS, *of_clips}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fixed_frames", False),
        ("short_side_jitter", (1.0, 1.2)),
        ("random_resized_crop", (0.5, 1.0)),
        ("horizontal_flip", True),
        ("rand_augment", "rand-m7-n4-mstd0.5-inc1"),
        ("random_erasing", 0.25),
        ("repeated_augmentation", 2),
    ],
)
def test_pixels_that_change_are_refused_by_the_fields_name(field: str, value: Any, fixed: Recipe) -> None:
    recipe = config.replace(fixed, **{f"data.{field}": value})
    with pytest.raises(ConfigError, match=rf"--cache-prefix: data\.{field} = .*--set data\.{field}=") as caught:
        check_pixels(recipe)
    override = str(caught.value).partition("--set ")[2].partition(")")[0]
    check_pixels(config.replace(recipe, **dict([config.parse_override(override)])))


def test_a_model_of_ones_own_is_refused(fixed: Recipe) -> None:
    own = {"own.file": "mine.py", "own.sha256": "0", "own.model": "mine"}
    with pytest.raises(ConfigError, match=r"own\.model = mine: .* leave the flag out"):
        check_pixels(config.replace(fixed, **own))


@pytest.mark.parametrize("size", ["-1", "inf", "nan"])
def test_a_size_that_is_no_bound_is_refused(size: str) -> None:
    parser = argparse.ArgumentParser()
    add_reading_flags(parser)
    with pytest.raises(ConfigError, match=rf"--cache-prefix {size}: must be a number of gigabytes"):
        reading_flags(parser.parse_args(["--cache-prefix", size]))


def test_decoding_on_a_cluster_is_refused_beside_it() -> None:
    with pytest.raises(ConfigError, match="--cache-prefix: not together with --decode-on-cluster"):
        TrainOptions(token_cache_gb=1, remote_loader=lambda dataset, batches: [])


def test_the_command_says_what_it_keeps_or_why_it_cannot(
    tiny_flags: list[str], cached: TrainOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*tiny_flags, "--cache-prefix", "0.5", "--output", str(tmp_path / "run"), "--set", "optim.epochs=1"]
    assert command(["train", *flags]) == 2
    assert "error: --cache-prefix: data.fixed_frames = False" in capsys.readouterr().err
    assert command(["train", *flags, "--set", "data.fixed_frames=true"]) == 0
    out = capsys.readouterr().out
    assert f"token cache: {tmp_path}/cache/prefix, at most 0.5 GB per node" in out
    assert "the lowest 4 of 6 blocks are frozen: 0.04 MB per clip" in out
    assert len(rows_files(tmp_path)) == 2


def test_a_sweep_says_how_much_its_depths_need(fixed: Recipe) -> None:
    arms = [config.replace(fixed, **{"adapter.blocks": blocks}) for blocks in ((4, 5), (5,), None)]
    lines = describe(arms, 0.001, clips=100)
    assert lines[1:] == [
        "  trained from the first block on: nothing to keep, computed as without the flag",
        "  the lowest 4 of 6 blocks are frozen: 0.04 MB per clip, 0.004 GB for 100 clips",
        "  the lowest 5 of 6 blocks are frozen: 0.04 MB per clip, 0.004 GB for 100 clips",
        "  room for 13 % of that: the other clips are computed each time",
    ]


def test_a_plan_takes_no_rate_from_trials_that_read_tokens() -> None:
    (trial, *_) = made_up.kernel_sweep(seeds=1).trials
    device = cpu_name()
    done = made_up.result(trial, 50.0, device=device, processes=1)
    rates = [
        rate_of(
            [Entry(trial, dataclasses.replace(done, prefix_cache=kept), 4, False, Failures(), None)], trial.recipe, None
        )[0]
        for kept in (None, TokensUsed(4, {}, {}))
    ]
    assert rates[0] is not None
    assert rates[1] is None


def test_a_table_says_whose_seconds_depend_on_it() -> None:
    sweep = made_up.kernel_sweep(seeds=1)
    first, *others = sweep.trials
    records = [made_up.result(first, 50.0, prefix_cache=TokensUsed(4, {}, {}))]
    records += [made_up.result(trial, 50.0) for trial in others]
    lines = notes(sweep, make_rows(sweep, records), records)
    assert "1 trials read the tokens of their frozen blocks from a cache: their seconds depend on it." in lines
