"""Files written by an earlier version of the code still load: runs, checkpoints, sweeps, model files, MLflow models.

tests/data/made_before holds them. Nothing in it is ever written again: a test that fails here says that users' files
have stopped loading.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import mlflow
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from stadapter import add_st_adapters, config, load_into
from stadapter.config import ConfigError, Recipe
from stadapter.inference.trained import open_trained
from stadapter.model.build import build_model
from stadapter.model.model_file import frozen_digest, read
from stadapter.model.state import trainable_state
from stadapter.training.loop import train
from stadapter.training.options import TrainOptions
from stadapter.trials import checkpoint, record
from stadapter.trials.record import Record
from stadapter.trials.sweep import load_sweep

MADE_BEFORE = Path(__file__).parents[1] / "data" / "made_before"
RUN = MADE_BEFORE / "trials" / "8fbd7351ace7"


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """Return the recipe of the run."""
    return config.unflatten(json.loads((RUN / record.CONFIG).read_text()))


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    """Return the fields of the run's result.json."""
    fields: dict[str, Any] = json.loads((RUN / record.RESULT).read_text())
    return fields


@pytest.fixture
def same_backbone(recipe: Recipe) -> None:
    """Skip if the seeded backbone has other bits, as without AVX2: the files then rightly refuse the backbone."""
    if frozen_digest(build_model(recipe)) != read(RUN / record.TRAINED)[1].frozen_sha256:
        pytest.skip("this processor draws other random weights than the one that the files were made on")


def copy_run(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        shutil.copy(RUN / name, folder)
    return folder


def fail(metrics: dict[str, Any]) -> None:
    raise AssertionError("trained again")


# --- records


def test_a_record_loads_and_is_written_with_the_same_fields(stored: dict[str, Any]) -> None:
    loaded = record.read_result(RUN)
    assert loaded is not None
    assert loaded == Record.from_json(stored)
    assert loaded.to_json() == stored


def test_a_record_of_the_fields_that_are_in_every_record_loads(stored: dict[str, Any]) -> None:
    missing = (dataclasses.MISSING, dataclasses.MISSING)
    optional = {f.name for f in dataclasses.fields(Record) if (f.default, f.default_factory) != missing}
    few = {name: value for name, value in stored.items() if name not in optional}
    few["data"] = {split: used for split, used in stored["data"].items() if split != "decoder"}
    loaded, full = Record.from_json(few), Record.from_json(stored)
    assert len(few) == 11 and loaded.metrics == full.metrics and loaded.data == full.data
    assert (loaded.decoder, loaded.prefix_cache, loaded.bad_clips, loaded.git_commit) == (None, None, {}, "unknown")


def test_null_in_a_record_counts_as_missing(stored: dict[str, Any]) -> None:
    loaded = Record.from_json(stored | dict.fromkeys(("views", "git_commit", "versions", "bad_clips", "host")))
    assert (loaded.views, loaded.code, loaded.versions, loaded.bad_clips, loaded.host) == (1, "unknown", {}, {}, None)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("seconds", None, "seconds is missing"),
        ("seconds", "long", "seconds is of another kind"),
        ("trainable_params", [1], "trainable_params is of another kind"),
        ("git_commit", 7, "git_commit is of another kind"),
        ("metrics", [97.1], "metrics is of another kind"),
        ("metrics", {"top1": "high"}, "metrics.top1 is of another kind"),
        ("metrics", {}, "metrics.top1 is missing"),
        ("data", {"train": 3}, "of another kind"),
        ("bad_clips", {"train": {"clips": 1}}, "'first' is missing"),
    ],
)
def test_a_record_with_a_field_of_another_kind_is_an_error_of_one_line(
    stored: dict[str, Any], tmp_path: Path, name: str, value: object, reason: str
) -> None:
    (tmp_path / record.RESULT).write_text(json.dumps(stored | {name: value}))
    with pytest.raises(ConfigError, match=rf"result\.json: is damaged \(.*{reason}") as caught:
        record.read_result(tmp_path)
    assert "\n" not in str(caught.value)


def test_fields_of_a_later_version_are_left_out(stored: dict[str, Any]) -> None:
    later = json.loads(json.dumps(stored)) | {"new": 1}
    later["data"]["train"]["new"] = 1
    assert Record.from_json(later) == Record.from_json(stored)


