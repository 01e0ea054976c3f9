"""Golden vectors: outputs of the authors' published models, and our models with the same weights."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from safetensors import safe_open

from stadapter.backbone.vit import ViT, VitShape
from stadapter.config import AdapterConfig
from stadapter.inference.authors import our_names
from stadapter.model.build import freeze
from stadapter.model.classifier import VideoClassifier

FILES = sorted((Path(__file__).parents[1] / "data" / "golden").glob("*.safetensors"))
PLACEMENTS = {(True, False): "before_mhsa", (False, True): "after_mhsa", (True, True): "both"}


class Golden:
    def __init__(self, file: Path) -> None:
        with safe_open(file, "pt") as opened:
            self.config = json.loads(opened.metadata()["config"])
            self.tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        self.state = self.group("state.")
        self.gradients = our_names(self.group("grad."))
        self.input_BTCHW = self.tensors["input"].transpose(1, 2)

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def model(self) -> VideoClassifier:
        c = self.config
        shape = VitShape(
            image_size=c["input_resolution"],
            patch_size=c["patch_size"],
            width=c["width"],
            depth=c["layers"],
            heads=c["heads"],
            mlp_width=4 * c["width"],
            activation="quick_gelu",
            norm_eps=1e-5,
            pre_norm=True,
            patch_bias=False,
        )
        adapter = AdapterConfig(
            bottleneck_width=c["adapter_width"],
            kernel_size=tuple(c["adapter_kernel_size"]),
            placement=PLACEMENTS[c["adapter_pre_attn"], c["adapter_pre_mlp"]],
            blocks=tuple(range(c["layers"] - c["adapter_layers"], c["layers"])),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the dead adapter
            model = VideoClassifier(ViT(shape), c["num_classes"], adapter)
        model.load_state_dict(our_names(self.state))
        freeze(model, "st_adapter", train_final_norm=False)
        return model


def assert_relative(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Assert equality to 1e-5 of the tensor's largest value."""
    error = (got - expected).abs().max().item()
    assert error <= 1e-5 * expected.abs().max().item(), f"{what}: off by {error}"
