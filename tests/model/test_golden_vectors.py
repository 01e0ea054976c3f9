"""The model computes the authors' function: the expected numbers come from running their published code."""

import pytest
import torch
import torch.nn.functional as F
from golden import FILES, Golden, assert_relative

from stadapter.inference.authors import authors_names
from stadapter.model.state import trainable_parameters


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def golden(request) -> Golden:
    return Golden(request.param)


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
