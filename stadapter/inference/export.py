"""Export of a trained model's inference path, as one file that needs no code of this package.

    export(model, recipe, "model.pt2")     # torch.export: torch.export.load("model.pt2").module()(pixels)
    export(model, recipe, "model.onnx")    # needs the extra `onnx`

Pixels in, as the recipe's test views give them (normalising is part of the file), logits out, for any number of clips
at once. The file is read back and compared with the model before it takes its name.
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stadapter.config import ConfigError, Recipe, first_line
from stadapter.data.transforms import pixel_dtype
from stadapter.model.classifier import VideoClassifier
from stadapter.trials import files

TOLERANCE = 1e-5  # of the largest logit, or of 1
_ONNX = ("onnx", "onnxscript", "onnxruntime")
_TRACED_BATCH = 2
_CHECKED_BATCHES = (1, 3)

Exported = Callable[[Tensor], Tensor]  # pixels -> logits


class ExportError(RuntimeError):
    """The model cannot be traced, or the file gave other numbers than the model. One line; no file was written."""


def export(model: VideoClassifier, recipe: Recipe, file: str | Path) -> float:
    """Write the model, whole or not at all; returns the largest difference of a logit between file and model.

    Input `pixels`: [B, T, 3, S, S], T and S the recipe's, uint8 in 0..255, or float32 in 0..1 for a recipe with
    `exact` resizing. Output `logits`: float32 [B, K]. Traced on the CPU in float32.

    Raises ConfigError if the name ends in neither .pt2 nor .onnx or ONNX's libraries are missing, ExportError, and
    WriteError if the file cannot be written.
    """
    file = Path(file)
    _check_format(file)
    model = model.float().cpu().eval().requires_grad_(False)
    program = _trace(model, recipe)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".stadapter-", dir=file.parent) as folder:
        written = Path(folder) / file.name
        try:
            exported = _write_pt2(program, written) if file.suffix == ".pt2" else _write_onnx(program, written)
        except Exception as error:  # of many kinds, a full disk among them
            raise ExportError(f"{file}: cannot be written ({type(error).__name__}: {first_line(error)})") from error
        difference = _compare(model, exported, recipe, written)
        files.write_atomically(file, written.read_bytes())
    return difference


def _check_format(file: Path) -> None:
    if file.suffix not in (".pt2", ".onnx"):
        raise ConfigError(f"--output {file}: must end in .pt2 (torch.export) or .onnx")
    if file.suffix == ".onnx" and (missing := [name for name in _ONNX if importlib.util.find_spec(name) is None]):
        raise ConfigError(f"--output {file}: needs {' and '.join(missing)}: pip install 'stadapter[onnx]'")


def _pixels(recipe: Recipe, clips: int) -> Tensor:
    """Return random pixels, [clips, T, 3, S, S]."""
    data = recipe.data
    shape = (clips, data.num_frames, 3, data.frame_size, data.frame_size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(clips))
    return pixels if pixel_dtype(data) == torch.uint8 else pixels / 255


def _trace(model: VideoClassifier, recipe: Recipe) -> torch.export.ExportedProgram:
    try:
        with torch.no_grad():
            # Strict, that is, through Dynamo: tracing by running would fix the batch where code asks for len(tensor).
            return torch.export.export(
                model,
                (_pixels(recipe, _TRACED_BATCH),),
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                strict=True,
            )
    except Exception as error:  # of many kinds; custom adapters and models may do anything
        raise ExportError(f"the model cannot be traced ({type(error).__name__}: {first_line(error)})") from error


def _compare(model: VideoClassifier, exported: Exported, recipe: Recipe, file: Path) -> float:
    """Return the largest difference of a logit. Raises ExportError if it is above the tolerance."""
    worst = 0.0
    for clips in _CHECKED_BATCHES:
        pixels = _pixels(recipe, clips)
        with torch.inference_mode():
            expected = model(pixels)
        with torch.no_grad():
            difference = (exported(pixels) - expected).abs().max().item()
        allowed = TOLERANCE * max(1.0, expected.abs().max().item())
        if not difference <= allowed:
            raise ExportError(
                f"the {file.suffix} file gave other logits: off by {difference:.2g}, allowed {allowed:.2g}"
            )
        worst = max(worst, difference)
    return worst


def _write_pt2(program: torch.export.ExportedProgram, file: Path) -> Exported:
    torch.export.save(program, file)
    return torch.export.load(file).module()


def _write_onnx(program: torch.export.ExportedProgram, file: Path) -> Exported:
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its own insides
        written: Any = torch.onnx.export(program, input_names=["pixels"], output_names=["logits"], verbose=False)
    written.save(file, external_data=False)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])
