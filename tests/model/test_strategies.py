"""Each strategy has the trained parameters, the starting function and the rates that its row gives."""

from __future__ import annotations

import re
import typing
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from stadapter import recipes
from stadapter.config import ConfigError, Placement, Recipe, Strategy, replace
from stadapter.model.build import build_model, cast_frozen
from stadapter.model.classifier import VideoClassifier, code
from stadapter.model.cost import cost_of
from stadapter.model.state import load_trainable_state, trainable_parameters, trainable_state
from stadapter.recipes import for_strategy
from stadapter.strategies import STRATEGIES as ROWS
from stadapter.strategies import StrategyRow
from stadapter.training.loop import train
from stadapter.training.optim import make_optimizer
from stadapter.training.options import TrainOptions
from stadapter.trials import record

EMBEDDED = replace(recipes.embedded, **{"backbone.weights": "seed:0", "data.num_frames": 4})
STRATEGIES = typing.get_args(Strategy)
SEES_TIME = ("attentional_pooling", "temporal", "st_adapter", "full_space_time", "full_st_adapter")

# The parameters that each strategy trains, besides the head: names of all parameters, and of nothing else.
ADAPTER = r"before\.[0-5]\.(down|up)\.(weight|bias)"
TRAINED = {
    "linear_probe": r"(?!)",
    "attentional_pooling": r"pool\.(query|frame|kv\.(weight|bias)|proj\.(weight|bias))",
    "prompt": r"prompts\.[0-5]",
    "partial": r"vit\.blocks\.[45]\..*",
    "temporal": r"temporal\.(frame|blocks\.0\..*)",
    "bitfit": r"vit\..*bias",
    "lora": r"lora\.[0-5]\.(qkv|proj)\.(down|up)\.weight",
    "adapter": ADAPTER,
    "st_adapter": rf"{ADAPTER}|before\.[0-5]\.conv\.(weight|bias)",
    "full": r"vit\..*",
    "full_st_adapter": rf"vit\..*|{ADAPTER}|before\.[0-5]\.conv\.(weight|bias)",
    "full_space_time": r"vit\..*|time\.(frame|blocks\.[0-5]\.(norm|qkv|proj|out)\.(weight|bias))",
}


def recipe_for(strategy: Strategy, **fields: Any) -> Recipe:
    bare = replace(for_strategy(EMBEDDED, strategy), train_final_norm=False)
    return replace(bare, **{name.replace("__", "."): value for name, value in fields.items()})


def model_for(strategy: Strategy, **fields: Any) -> VideoClassifier:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about dead adapters
        return build_model(recipe_for(strategy, **fields))


