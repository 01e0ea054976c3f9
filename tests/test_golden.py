"""The model computes the same function as the authors' published one: numbers measured by running theirs."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from stadapter.backbone.vit import ViT, VitShape
from stadapter.config import AdapterConfig
from stadapter.inference.authors import authors_names, our_names
from stadapter.model.classifier import VideoClassifier
from stadapter.model.state import trainable_parameters
from stadapter.model.strategies import freeze

FILES = sorted((Path(__file__).parent / "data").glob("*.safetensors"))
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


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def golden(request) -> Golden:
    return Golden(request.param)


def assert_relative(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """To 1e-5 of the tensor's largest value."""
    error = (got - expected).abs().max().item()
    assert error <= 1e-5 * expected.abs().max().item(), f"{what}: off by {error}"


def test_there_are_three_files() -> None:
    assert len(FILES) == 3


def test_logits_and_loss_equal_the_authors(golden) -> None:
    logits = golden.model().forward_normalised(golden.input_BTCHW)
    assert_relative(logits, golden.tensors["logits"], "logits")
    assert_relative(F.cross_entropy(logits, golden.tensors["labels"]), golden.tensors["loss"], "loss")


def test_every_gradient_equals_the_authors(golden) -> None:
    model = golden.model()
    F.cross_entropy(model.forward_normalised(golden.input_BTCHW), golden.tensors["labels"]).backward()
    parameters = dict(model.named_parameters())
    assert trainable_parameters(model).keys() <= golden.gradients.keys()
    for name, expected in golden.gradients.items():
        got = parameters[name].grad
        assert_relative(torch.zeros_like(expected) if got is None else got, expected, name)


def test_gradients_stop_at_the_frozen_backbone(golden) -> None:
    model = golden.model()
    F.cross_entropy(model.forward_normalised(golden.input_BTCHW), golden.tensors["labels"]).backward()
    assert all(parameter.grad is None for parameter in model.vit.parameters())


def test_checkpoint_names_survive_the_round_trip(golden) -> None:
    back = authors_names(golden.model().state_dict())
    assert back.keys() == golden.state.keys()
    assert all(torch.equal(back[name], golden.state[name]) for name in back)
