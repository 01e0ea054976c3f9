"""Parameters and multiply-accumulates, counted from the architecture alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stadapter import recipes
from stadapter.config import AdapterConfig, BackboneConfig, DataConfig, OptimConfig, Recipe, Strategy, replace
from stadapter.model.build import build_model
from stadapter.model.classifier import VideoClassifier
from stadapter.model.cost import cost_of


def clip_b16(placement: str, num_frames: int = 8, num_classes: int = 400) -> Recipe:
    return Recipe(
        name="clip_b16",
        data=DataConfig(dataset="any", num_classes=num_classes, num_frames=num_frames),
        backbone=BackboneConfig("timm/vit_base_patch16_clip_224.openai"),
        adapter=AdapterConfig(bottleneck_width=384, kernel_size=(3, 1, 1), placement=placement),
        optim=OptimConfig(epochs=12, global_batch=256, base_lr=1e-3),
    )


@pytest.mark.parametrize(("placement", "params"), [("before_mhsa", 7_110_144), ("both", 14_220_288)])
def test_adapter_parameters_equal_the_papers(placement, params) -> None:
    assert cost_of(clip_b16(placement)).adapter_params == params


@pytest.mark.parametrize(("num_classes", "params"), [(400, 307_600), (174, 133_806)])
def test_head_parameters_equal_the_papers(num_classes, params) -> None:
    assert cost_of(clip_b16("both", num_classes=num_classes)).head_params == params


@pytest.mark.parametrize(
    ("placement", "num_frames", "gmacs_3_views"),
    [
        ("after_mhsa", 8, 454.9),
        ("after_mhsa", 16, 909.7),
        ("after_mhsa", 32, 1819.5),
        ("both", 8, 488.2),
        ("both", 16, 976.5),
        ("both", 32, 1952.9),
    ],
)
def test_macs_equal_the_published_ones(placement, num_frames, gmacs_3_views) -> None:
    cost = cost_of(clip_b16(placement, num_frames, num_classes=174 if placement == "both" else 400))
    assert 3 * cost.macs_per_view / 1e9 == pytest.approx(gmacs_3_views, rel=2e-3)


def test_dead_parameters_of_the_authors_kinetics_layout() -> None:
    cost = cost_of(clip_b16("after_mhsa"))
    assert cost.dead_params == 592_512
    assert cost.trainable_params == 7_110_144 - 592_512 + 307_600
    assert cost.tunable_params == 7_110_144 + 307_600  # the published 7.42 M


def test_total_is_backbone_and_adapters_and_head() -> None:
    cost = cost_of(clip_b16("before_mhsa"))
    assert cost.total_params == 85_799_424 + cost.adapter_params + cost.head_params


def test_without_adapters_only_the_backbone_and_the_head_are_counted() -> None:
    probe, adapted = (cost_of(replace(clip_b16("before_mhsa"), strategy=s)) for s in ("linear_probe", "st_adapter"))
    assert (probe.adapter_params, probe.dead_params, probe.trainable_params) == (0, 0, 307_600)
    per_adapter = 196 * (2 * 768 * 384 + 3 * 384)
    assert adapted.macs_per_view - probe.macs_per_view == 8 * 12 * per_adapter


def test_full_fine_tuning_trains_everything() -> None:
    cost = cost_of(replace(clip_b16("before_mhsa"), strategy="full"))
    assert cost.trainable_params == cost.total_params == 85_799_424 + 307_600


def test_macs_agree_with_counting_the_operations_of_the_image_model() -> None:
    recipe = replace(recipes.embedded, strategy="linear_probe")
    model = build_model(recipe, device="meta")
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model.vit(torch.empty(8, 3, 60, 60))
    head = 96 * 12
    assert cost_of(recipe).macs_per_view == counter.get_total_flops() // 2 + head


def counted_macs(run: Callable[[], object]) -> int:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


def test_what_a_strategy_adds_is_what_its_operations_count() -> None:
    """A view has 8 frames of 26 tokens; the reference counts the modules' operations on the meta device."""
    x_MSD = torch.empty(8, 26, 96, device="meta")
    base = cost_of(replace(recipes.embedded, strategy="linear_probe")).macs_per_view

    def added(strategy: Strategy) -> tuple[int, VideoClassifier]:
        recipe = replace(recipes.embedded, strategy=strategy)
        return cost_of(recipe).macs_per_view - base, build_model(recipe, device="meta")

    macs, model = added("temporal")
    assert macs == counted_macs(lambda: model.temporal(torch.empty(1, 8, 96)))
    macs, model = added("attentional_pooling")
    # A query that is learned, not computed, costs nothing; all else is counted.
    assert macs == counted_macs(lambda: model.pool(x_MSD.unflatten(0, (1, 8))))
    macs, model = added("full_space_time")
    assert macs == counted_macs(lambda: [model.time(x_MSD, block) for block in range(6)])
    macs, model = added("adapter")
    assert macs == counted_macs(lambda: [adapter(x_MSD, 8) for adapter in model.adapters()])
    macs, model = added("lora")
    blocks = list(zip(model.vit.blocks, model.lora, strict=True))
    with_lora = counted_macs(lambda: [block.attend(x_MSD, change=lora) for block, lora in blocks])
    assert macs == with_lora - counted_macs(lambda: [block.attend(x_MSD) for block, _ in blocks])
    macs, model = added("prompt")

    def image_model(tokens: int) -> list[torch.Tensor]:
        x = torch.empty(8, tokens, 96)
        return [branch(x) for block in model.vit.blocks for branch in (block.attend, block.mlp)]

    assert macs == counted_macs(lambda: image_model(26 + 8)) - counted_macs(lambda: image_model(26))


@pytest.mark.parametrize("strategy", ["partial", "bitfit", "full"])
def test_what_adds_nothing_costs_what_the_image_model_costs(strategy) -> None:
    probe, other = (cost_of(replace(recipes.embedded, strategy=s)) for s in ("linear_probe", strategy))
    assert other.macs_per_view == probe.macs_per_view
    assert other.total_params == probe.total_params


@pytest.mark.parametrize(("placement", "adapters", "dead"), [("after_mlp", 12, 1), ("parallel", 12, 1)])
def test_the_last_adapter_behind_the_attention_is_dead(placement, adapters, dead) -> None:
    cost = cost_of(clip_b16(placement))
    assert cost.adapter_params == adapters * 592_512
    assert cost.dead_params == dead * 592_512
