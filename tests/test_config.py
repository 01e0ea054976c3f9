"""Recipes: refused values, dotted paths, and identities."""

from __future__ import annotations

import json
import tomllib

import pytest

from stadapter import config, recipes
from stadapter.config import ConfigError, Recipe, first_line, last_line
from stadapter.results.paper import PAPER


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_survives_the_way_through_json(name: str) -> None:
    recipe = recipes.get(name)
    assert config.unflatten(json.loads(json.dumps(config.flatten(recipe)))) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.kernel_size=2,3,3", "odd"),
        ("adapter.kernel_size=3,3", "needs 3 values"),
        ("adapter.bottleneck_width=0", "at least 1"),
        ("adapter.bottleneck_width=wide", "cannot be read as int"),
        ("adapter.placement=within", "must be one of before_mhsa, after_mhsa, both, after_mlp, parallel"),
        ("adapter.blocks=1,1", "twice"),
        ("data.label_groups=5,6", "must add up to data.num_classes = 12"),
        ("data.random_erasing=2", "in [0, 1]"),
        ("data.repeated_augmentation=0", "at least 1"),
        ("data.repeated_augmentation=3", "must divide optim.global_batch = 8"),
        ("data.resize=slow", "must be one of fast, exact"),
        ("rival.lora_rank=0", "at least 1"),
        ("strategy=everything", "must be one of linear_probe, "),
        ("optim.backbone_lr_factor=0", "above 0"),
        ("optim.epochs=0", "above 0"),
        ("optim.warmup_epochs=4", "below optim.epochs"),
        ("optim.head_dropout=1", "in [0, 1)"),
        ("optim.base_lr=nan", "above 0"),
        ("optim.weight_decay=-0.1", "at least 0"),
        ("optim.betas=0.9,1", "in [0, 1)"),
        ("optim.clip_norm=0", "above 0, or none"),
        ("optim.clip_norm=-1", "above 0, or none"),
        ("optim.label_smoothing=1", "in [0, 1)"),
        ("data.num_frames=0", "at least 1"),
        ("data.frame_stride=0", "at least 1"),
        ("data.test_temporal_views=0", "at least 1"),
        ("seed=-1", "at least 0"),
        ("adapter.kernel=3", "no field"),
        ("adapter=3", "group of fields"),
        ("adapter.kernel_size", "FIELD=VALUE"),
    ],
)
def test_a_value_that_cannot_work_is_answered_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.replace(recipes.embedded, **dict([config.parse_override(override)]))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("adapter.kernel_size=3,1,1", (3, 1, 1)),
        ("adapter.blocks=none", None),
        ("adapter.blocks=0,5", (0, 5)),
        ("optim.clip_norm=none", None),
        ("optim.base_lr=1e-3", 1e-3),
        ("data.horizontal_flip=true", True),
        ("data.rand_augment=rand-m7-n4-mstd0.5-inc1", "rand-m7-n4-mstd0.5-inc1"),
    ],
)
def test_an_override_has_the_type_of_its_field(override: str, value: object) -> None:
    assert config.parse_override(override) == (override.partition("=")[0], value)


def test_identity_changes_with_every_field_that_decides_a_result(tiny_recipe: Recipe) -> None:
    changed = {
        "data.dataset": "ssv2", "data.num_classes": 3, "data.label_groups": (1, 1), "data.num_frames": 2,
        "data.frame_size": 48,
        "data.sampling": "uniform", "data.frame_stride": 3, "data.short_side_jitter": (1.0, 1.1),
        "data.random_resized_crop": (0.5, 1.0), "data.horizontal_flip": True, "data.rand_augment": "rand-m7-n4",
        "data.fixed_frames": True, "data.decoded_short_side": 64,
        "data.resize": "exact", "data.random_erasing": 0.25, "data.repeated_augmentation": 2,
        "data.test_temporal_views": 2, "data.test_spatial_views": 3, "backbone.name": "timm/vit_tiny_patch16_224",
        "backbone.weights": "seed:1", "optim.epochs": 3, "optim.global_batch": 2, "optim.base_lr": 0.1,
        "optim.warmup_epochs": 0.25, "optim.weight_decay": 0.0, "optim.betas": (0.9, 0.99), "optim.clip_norm": None,
        "optim.label_smoothing": 0.1, "optim.head_dropout": 0.1, "optim.precision": "bfloat16",
        "adapter.bottleneck_width": 4, "adapter.kernel_size": (1, 3, 3), "adapter.activation": "gelu",
        "adapter.placement": "both", "adapter.blocks": None, "adapter.adapt_cls": True, "adapter.zero_init_conv": False,
        "rival.prompts": 4, "rival.partial_blocks": 1, "rival.temporal_blocks": 2, "rival.lora_rank": 4,
        "optim.backbone_lr_factor": 0.1, "strategy": "linear_probe", "train_final_norm": False,
        "seed": 1,
    }  # fmt: skip
    own = {"own.file": "/here.py", "own.sha256": "0" * 64, "own.adapter": "Mine", "own.model": "build"}
    assert {*changed, *own} == set(config.flatten(tiny_recipe)) - {"name"}
    identities = {config.identity(config.replace(tiny_recipe, **{path: value})) for path, value in changed.items()}
    assert len(identities | {config.identity(tiny_recipe)}) == len(changed) + 1
    assert config.identity(config.replace(tiny_recipe, name="another")) == config.identity(tiny_recipe)
    mine = config.replace(tiny_recipe, **own)
    others = [{"own.sha256": "1" * 64}, {"own.adapter": "Other"}, {"own.model": ""}]
    assert len({config.identity(config.replace(mine, **fields)) for fields in ({}, *others)}) == 4
    assert config.identity(config.replace(mine, **{"own.file": "/there.py"})) == config.identity(mine)


