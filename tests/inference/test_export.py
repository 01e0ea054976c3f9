"""Exported files give the model's logits to 1e-5, for any number of clips, without importing this package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from authors import authors_file, golden_recipe
from golden import FILES, Golden
from torch import Tensor

from stadapter import config
from stadapter.commands.main import main
from stadapter.config import ConfigError, Recipe
from stadapter.inference import authors
from stadapter.inference.export import ExportError, export
from stadapter.model.build import classifier
from stadapter.model.classifier import VideoClassifier

ALONE = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
torch.save([program(pixels) for pixels in torch.load(sys.argv[2])], sys.argv[3])
assert not [name for name in sys.modules if name.startswith("stadapter")]
"""


Trained = tuple[VideoClassifier, Recipe, Path]


def trained(folder: Path, stem: str, **fields: Any) -> Trained:
    """Return the first two layers of a golden model (tracing takes a second per layer), the recipe and the file."""
    golden = Golden(next(file for file in FILES if file.stem == stem))
    golden.state = {name: tensor for name, tensor in golden.state.items() if "resblocks.2." not in name}
    base = config.replace(golden_recipe(2), **{"data.num_frames": 4} | fields)
    model, recipe = authors.from_authors(authors_file(folder / "theirs.pth", golden), base)
    authors.save_converted(folder / "ours.safetensors", model, recipe)
    return model, recipe, folder / "ours.safetensors"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Return the golden model with adapters of 3x3x3 before and after attention."""
    return trained(tmp_path_factory.mktemp("trained"), "both_k3x3x3")


def pixels(clips: int) -> Tensor:
    return torch.randint(
        0, 256, (clips, 4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(clips)
    )


def test_a_torch_export_file_gives_the_models_logits_without_the_package(
    both: Trained, tmp_path: Path, capsys: Any
) -> None:
    model, _, file = both
    out = tmp_path / "new" / "model.pt2"
    assert main(["export", str(file), "--output", str(out)]) == 0
    assert "pixels uint8 [B, 4, 3, 32, 32], 0..255\nlogits float32 [B, 5]" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["model.pt2"]
    batches = [pixels(clips) for clips in (1, 5)]
    torch.save(batches, tmp_path / "pixels")
    words = [sys.executable, "-c", ALONE, str(out), str(tmp_path / "pixels"), str(tmp_path / "logits")]
    subprocess.run(words, check=True, cwd=tmp_path)
    for batch, logits in zip(batches, torch.load(tmp_path / "logits"), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(logits, model(batch), rtol=1e-5, atol=1e-5)


def test_an_onnx_file_gives_the_models_logits_of_exactly_resized_frames(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    (tmp_path / "trained").mkdir()
    model, recipe, _ = trained(tmp_path / "trained", "before_mhsa_k3x1x1", **{"data.resize": "exact"})
    assert export(model, recipe, tmp_path / "model.onnx") <= 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for clips in (1, 5):
        scaled = pixels(clips) / 255
        (logits,) = session.run(["logits"], {"pixels": scaled.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(scaled), rtol=1e-5, atol=1e-5)


class Noisy(VideoClassifier):
    """A model that gives other logits at every call."""

    def forward(self, pixels_BTCHW: Tensor, head_keep_BD: Tensor | None = None) -> Tensor:
        return self.head.weight[:, 0] + torch.rand(len(pixels_BTCHW), 1)


class Branching(VideoClassifier):
    """A model whose operations depend on the pixels."""

    def forward(self, pixels_BTCHW: Tensor, head_keep_BD: Tensor | None = None) -> Tensor:
        return self.head.weight if pixels_BTCHW.float().mean() > 128 else self.head.weight + 1


@pytest.mark.parametrize(("kind", "why"), [(Noisy, "gave other logits: off by"), (Branching, "cannot be traced")])
def test_a_file_that_would_be_wrong_is_not_written(
    both: Trained, tmp_path: Path, kind: type[VideoClassifier], why: str
) -> None:
    model, recipe, _ = both
    other = classifier(
        config.replace(recipe, strategy="linear_probe"), model.vit, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), kind
    )
    with pytest.raises(ExportError, match=why):
        export(other, recipe, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_names_that_say_no_format_are_refused(both: Trained, tmp_path: Path) -> None:
    model, recipe, _ = both
    with pytest.raises(ConfigError, match=r"must end in \.pt2"):
        export(model, recipe, tmp_path / "model.bin")
