"""Trained models put to use: opened from a file or a run folder, and tested as their training tested them.

model, recipe, header = open_trained("runs/one")
metrics = test(model, recipe, TrainOptions(data_root="/data/ssv2"))
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stadapter import config
from stadapter.config import ConfigError, Precision, Recipe
from stadapter.data.lists.formats import ClipList, load_clips
from stadapter.model import model_file
from stadapter.model.build import cast_frozen
from stadapter.model.classifier import VideoClassifier
from stadapter.training import hardware
from stadapter.training.evaluate import Batches, evaluate_clips
from stadapter.training.hardware import PRECISIONS
from stadapter.training.options import TrainOptions
from stadapter.training.process_group import ProcessGroup
from stadapter.trials import record

CLIPS_PER_PASS = 8

# Fields that may differ from the training: those of the clips and their views. The weights decide all others.
_CHANGEABLE = ("data.", "optim.precision")
_FIXED = ("data.num_classes", "data.label_groups", "data.frame_size")


def open_trained(
    path: str | Path, *, weights_file: Path | None = None, changes: dict[str, Any] | None = None
) -> tuple[VideoClassifier, Recipe, model_file.Header]:
    """Return a trained model on the CPU for inference, its recipe with `changes` by dotted path, and its header.

    `path` is a finished run folder or a file of `stadapter.model.model_file`. Raises ConfigError if the training has
    not finished, if `model_file.load` refuses the file, or if a change is of something that the weights decide.
    """
    file = _model_file(Path(path))
    for field in changes or {}:
        if field in _FIXED or not field.startswith(_CHANGEABLE):
            raise ConfigError(
                f"--set {field}: was decided when {file} was trained; only data.* and precision can change"
            )
    model, header = model_file.load(file, weights_file=weights_file)
    assert header.recipe is not None  # or load would have refused it
    return model, config.replace(header.recipe, **changes or {}), header


def _model_file(path: Path) -> Path:
    if path.is_dir():
        file = path / record.TRAINED
        if not file.exists():
            raise ConfigError(
                f"{path}: has no {record.TRAINED}: its training has not finished; the same command ends it"
            )
        return file
    if path.suffix in (".pth", ".pt"):
        raise ConfigError(f"{path}: is not a file of this package; `stadapter convert` makes one of an authors' .pth")
    return path


def put_on(model: VideoClassifier, precision: Precision, device: torch.device) -> VideoClassifier:
    """Move the model to its device, in place, with matrix products as in a training.

    On a GPU its frozen matrices are stored in the precision; on a CPU they stay in float32, which autocast reads as
    well, so that the same model can be used in float32 afterwards.
    """
    hardware.set_up(device, precision)
    model.requires_grad_(False).to(device)
    if precision != "float32" and device.type == "cuda":
        cast_frozen(model, PRECISIONS[precision])
    return model


def test(
    model: VideoClassifier,
    recipe: Recipe,
    train_options: TrainOptions,
    group: ProcessGroup | None = None,
    clips: ClipList | None = None,
    watch: Callable[[Batches], Batches] = iter,
) -> dict[str, float]:
    """Return the metrics of `evaluate` on the recipe's test clips, with all its views and in its precision.

    Called by every process of the `group`. `watch` is handed the batches and yields them. Raises ConfigError if the
    data set is not there, BadClipsError if too many of its clips cannot be read.
    """
    group = group or ProcessGroup()
    clips = clips or load_clips(recipe.data, train_options.data_root, "test")
    put_on(model, recipe.optim.precision, group.device)
    clips_per_pass = train_options.clips_per_pass or CLIPS_PER_PASS
    return evaluate_clips(model, recipe, clips, train_options, group, clips_per_pass, watch=watch)[0]


test.__test__ = False  # type: ignore[attr-defined]  # pytest would collect the name
