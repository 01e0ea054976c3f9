"""The arms that the scripts in experiments/ make of words and recipes. cluster/test_sweeps.py has whole sweeps."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stadapter import recipes
from stadapter.config import ConfigError, Recipe, replace
from stadapter.model.cost import cost_of
from stadapter.training.loop import train
from stadapter.training.options import TrainOptions
from stadapter.trials.sweep import Arm, make_sweep

FOLDER = Path(__file__).parents[2] / "experiments"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem.startswith(("ablate_", "compare_")))
PAPER = (recipes.ssv2_clip_b16, recipes.kinetics400_clip_b16)
LAYOUTS = (*PAPER, recipes.epic_kitchens100_clip_b16)


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def default_arms(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Recipe], list[Arm]]:
    """Return the arms that a script runs on a recipe, taken from its call of the command line."""

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
        ("ablate_frames", "16", {"data.num_frames": 16, "data.frame_stride": 1}),
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


# --- every script on small data in the layouts of the paper's data sets


@pytest.fixture(scope="module")
def layouts(clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a few clips of two classes in the layouts of Something-Something-v2, Kinetics-400 and EPIC-Kitchens-100.

    EPIC's clips are of two verbs and three nouns.
    """
    ssv2, kinetics = tmp_path_factory.mktemp("ssv2"), tmp_path_factory.mktemp("kinetics")
    epic = tmp_path_factory.mktemp("epic")
    (epic / "videos").mkdir()
    (ssv2 / "videos").mkdir()
    templates = {"Moving [something] right": "0", "Moving [something] left": "1"}
    (ssv2 / "labels.json").write_text(
        json.dumps({name.replace("[", "").replace("]", ""): n for name, n in templates.items()})
    )
    for split, count in (("train", 4), ("validation", 2)):
        entries, rows = [], ["label,youtube_id,time_start,time_end,split"]
        actions = ["narration_id,participant_id,video_id,start_frame,stop_frame,verb_class,noun_class"]
        folder = clip_folder / split[:5].replace("valid", "val")
        for number in range(count):
            name, clip = list(templates)[number % 2], sorted(folder.glob("*/*.mp4"))[number]
            entries.append({"id": f"{split}{number}", "template": name, "label": name})
            (ssv2 / "videos" / f"{split}{number}.mp4").symlink_to(clip)
            actions.append(
                f"P01_{split}_{number},P01,P01_{split},{16 * number + 1},{16 * number + 16},{number % 2},{number % 3}"
            )
            (epic / "videos" / f"P01_{split}_{number}.mp4").symlink_to(clip)
            rows.append(f"class {number % 2},{split}{number},0,10,{split}")
            (kinetics / folder.name).mkdir(exist_ok=True)
            (kinetics / folder.name / f"{split}{number}_000000_000010.mp4").symlink_to(clip)
        (ssv2 / f"{split}.json").write_text(json.dumps(entries))
        (kinetics / f"{folder.name}.csv").write_text("\n".join(rows) + "\n")
        (epic / f"EPIC_100_{split}.csv").write_text("\n".join(actions) + "\n")
    return {"ssv2": ssv2, "kinetics400": kinetics, "epic_kitchens100": epic}


SMALL = {
    "data.num_frames": 2,
    "data.frame_size": 60,
    "backbone.name": "embedded",
    "backbone.weights": "seed:0",
    "adapter.bottleneck_width": 8,
    "optim.epochs": 1,
    "optim.warmup_epochs": 0.5,
    "optim.global_batch": 4,
    "optim.precision": "float32",
}
WORDS = {
    "ablate_activation": ("released", "gelu+cls+default-init"),
    "ablate_depth": ("last1", "0,2"),
    "ablate_frames": ("2", "4"),
    "ablate_kernel": ("1", "3x3x3"),
    "ablate_placement": ("before_mhsa", "parallel"),
    "ablate_width": ("/2", "x1"),
    "compare_pretraining": ("random",),  # the other weights are downloaded or not small
    "compare_strategies": ("st_adapter", "full_space_time"),
}


@pytest.mark.parametrize("recipe", LAYOUTS, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_trains_on_the_layout_of_the_recipes_data(
    name: str, recipe: Recipe, layouts: dict[str, Path], tmp_path: Path
) -> None:
    groups = recipe.data.label_groups and (2, 3)
    small = replace(recipe, **SMALL | {"data.label_groups": groups, "data.num_classes": sum(groups or (2,))})
    sweep = make_sweep(name, "?", small, [script(name).make_arm(small, word) for word in WORDS[name]], seeds=1)
    for trial in sweep.trials:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about dead adapters
            result = train(trial.recipe, tmp_path / trial.id, TrainOptions(data_root=layouts[recipe.data.dataset]))
        assert result.recipe["data.dataset"] == recipe.data.dataset
        assert 0 <= result.metrics["top1"] <= 100
        assert ("verb_top1" in result.metrics) == (recipe.data.label_groups is not None)
