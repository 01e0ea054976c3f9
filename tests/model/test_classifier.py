"""The video classifier."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from stadapter import recipes
from stadapter.config import ConfigError, Recipe, replace
from stadapter.model.build import build_model, cast_frozen
from stadapter.model.classifier import VideoClassifier, dead_parameters
from stadapter.model.state import load_trainable_state, trainable_parameters, trainable_state

EMBEDDED = replace(recipes.embedded, **{"backbone.weights": "seed:0"})


def recipe_with(**fields: Any) -> Recipe:
    return replace(EMBEDDED, **{name.replace("__", "."): value for name, value in fields.items()})


def model_with(**fields: Any) -> VideoClassifier:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about a dead adapter, where a test is not about it
        return build_model(recipe_with(**fields))


def awaken(model: VideoClassifier) -> VideoClassifier:
    """Move the adapters away from the identity."""
    generator = torch.Generator().manual_seed(0)
    for adapters in (model.before, model.after):
        for parameter in adapters.parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def clips(B: int = 2, T: int = 4) -> torch.Tensor:
    return torch.randint(0, 256, (B, T, 3, 60, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def loss_of(model: VideoClassifier, pixels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(pixels), torch.arange(len(pixels)))


@pytest.mark.parametrize("placement", ["before_mhsa", "after_mhsa", "both"])
def test_fresh_model_is_the_image_model_averaged_over_frames(placement) -> None:
    model, pixels = model_with(adapter__placement=placement), clips()
    normalised = (pixels.flatten(0, 1) / 255 - 0.5) / 0.5
    features = model.vit(normalised)[:, 0].view(2, 4, -1)
    tokens = model.vit.embed(normalised)
    for block in model.vit.blocks:
        tokens = tokens + block.attend(tokens)
        tokens = tokens + block.mlp(tokens)
    expected = model.head(model.vit.norm(tokens[:, 0].view(2, 4, -1).mean(1)))
    assert features.shape == (2, 4, 96)
    torch.testing.assert_close(model(pixels), expected, rtol=1e-4, atol=1e-5)


def test_logits_are_float32_of_the_right_shape() -> None:
    logits = model_with()(clips(3, 8))
    assert logits.shape == (3, 12) and logits.dtype == torch.float32


def test_uint8_and_float_pixels_give_the_same_logits() -> None:
    model, pixels = awaken(model_with()), clips()
    assert torch.equal(model(pixels), model(pixels.float() / 255))


def test_a_clip_does_not_see_the_others_in_its_batch() -> None:
    model, pixels = awaken(model_with()), clips(3)
    torch.testing.assert_close(model(pixels)[1:2], model(pixels[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kernel_size", "sees_time"), [((1, 1, 1), False), ((3, 1, 1), True), ((3, 3, 3), True)])
def test_only_a_temporal_kernel_sees_the_order_of_frames(kernel_size, sees_time) -> None:
    model, pixels = awaken(model_with(adapter__kernel_size=kernel_size)), clips()
    same = torch.allclose(model(pixels), model(pixels.flip(1)), rtol=1e-4, atol=1e-4)
    assert same != sees_time


def test_head_dropout_is_what_the_caller_gives() -> None:
    model, pixels = model_with(), clips()
    nothing_kept = model(pixels, torch.zeros(2, 96))
    torch.testing.assert_close(nothing_kept, model.head.bias.expand(2, -1))
    assert torch.equal(model(pixels, torch.ones(2, 96)), model(pixels))


def trained_groups(model: VideoClassifier) -> set[str]:
    return {".".join(name.split(".")[: 2 if name.startswith("vit") else 1]) for name in trainable_parameters(model)}


@pytest.mark.parametrize(
    ("strategy", "train_final_norm", "groups"),
    [
        ("st_adapter", False, {"before", "head"}),
        ("st_adapter", True, {"before", "head", "vit.norm"}),
        ("linear_probe", False, {"head"}),
        ("linear_probe", True, {"head", "vit.norm"}),
        ("full", False, {"head", "vit.norm", "vit.blocks", "vit.patch_embed", "vit.cls_token", "vit.pos_embed"}),
    ],
)
def test_strategy_decides_what_is_trained(strategy, train_final_norm, groups) -> None:
    model = model_with(strategy=strategy, train_final_norm=train_final_norm)
    assert trained_groups(model) == groups
    assert (len(model.before) > 0) == (strategy == "st_adapter")


@pytest.mark.parametrize("strategy", ["st_adapter", "linear_probe", "full"])
def test_a_step_moves_what_is_trained_and_nothing_else(strategy) -> None:
    model = awaken(model_with(strategy=strategy))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    loss_of(model, clips()).backward()
    trained = trainable_parameters(model)
    torch.optim.SGD(trained.values(), lr=0.1).step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name


def test_everything_trained_receives_a_gradient() -> None:
    model = awaken(model_with(adapter__placement="both", train_final_norm=True))
    loss_of(model, clips()).backward()
    assert all(parameter.grad is not None for parameter in trainable_parameters(model).values())


def test_after_mhsa_adapter_of_the_last_block_is_built_and_never_computed() -> None:
    with pytest.warns(UserWarning, match="block \\(5\\) can never receive a gradient"):
        model = build_model(recipe_with(adapter__placement="after_mhsa"))
    awaken(model)
    assert "5" in model.after
    assert dead_parameters(model) == sum(p.numel() for p in model.after["5"].parameters())
    assert not any(name.startswith("after.5") for name in trainable_parameters(model))
    logits = model(clips())
    with torch.no_grad():
        for parameter in model.after["5"].parameters():
            parameter.fill_(float("nan"))
    assert torch.equal(model(clips()), logits)


def test_no_dead_adapter_and_no_warning_without_the_last_block() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build_model(recipe_with(adapter__placement="after_mhsa", adapter__blocks=(0, 4)))
    assert dead_parameters(model) == 0


@pytest.mark.parametrize(
    ("fields", "blocks_with_graph"),
    [
        ({"adapter__blocks": (4, 5)}, [4, 5]),
        ({"adapter__blocks": (2,), "adapter__placement": "after_mhsa"}, [2, 3, 4, 5]),
        ({"strategy": "linear_probe"}, []),
        ({"strategy": "full"}, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_blocks_below_the_first_adapter_build_no_graph(fields, blocks_with_graph) -> None:
    model, with_graph = model_with(**fields), []
    for index, block in enumerate(model.vit.blocks):
        block.norm2.register_forward_hook(
            lambda module, inputs, output, index=index: with_graph.append((index, torch.is_grad_enabled()))
        )
    model(clips())
    assert [index for index, enabled in with_graph if enabled] == blocks_with_graph


def test_arms_with_the_same_seed_share_their_initial_values() -> None:
    first, wider = model_with(), model_with(adapter__kernel_size=(5, 1, 1), adapter__blocks=(2, 3))
    assert torch.equal(first.head.weight, wider.head.weight)
    assert torch.equal(first.before["2"].down.weight, wider.before["2"].down.weight)
    assert not torch.equal(first.before["2"].down.weight, first.before["3"].down.weight)
    other = model_with(seed=1)
    assert not torch.equal(first.head.weight, other.head.weight)
    assert not torch.equal(first.before["2"].down.weight, other.before["2"].down.weight)


def test_building_leaves_the_global_random_stream_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    VideoClassifier(model_with().vit, 5, recipes.embedded.adapter, seed=7)
    model_with()
    torch.manual_seed(0)
    build_model(EMBEDDED, device="meta")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("blocks", [(6,), (-1,), (0, 12)])
def test_unknown_block_names_the_valid_range(blocks) -> None:
    with pytest.raises(ConfigError, match="the backbone has 0 to 5"):
        model_with(adapter__blocks=blocks)


def test_no_block_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="linear_probe"):
        model_with(adapter__blocks=())


def test_trainable_state_survives_the_round_trip() -> None:
    trained, fresh = awaken(model_with(train_final_norm=True)), model_with(train_final_norm=True)
    state = {name: tensor.clone() for name, tensor in trainable_state(trained).items()}
    assert state.keys() == trainable_parameters(trained).keys()
    assert not torch.equal(fresh(clips()), trained(clips()))
    load_trainable_state(fresh, state)
    assert torch.equal(fresh(clips()), trained(clips()))


def test_trainable_state_of_another_model_is_refused() -> None:
    state = trainable_state(model_with(train_final_norm=True))
    with pytest.raises(ConfigError, match=r"lacks nothing, and has vit.norm.bias, vit.norm.weight"):
        load_trainable_state(model_with(train_final_norm=False), state)
    with pytest.raises(ConfigError, match=r"lacks after.0.conv.bias, after.0.conv.weight, .* and \d+ more"):
        load_trainable_state(model_with(adapter__placement="after_mhsa", train_final_norm=True), state)
    with pytest.raises(ConfigError, match=r"before.0.conv.weight is \[48, 1, 3, 3, 3\]"):
        load_trainable_state(model_with(adapter__kernel_size=(3, 1, 1), train_final_norm=True), state)


@pytest.mark.parametrize("frozen_in_half", [False, True])
def test_bfloat16_autocast_is_close_to_float32(frozen_in_half) -> None:
    model, pixels = awaken(model_with()), clips()
    expected = model(pixels)
    loss_of(model, pixels).backward()
    gradients = {name: p.grad.clone() for name, p in trainable_parameters(model).items()}
    model.zero_grad()
    if frozen_in_half:
        cast_frozen(model, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(pixels)
        loss_of(model, pixels).backward()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
    for name, parameter in trainable_parameters(model).items():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert F.cosine_similarity(parameter.grad.flatten(), gradients[name].flatten(), dim=0) > 0.98, name


def test_cast_frozen_leaves_what_is_trained_in_float32() -> None:
    model = model_with(train_final_norm=True)
    cast_frozen(model, torch.bfloat16)
    assert model.vit.blocks[0].qkv.weight.dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in trainable_parameters(model).values())


def test_state_holds_weights_only() -> None:
    assert not any("mean" in name or "std" in name for name in model_with().state_dict())
