"""The tests printed under the tables, against scipy and published worked examples."""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from pathlib import Path

import pytest
from scipy import stats

from stadapter import config, recipes
from stadapter.config import Placement
from stadapter.results.paired_tests import compare, holm, summarise
from stadapter.results.paper import PAPER, published

A = {0: 71.2, 1: 73.9, 2: 70.1, 3: 74.4}
B = {0: 70.0, 1: 71.1, 2: 69.9, 3: 72.0}


def test_the_interval_is_scipys() -> None:
    values = list(A.values())
    summary = summarise(values)
    assert summary is not None
    low, high = stats.t.interval(0.95, len(values) - 1, loc=summary.mean, scale=stats.sem(values))
    assert (summary.low, summary.high) == pytest.approx((low, high))
    assert summary.sd == pytest.approx(stats.tstd(values))
    assert (summary.n, summary.mean) == (4, pytest.approx(72.4))


def test_two_values_have_the_interval_of_one_degree_of_freedom() -> None:
    summary = summarise([1.0, 3.0])
    assert summary is not None
    assert (summary.low, summary.high) == pytest.approx((2 - 12.7062, 2 + 12.7062), abs=1e-3)  # t tables: 12.706


def test_one_value_has_a_mean_and_nothing_else() -> None:
    summary = summarise([5.0])
    assert summary is not None
    assert (summary.mean, summary.sd, summary.low, summary.high) == (5.0, None, None, None)
    assert summarise([]) is None


def test_the_difference_is_paired_by_seed() -> None:
    difference = compare(A, B)
    assert difference is not None
    assert difference.p == pytest.approx(stats.ttest_rel(list(A.values()), list(B.values())).pvalue)
    interval = stats.ttest_rel(list(A.values()), list(B.values())).confidence_interval(0.95)
    assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high))
    shuffled = {seed: A[seed] for seed in (3, 1, 0, 2)}
    assert compare(shuffled, B) == difference


def test_a_seed_that_only_one_arm_has_is_left_out_of_the_difference() -> None:
    difference = compare(A, {seed: B[seed] for seed in (1, 3)})
    assert difference is not None
    assert difference.n == 2
    assert difference.mean == pytest.approx((2.8 + 2.4) / 2)
    assert compare({0: 1.0}, {1: 1.0}) is None


def test_no_p_value_without_spread_or_with_one_pair() -> None:
    one, equal = compare({0: 2.0}, {0: 1.0}), compare({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0})
    assert one is not None and equal is not None
    assert one.p is None and equal.p is None
    assert (equal.mean, equal.sd, equal.low) == (1.0, 0.0, None)
    flat = summarise([42.9, 42.9])
    assert flat is not None and (flat.sd, flat.low, flat.high) == (0.0, None, None)


def test_holms_correction_on_a_worked_example() -> None:
    # Holm (1979) as tabulated in many textbooks: sorted p times 4, 3, 2, 1, made monotone.
    assert holm([0.01, 0.04, 0.03, 0.005], 4) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8], 2) == [1.0, 1.0]
    assert holm([], 0) == []


def test_a_comparison_without_a_p_value_counts_in_the_correction() -> None:
    assert holm([0.01, None, 0.04], 3) == [pytest.approx(0.03), None, pytest.approx(0.08)]


def test_published_values_appear_for_exactly_their_configuration_with_their_status() -> None:
    verified = published(recipes.kinetics400_clip_b16)
    assert verified is not None
    assert (verified.top1, verified.status, str(verified)) == (82.0, "verified", "82.0 ✓")
    assert published(config.replace(recipes.kinetics400_clip_b16, **{"adapter.bottleneck_width": 192})) is None
    assert published(recipes.embedded) is None


def test_an_unverified_value_is_marked_and_needs_the_right_number_of_parameters() -> None:
    twelve = config.replace(recipes.ssv2_clip_b16, **{"adapter.placement": "before_mhsa"})
    found = published(twelve, 7_110_144 + 133_806)
    assert found is not None
    assert (str(found), found.status) == ("66.3 ?", "unverified")
    assert published(twelve, 14_000_000) is None
    assert published(twelve) is None
    for kernel in (1, 5, 7):  # the arms of the kernel ablation differ by less than the rounding of 7.2 M
        assert published(config.replace(twelve, **{"adapter.kernel_size": (kernel, 1, 1)}), 7_243_950) is None
    other = dataclasses.replace(twelve, strategy="linear_probe")
    assert published(other, 7_200_000) is None


PAPER_WITH_HOLES = """
[recipe.kinetics400]
placement = "after_mhsa"
kernel = [3, 1, 1]
[[accuracy]]  # nothing but a number
top1 = 99.0
status = "verified"
[[accuracy]]  # frames and views are not said, and no top-1
dataset = "kinetics400"
backbone = "clip_vit_b16"
status = "verified"
[[accuracy]]  # in all the right configuration, but only heard of
dataset = "kinetics400"
backbone = "clip_vit_b16"
adapters = "12x384"
frames = 8
views = "3x1"
top1 = 98.0
tuned_params_m = 7.4
source = "one talk"
status = "disputed"
[[accuracy]]  # no status
dataset = "kinetics400"
backbone = "clip_vit_b16"
frames = 32
top1 = 97.0
tuned_params_m = 7.4
"""


def test_a_row_with_missing_fields_fits_no_arm_and_one_of_another_status_is_unverified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "paper.toml").write_text(PAPER_WITH_HOLES)
    monkeypatch.setattr("stadapter.results.paper.PAPER", tmp_path / "paper.toml")
    recipe, params = recipes.kinetics400_clip_b16, 7_417_744
    assert published(recipe) is None
    disputed = published(recipe, params)
    assert disputed is not None and not disputed.is_verified
    assert (str(disputed), disputed.source) == ("98.0 ?", "one talk")
    assert published(recipes.ssv2_clip_b16, params) is None


def test_no_row_of_the_paper_that_is_unverified_is_printed_as_verified() -> None:
    rows = tomllib.loads(PAPER.read_text())["accuracy"]
    verified = {row["top1"] for row in rows if row["status"] == "verified"}
    for name in recipes.names():
        for placement in typing.get_args(Placement):
            recipe = config.replace(recipes.get(name), **{"adapter.placement": placement})
            for params in (None, 7_243_950, 7_200_000, 14_354_094):
                found = published(recipe, params)
                assert found is None or (str(found).endswith("✓") == (found.top1 in verified))


@pytest.mark.parametrize(
    "field", [{"optim.epochs": 5}, {"optim.base_lr": 1e-2}, {"data.rand_augment": None}, {"backbone.weights": "seed:0"}]
)
def test_a_published_value_stands_only_beside_its_whole_configuration(field: dict[str, object]) -> None:
    assert published(recipes.ssv2_clip_b16) is not None
    assert published(config.replace(recipes.ssv2_clip_b16, **field)) is None