def test_a_run_is_finished_for_its_recipe_and_no_other(
    recipe: Recipe, train_options: TrainOptions, tmp_path: Path
) -> None:
    assert config.identity(recipe) == RUN.name
    folder = copy_run(tmp_path / RUN.name, record.CONFIG, record.METRICS, record.TRAINED, record.RESULT)
    assert train(recipe, folder, train_options, on_epoch=fail, on_step=fail) == record.read_result(RUN)
    with pytest.raises(ConfigError, match="holds another training"):
        train(config.replace(recipe, seed=1), folder, train_options)


def test_a_sweep_loads_and_its_trials_have_their_folders() -> None:
    (folder,) = (MADE_BEFORE / "sweeps").iterdir()
    sweep = load_sweep(folder)
    assert [arm.label for arm in sweep.arms] == ["kernel 1x1x1", "kernel 3x1x1"]
    assert sweep.trials[0].folder(MADE_BEFORE) == RUN
    assert sweep.folder(MADE_BEFORE) == folder


# --- checkpoints


@pytest.mark.usefixtures("same_backbone")
def test_a_checkpoint_is_gone_on_from_to_the_same_weights(
    recipe: Recipe, train_options: TrainOptions, tmp_path: Path
) -> None:
    folder = copy_run(tmp_path / "run", record.CONFIG, record.METRICS, checkpoint.PREVIOUS)
    epochs: list[int] = []
    result = train(recipe, folder, train_options, on_epoch=lambda metrics: epochs.append(metrics["epoch"]))
    assert epochs == [2] and result.launches == 2
    weights, expected = load_file(folder / record.TRAINED), load_file(RUN / record.TRAINED)
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-5)
    first, second = record.read_metrics(folder)
    assert first == record.read_metrics(RUN)[0]
    assert second["train_loss"] == pytest.approx(record.read_metrics(RUN)[1]["train_loss"], rel=1e-5)


def test_the_newest_checkpoint_says_that_the_training_is_done() -> None:
    newest, previous = checkpoint.load(RUN, torch.device("cpu")), RUN / checkpoint.PREVIOUS
    assert newest is not None and previous.exists()
    assert (newest["epochs_done"], newest["steps_done"]) == (2, 8)


# --- models


@pytest.mark.usefixtures("same_backbone")
def test_a_trained_model_opens(recipe: Recipe, stored: dict[str, Any]) -> None:
    model, its_recipe, header = open_trained(RUN)
    assert its_recipe == recipe and header.metrics == stored["metrics"] and header.data == stored["data"]
    assert list(header.class_names) == ["left", "right"]
    for name, tensor in load_file(RUN / record.TRAINED).items():
        assert torch.equal(model.get_parameter(name), tensor)


@pytest.mark.usefixtures("same_backbone")
def test_an_mlflow_model_that_names_the_old_module_loads(clip_folder: Path) -> None:
    model = mlflow.pyfunc.load_model(str(MADE_BEFORE / "mlflow_model"))
    assert model.metadata.flavors["python_function"]["loader_module"] == "stadapter.ablation.mlflow_model"
    found = model.predict([str(next(clip_folder.glob("val/*/0.mp4")))])
    assert list(found["class"]) in (["left", "right"], ["right", "left"])
    assert found.probability.sum() == pytest.approx(1)


def vit_of_written_down_weights() -> nn.Module:
    """Return a small timm ViT whose weights are fractions of 64, equal on every machine."""
    vit: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=2, num_classes=0
    )
    with torch.no_grad():
        for place, parameter in enumerate(vit.parameters()):
            values = (torch.arange(parameter.numel()) * 7 + place) % 17 - 8
            parameter.copy_(values.view(parameter.shape) / 64)
    return vit


def test_adapters_saved_from_a_vit_load_into_another() -> None:
    vit = vit_of_written_down_weights()
    add_st_adapters(vit, num_frames=4, bottleneck_width=4)
    file = MADE_BEFORE / "adapters_of_a_vit.safetensors"
    header = load_into(vit, file)
    assert (header.recipe, header.backbone, header.metrics) == (None, "vit_tiny", {"top1": 12.5})
    stored = load_file(file)
    assert trainable_state(vit).keys() == stored.keys()
    for name, tensor in trainable_state(vit).items():
        assert tensor.any() and torch.equal(tensor, stored[name])