def awaken(model: VideoClassifier) -> VideoClassifier:
    """Move parameters that start at zero away from it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def clips(B: int = 2, T: int = 4) -> torch.Tensor:
    return torch.randint(0, 256, (B, T, 3, 60, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def loss_of(model: VideoClassifier) -> torch.Tensor:
    return F.cross_entropy(model(clips()), torch.arange(2))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_trained_is_exactly_what_it_says(strategy: Strategy) -> None:
    model = model_for(strategy)
    expected = {name for name, _ in model.named_parameters() if re.fullmatch(TRAINED[strategy], name)}
    assert trainable_parameters(model).keys() == expected | {"head.weight", "head.bias"}
    assert len(expected) > 0 or strategy == "linear_probe"
    # Whatever is not the image model is trained: nothing is added and then left alone.
    assert {name for name, _ in model.named_parameters() if not name.startswith("vit.")} <= set(
        trainable_parameters(model)
    )


def test_a_row_names_classes_with_what_the_model_asks_of_them() -> None:
    for row in ROWS.values():
        asked = {
            row.adapter: ("from_config", "macs_per_frame", "forward"),
            row.adds: ("part", "build", "macs_per_view"),
            row.model: ("block", "parts"),
        }
        assert [name for text, names in asked.items() if text for name in names if not hasattr(code(text), name)] == []


def test_a_row_and_a_class_are_all_that_a_new_strategy_takes(monkeypatch) -> None:
    """The new strategy has adapters with another rate, trained last blocks, and a model that adds a part to a block."""

    class Shifted(VideoClassifier):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.shift = torch.nn.Parameter(torch.zeros(self.width))

        def block(self, index: int, x_MSD: torch.Tensor, num_frames: int, cls_only: bool) -> torch.Tensor:
            return super().block(index, x_MSD + self.shift, num_frames, cls_only)

    monkeypatch.setattr("stadapter.model.baselines.Shifted", Shifted, raising=False)
    row = StrategyRow(adapter="adapter.STAdapter", model="baselines.Shifted", backbone="last blocks", rate=1 / 8)
    monkeypatch.setitem(ROWS, "shifted", row)
    monkeypatch.setattr("stadapter.config.Strategy", typing.Literal[tuple(ROWS)])  # as a fresh import would have it
    recipe = recipe_for("shifted")
    assert recipe.optim.base_lr == EMBEDDED.optim.base_lr / 8
    model = awaken(build_model(recipe))
    assert {name.split(".")[0] for name in trainable_parameters(model)} == {"shift", "before", "vit", "head"}
    assert model.first_trained_block() == -1
    loss_of(model).backward()
    assert model.shift.grad is not None and model.shift.grad.any()
    assert cost_of(recipe).macs_per_view == cost_of(recipe_for("st_adapter")).macs_per_view


@pytest.mark.parametrize(
    ("strategy", "first"),
    [
        *(("linear_probe", 6), ("attentional_pooling", 6), ("temporal", 6), ("partial", 4)),
        *(("prompt", 0), ("lora", 0), ("adapter", 0), ("bitfit", -1), ("full", -1), ("full_space_time", -1)),
    ],
)
def test_the_first_trained_block_is_the_lowest_that_needs_a_gradient(strategy: Strategy, first: int) -> None:
    assert model_for(strategy).first_trained_block() == first
    assert model_for("st_adapter", adapter__blocks=(2, 4)).first_trained_block() == 2


def test_plain_tensors_may_stand_in_the_parameters_places() -> None:
    model, pixels = build_model(for_strategy(recipes.embedded, "prompt")), torch.rand(1, 8, 3, 60, 60)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    logits = torch.func.functional_call(model, tensors, (pixels,))
    torch.testing.assert_close(logits, model(pixels), rtol=0, atol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_step_of_the_optimizer_changes_that_and_nothing_else(strategy: Strategy) -> None:
    model = awaken(model_for(strategy))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, recipe_for(strategy).optim)
    loss_of(model).backward()
    optimizer.step()
    trained = trainable_parameters(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_everything_trained_receives_a_gradient(strategy: Strategy) -> None:
    model = awaken(model_for(strategy))
    loss_of(model).backward()
    assert [name for name, parameter in trainable_parameters(model).items() if parameter.grad is None] == []


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "prompt"])
def test_training_starts_at_the_frozen_model(strategy: Strategy) -> None:
    torch.testing.assert_close(model_for(strategy)(clips()), model_for("linear_probe")(clips()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_who_can_tell_a_clip_from_its_reversal(strategy: Strategy) -> None:
    model = awaken(model_for(strategy))
    same = torch.allclose(model(clips()), model(clips().flip(1)), rtol=1e-3, atol=1e-4)
    assert same != (strategy in SEES_TIME)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_clip_does_not_see_the_others_in_its_batch(strategy: Strategy) -> None:
    model, pixels = awaken(model_for(strategy)), clips(3)
    torch.testing.assert_close(model(pixels)[1:2], model(pixels[1:2]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_initial_values_and_checkpoints_repeat(strategy: Strategy) -> None:
    first, second, other = model_for(strategy), model_for(strategy), model_for(strategy, seed=1)
    state = trainable_state(first)
    assert all(torch.equal(state[name], tensor) for name, tensor in trainable_state(second).items())
    assert not torch.equal(first.head.weight, other.head.weight)
    trained = awaken(first)
    load_trainable_state(other, trainable_state(trained))
    assert torch.equal(trained(clips()), other(clips()))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_counts_are_those_of_the_model(strategy: Strategy) -> None:
    model, cost = model_for(strategy), cost_of(recipe_for(strategy))
    assert cost.trainable_params == sum(p.numel() for p in trainable_parameters(model).values())
    assert cost.total_params == sum(p.numel() for p in model.parameters())


def test_sizes_are_the_recipes() -> None:
    assert model_for("prompt", rival__prompts=3).prompts[0].shape == (3, 96)
    assert model_for("lora", rival__lora_rank=2).lora[5].qkv.up.weight.shape == (288, 2)
    deeper = model_for("temporal", rival__temporal_blocks=2)
    assert deeper.temporal is not None and len(deeper.temporal.blocks) == 2
    assert any(
        name.startswith("vit.blocks.0.") for name in trainable_parameters(model_for("partial", rival__partial_blocks=6))
    )
    with pytest.raises(ConfigError, match="the backbone has 6 blocks"):
        model_for("partial", rival__partial_blocks=7)


def test_lora_is_a_low_rank_change_of_the_frozen_matrices() -> None:
    model, merged = awaken(model_for("lora")), model_for("linear_probe")
    with torch.no_grad():
        for lora, block in zip(model.lora, merged.vit.blocks, strict=True):
            block.qkv.weight += lora.qkv.up.weight @ lora.qkv.down.weight
            block.proj.weight += lora.proj.up.weight @ lora.proj.down.weight
        merged.head.load_state_dict(model.head.state_dict())
    torch.testing.assert_close(model(clips()), merged(clips()), rtol=1e-4, atol=1e-4)


def test_prompts_are_seen_by_the_patches_of_their_block_and_dropped_behind_it() -> None:
    model, pixels = model_for("prompt"), clips()
    seen: list[int] = []
    for block in model.vit.blocks:
        block.norm1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
        block.norm2.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    model(pixels)
    assert seen == [26 + 8, 26] * 5 + [26 + 8, 1]


def test_divided_attention_lets_a_patch_see_its_own_place_in_other_frames_only() -> None:
    attention = model_for("full_space_time").time
    assert attention is not None
    torch.nn.init.normal_(attention.blocks[0].out.weight)
    x_MSD = torch.randn(2 * 4, 26, 96)
    changed = x_MSD.clone()
    changed[1, 7] = torch.randn(96)
    difference = (attention(changed, 0) - attention(x_MSD, 0)).abs().amax(-1)
    places = {tuple(place) for place in (difference > 1e-4).nonzero().tolist()}
    assert places == {(frame, 7) for frame in range(4)}


def test_the_papers_fully_fine_tuned_model_has_its_published_size() -> None:
    paper = replace(recipes.kinetics400_clip_b16, strategy="full_space_time")
    assert cost_of(paper).trainable_params == 121_567_120  # published: 121.57 M


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_settings_of_a_strategy_are_the_recipes_times_its_own(strategy: Strategy) -> None:
    changed = for_strategy(recipes.embedded_digits, strategy)
    back = replace(
        changed,
        **{
            "strategy": "st_adapter",
            "train_final_norm": True,
            "optim.base_lr": recipes.embedded.optim.base_lr,
            "optim.backbone_lr_factor": 1.0,
        },
    )
    assert back == recipes.embedded_digits
    assert for_strategy(recipes.embedded, "st_adapter") == recipes.embedded


@pytest.mark.parametrize("frozen_in_half", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bfloat16_autocast_is_close_to_float32(strategy: Strategy, frozen_in_half: bool) -> None:
    model, pixels = awaken(model_for(strategy)), clips()
    expected = model(pixels)
    if frozen_in_half:
        cast_frozen(model, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(pixels)
        F.cross_entropy(logits, torch.arange(2)).backward()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0.1, atol=0.1 * expected.abs().max().item())
    assert all(parameter.grad.dtype == torch.float32 for parameter in trainable_parameters(model).values())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_training_goes_from_clips_to_a_record(
    strategy: Strategy, tiny_recipe: Recipe, clip_folder: Path, tmp_path: Path
) -> None:
    recipe = replace(for_strategy(tiny_recipe, strategy), **{"optim.epochs": 1})
    result = train(recipe, tmp_path, TrainOptions(data_root=clip_folder))
    assert result.recipe["strategy"] == strategy
    assert result.trainable_params == cost_of(recipe).trainable_params
    assert isinstance(result.diverged, bool)
    saved = load_file(tmp_path / record.TRAINED)
    assert sum(tensor.numel() for tensor in saved.values()) == result.trainable_params


# --- placements and options of the adapter


@pytest.mark.parametrize("adapt_cls", [False, True])
@pytest.mark.parametrize("strategy", ["st_adapter", "adapter"])
@pytest.mark.parametrize("placement", typing.get_args(Placement))
def test_an_adapter_anywhere_starts_as_the_frozen_model_and_then_changes_it(placement, strategy, adapt_cls) -> None:
    fields = {"adapter__placement": placement, "adapter__adapt_cls": adapt_cls}
    model, frozen = model_for(strategy, **fields), model_for("linear_probe")(clips())
    torch.testing.assert_close(model(clips()), frozen, rtol=1e-5, atol=1e-6)
    head = {name: p.clone() for name, p in model.head.named_parameters()}
    awaken(model).head.load_state_dict(head)
    assert not torch.allclose(model(clips()), frozen, rtol=1e-2)


def whole_model(model: VideoClassifier, pixels: torch.Tensor) -> torch.Tensor:
    """Return the logits of the model by its placements, computing every token in every block."""
    B, T = pixels.shape[:2]
    x = model.vit.embed((pixels.flatten(0, 1) / 255 - 0.5) / 0.5)

    def at(place: str, index: int, y: torch.Tensor) -> torch.Tensor:
        adapters = getattr(model, place)
        return adapters[str(index)](y, T) if str(index) in adapters else y

    for index, block in enumerate(model.vit.blocks):
        branch = at("parallel", index, x) - x
        y = at("before", index, x)
        y = at("after", index, y + block.attend(y))
        x = at("after_mlp", index, y + block.mlp(y)) + branch
    return model.head(model.vit.norm(x[:, 0].view(B, T, -1).mean(1)))


@pytest.mark.parametrize("adapt_cls", [False, True])
@pytest.mark.parametrize("placement", typing.get_args(Placement))
def test_what_is_left_out_of_the_last_block_does_not_matter(placement: str, adapt_cls: bool) -> None:
    model = awaken(model_for("st_adapter", adapter__placement=placement, adapter__adapt_cls=adapt_cls))
    torch.testing.assert_close(model(clips()), whole_model(model, clips()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("placement", "adapt_cls", "dead"),
    [
        ("before_mhsa", False, 0),
        ("after_mhsa", False, 1),
        ("both", False, 1),
        ("after_mlp", False, 1),
        ("parallel", False, 1),
        ("after_mhsa", True, 0),
        ("after_mlp", True, 0),
        ("parallel", True, 0),
    ],
)
def test_an_adapter_that_no_gradient_reaches_is_counted_and_not_trained(placement, adapt_cls, dead) -> None:
    fields = {"adapter__placement": placement, "adapter__adapt_cls": adapt_cls}
    cost = cost_of(recipe_for("st_adapter", **fields))
    model = awaken(model_for("st_adapter", **fields))
    adapters = len(model.adapters())
    assert adapters == (12 if placement == "both" else 6)
    assert cost.dead_params == dead * cost.adapter_params // adapters
    loss_of(model).backward()
    # By asking the gradient, on the model in which nothing is left out:
    model.zero_grad()
    model.requires_grad_(True)
    whole_model(model, clips()).square().sum().backward()
    unreached = [a for a in model.adapters() if not any(p.grad is not None and p.grad.any() for p in a.parameters())]
    assert unreached == model.dead_adapters()
    assert len(unreached) == dead


def test_cls_in_the_bottleneck_costs_its_share() -> None:
    without, with_cls = (cost_of(recipe_for("st_adapter", adapter__adapt_cls=flag)) for flag in (False, True))
    assert with_cls.macs_per_view - without.macs_per_view == 4 * 6 * (2 * 96 * 48 + 48)
    assert with_cls.trainable_params == without.trainable_params
