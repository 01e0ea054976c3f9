"""Trained models put to use: read from a file or a run folder, and tested as their training tested them.

model, recipe, header = open_trained("runs/one")
metrics = test(model, recipe, TrainOptions(data_root="/data/ssv2"))
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from stadapter import config
from stadapter.config import ConfigError, Precision, Recipe
from stadapter.data.bad_clips import BadClips
from stadapter.data.clips import test_loader
from stadapter.data.lists.formats import ClipList, load_clips
from stadapter.model import model_file
from stadapter.model.build import cast_frozen
from stadapter.model.classifier import VideoClassifier
from stadapter.training import hardware
from stadapter.training.evaluate import evaluate
from stadapter.training.options import TrainOptions
from stadapter.training.runtime import PRECISIONS, ProcessGroup, make_dataset
from stadapter.trials import record

CLIPS_PER_PASS = 8

# What may differ from the training: the clips, and how they are looked at. The weights decide everything else.
_CHANGEABLE = ("data.", "optim.precision")
_FIXED = ("data.num_classes", "data.label_groups", "data.frame_size")


def open_trained(
    path: str | Path, *, weights_file: Path | None = None, changes: dict[str, Any] | None = None
) -> tuple[VideoClassifier, Recipe, model_file.Header]:
    """The model of a file of `stadapter.model.model_file` or of a finished run folder, for inference on the CPU; the
    recipe with `changes` by dotted path; and the file's header. ConfigError for a training that has not finished, for
    what `saved.load` refuses, and for a change of what the weights decide.
    """
    file = Path(path)
    if file.is_dir():
        file = file / record.TRAINED
        if not file.exists():
            raise ConfigError(
                f"{path}: has no {record.TRAINED}: its training has not finished; the same command ends it"
            )
    elif file.suffix in (".pth", ".pt"):
        raise ConfigError(f"{path}: is not a file of this package; `stadapter convert` makes one of an authors' .pth")
    for field in changes or {}:
        if field in _FIXED or not field.startswith(_CHANGEABLE):
            raise ConfigError(
                f"--set {field}: was decided when {file} was trained; only data.* and precision can change"
            )
    model, header = model_file.load(file, weights_file=weights_file)
    assert header.recipe is not None  # or load would have refused it
    return model, config.replace(header.recipe, **changes or {}), header


def put_on(model: VideoClassifier, precision: Precision, device: torch.device) -> VideoClassifier:
    """The model on its device, in place, its products as in a training; on a GPU stored in half precision for half.

    On a CPU it stays in float32, which autocast reads as well: the same model may be asked in float32 afterwards.
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
    watch: Any = iter,
) -> dict[str, float]:
    """The metrics of `evaluate` on the recipe's test clips, all its views, in the recipe's precision.

    Called by every process of the `group`. `watch` sees the batches pass by. ConfigError where the data set is not
    there, BadClipsError where too many of its clips cannot be read.
    """
    group, data = group or ProcessGroup(), recipe.data
    clips = clips or load_clips(data, train_options.data_root, "test")
    bad = BadClips("test", len(clips), train_options.max_bad_share)
    batches: Iterable[dict[str, Any]] = test_loader(
        make_dataset(clips, data, recipe.seed, train_options, train=False),
        train_options.clips_per_pass or CLIPS_PER_PASS,
        rank=group.rank,
        world_size=group.world_size,
        num_workers=train_options.num_workers,
    )
    metrics = evaluate(
        put_on(model, recipe.optim.precision, group.device),
        watch(bad.watch(batches)),
        group.device,
        PRECISIONS[recipe.optim.precision],
        opposite_pairs=any(clips.reversed),
        label_groups=data.label_groups,
        distributed=group.world_size > 1,
    )
    if group.world_size > 1:
        bad.gather()
    return metrics


test.__test__ = False  # type: ignore[attr-defined]  # a name that pytest would collect
