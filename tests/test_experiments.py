"""The scripts in experiments/: the arms they make of words and recipes. What a sweep then does is in test_sweep."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stadapter import recipes
from stadapter.ablation.trial import Arm, make_sweep
from stadapter.config import ConfigError, Recipe, replace
from stadapter.cost import cost_of

FOLDER = Path(__file__).parent.parent / "experiments"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem.startswith(("ablate_", "compare_")))
PAPER = (recipes.ssv2_clip_b16, recipes.kinetics400_clip_b16)


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def default_arms(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Recipe], list[Arm]]:
    """The arms that a script runs on a recipe, taken from what it gives to the command line."""

    def arms(name: str, recipe: Recipe) -> list[Arm]:
        given: dict[str, Any] = {}
        monkeypatch.setattr("stadapter.ablation.main", lambda doc, **others: given.update(others))
        source = (FOLDER / f"{name}.py").read_text()
        exec(compile(source, f"{name}.py", "exec"), {"__name__": "__main__"})
        values = given["values"](recipe) if callable(given["values"]) else given["values"]
        return [given["make_arm"](recipe, value) for value in values]

    return arms


def test_every_question_of_the_paper_has_its_script() -> None:
    assert SCRIPTS == [
        "ablate_activation",
        "ablate_depth",
        "ablate_frames",
        "ablate_kernel",
        "ablate_placement",
        "ablate_width",
        "compare_pretraining",
        "compare_strategies",
    ]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_short_and_states_question_cost_command_and_expectation(name: str) -> None:
    source = (FOLDER / f"{name}.py").read_text()
    assert len(source.splitlines()) < 60
    doc = script(name).__doc__
    assert "?" in doc.split("\n\n")[0]
    for what in ("\n\nExpected: ", "\n\nCost: ", "ssv2_clip_b16", f"    python experiments/{name}.py\n"):
        assert what in doc, what


@pytest.mark.parametrize("recipe", [recipes.embedded, recipes.embedded_digits, *PAPER], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("name", SCRIPTS)
def test_default_arms_are_models_that_can_be_built_and_differ(name: str, recipe: Recipe, default_arms: Any) -> None:
    sweep = make_sweep(name, "?", recipe, default_arms(name, recipe), seeds=1)  # refuses two arms that are the same
    assert len(sweep.trials) > 1
    for trial in sweep.trials:
        assert cost_of(trial.recipe).trainable_params > 0


@pytest.mark.parametrize("recipe", [recipes.embedded, recipes.kinetics400_clip_b16], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("name", SCRIPTS)
def test_an_arm_costs_what_the_recipe_costs(name: str, recipe: Recipe, default_arms: Any) -> None:
    """Every comparison has the recipe itself among its arms."""
    costs = [cost_of(replace(recipe, **arm.fields)) for arm in default_arms(name, recipe)]
    assert cost_of(recipe) in costs


@pytest.mark.parametrize(
    ("name", "value", "fields"),
    [
        ("ablate_kernel", "5", {"adapter.kernel_size": [5, 3, 3]}),
        ("ablate_kernel", "1x3x3", {"adapter.kernel_size": [1, 3, 3]}),
        ("ablate_width", "/4", {"adapter.bottleneck_width": 12}),
        ("ablate_placement", "parallel", {"adapter.placement": "parallel"}),
        ("ablate_depth", "last2", {"adapter.blocks": (4, 5)}),
        ("ablate_depth", "first1", {"adapter.blocks": (0,)}),
        ("ablate_depth", "every2", {"adapter.blocks": (1, 3, 5)}),
        ("ablate_depth", "every3", {"adapter.blocks": (2, 5)}),
        ("ablate_depth", "0,2,4", {"adapter.blocks": (0, 2, 4)}),
        ("ablate_depth", "3", {"adapter.blocks": (3,)}),
        ("ablate_frames", "16", {"data.num_frames": 16}),
        (
            "ablate_activation",
            "gelu+cls",
            {"adapter.activation": "gelu", "adapter.adapt_cls": True, "adapter.zero_init_conv": True},
        ),
        ("compare_pretraining", "random", {"backbone.name": "embedded", "backbone.weights": "seed:0"}),
        ("compare_strategies", "linear_probe", {"strategy": "linear_probe", "train_final_norm": False}),
        ("compare_strategies", "st_adapter", {}),
    ],
)
def test_a_word_becomes_its_arm(name: str, value: str, fields: dict[str, Any]) -> None:
    assert script(name).make_arm(recipes.embedded, value).fields == fields


def test_more_frames_sampled_densely_cover_the_same_stretch() -> None:
    recipe = recipes.kinetics400_clip_b16
    for value in ("8", "16", "32"):
        fields = script("ablate_frames").make_arm(recipe, value).fields
        assert fields["data.num_frames"] * fields["data.frame_stride"] == 8 * 16


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ablate_kernel", "three", "expected a temporal extent"),
        ("ablate_width", "wide", "expected a number of channels"),
        ("ablate_depth", "middle", "expected last3, first3, every2, all"),
        ("ablate_depth", "last7", "has 6 blocks"),
        ("ablate_frames", "0", "expected a number of frames"),
        ("ablate_activation", "relu", "'relu' is none of released, gelu, cls, default-init"),
        ("compare_strategies", "magic", "must be one of linear_probe, "),
    ],
)
def test_a_word_that_means_nothing_is_answered_in_one_line(name: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        script(name).make_arm(recipes.embedded, value)
    assert "\n" not in str(caught.value)


def test_one_weights_file_cannot_serve_two_pretrainings() -> None:
    recipe = replace(recipes.embedded, **{"backbone.weights": "0" * 64})
    with pytest.raises(ConfigError, match="--weights"):
        script("compare_pretraining").make_arm(recipe, "random")