def test_identity_does_not_drift() -> None:
    # Finished trials are found again by it: a change here makes every recorded trial run anew.
    # Raise RESULTS_VERSION for that, on purpose, where numbers change.
    assert config.identity(recipes.embedded) == "dbc87c7798f9"


def test_the_difference_of_two_recipes_leads_from_one_to_the_other() -> None:
    one, other = recipes.embedded, recipes.kinetics400_clip_b16
    fields = config.difference(one, other)
    assert config.replace(one, **fields) == other
    assert "adapter.activation" not in fields
    assert config.difference(one, one) == {}


def test_an_unknown_recipe_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="did you mean ssv2_clip_b16"):
        recipes.get("ssv2_clip_b61")


def test_the_published_training_commands_are_followed_exactly() -> None:
    published = tomllib.loads(PAPER.read_text())["recipe"]
    for name, recipe in (("ssv2", recipes.ssv2_clip_b16), ("kinetics400", recipes.kinetics400_clip_b16)):
        command, optim, adapter = published[name], recipe.optim, recipe.adapter
        count = 12 * (2 if adapter.placement == "both" else 1)
        assert (adapter.placement, list(adapter.kernel_size)) == (command["placement"], command["kernel"])
        assert f"{count}x{adapter.bottleneck_width}" == command["adapters"]
        assert (recipe.data.num_frames, optim.epochs) == (command["frames"], command["epochs"])
        assert optim.warmup_epochs == command["warmup_epochs"]
        assert optim.global_batch == command["batch_per_gpu"] * command["gpus"]
        views = f"{recipe.data.test_temporal_views} temporal x {recipe.data.test_spatial_views} spatial"
        assert views == command["test_views"]
        assert (optim.base_lr, optim.weight_decay, optim.head_dropout) == (1e-3, 0.01, 0.5)
    ssv2, kinetics = recipes.ssv2_clip_b16.data, recipes.kinetics400_clip_b16.data
    assert (ssv2.sampling, ssv2.rand_augment, ssv2.random_resized_crop, ssv2.horizontal_flip) == (
        *("uniform", "rand-m7-n4-mstd0.5-inc1", (0.08, 1.0)),
        False,
    )
    assert (kinetics.sampling, kinetics.frame_stride, kinetics.short_side_jitter, kinetics.horizontal_flip) == (
        *("dense", 16, (1.0, 1.15)),
        True,
    )


@pytest.mark.parametrize("dataset", ["ssv2", "kinetics400", "epic_kitchens100"])
@pytest.mark.parametrize("backbone", ["clip_b16", "in21k_b16", "clip_l14"])
def test_every_data_set_and_backbone_has_a_recipe_for_8_16_and_32_frames(dataset: str, backbone: str) -> None:
    short, *longer = (recipes.get(f"{dataset}_{backbone}{suffix}") for suffix in ("", "_f16", "_f32"))
    assert [recipe.data.num_frames for recipe in (short, *longer)] == [8, 16, 32]
    assert {recipe.backbone for recipe in (short, *longer)} == {short.backbone}
    if short.data.sampling == "dense":
        assert {r.data.num_frames * r.data.frame_stride for r in (short, *longer)} == {128}


@pytest.mark.parametrize(
    ("message", "first", "last"), [("one", "one", "one"), ("\na\nb\n", "a", "b"), ("", "ValueError", "ValueError")]
)
def test_the_line_of_an_error_is_its_type_where_it_has_no_message(message: str, first: str, last: str) -> None:
    assert (first_line(ValueError(message)), last_line(ValueError(message))) == (first, last)
