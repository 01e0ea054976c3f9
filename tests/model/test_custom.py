"""Custom arms: adapters, strategies and placements from a file outside the package."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from stadapter import config
from stadapter.config import ConfigError, CustomCode, Recipe
from stadapter.model.build import build_model
from stadapter.model.classifier import VideoClassifier
from stadapter.model.cost import cost_of
from stadapter.model.custom import custom_adapter, custom_model, load
from stadapter.model.state import trainable_parameters
from stadapter.training.loop import train
from stadapter.training.options import TrainOptions
from stadapter.trials import files, record

IDEAS = Path(__file__).parents[2] / "docs" / "own_idea"


def module_of(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def attention() -> Any:
    return module_of(IDEAS / "temporal_attention.py")


@pytest.fixture(scope="module")
def ideas() -> Any:
    return module_of(IDEAS / "biases_and_beside_mlp.py")


@pytest.fixture
def recipe(tiny_recipe: Recipe, attention: Any) -> Recipe:
    """Return the tiny recipe with attention over time in its bottlenecks."""
    return config.replace(tiny_recipe, **custom_adapter(attention.TemporalAttentionAdapter))


def written(path: Path, code: str) -> Any:
    path.write_text(textwrap.dedent(code))
    return module_of(path)


def clips(recipe: Recipe, count: int = 2) -> torch.Tensor:
    side = recipe.data.frame_size
    shape = (count, recipe.data.num_frames, 3, side, side)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_a_custom_adapter_takes_the_place_of_every_st_adapter(recipe: Recipe, attention: Any) -> None:
    model = build_model(recipe)
    assert list(model.before) == ["4", "5"]
    assert [type(adapter).__name__ for adapter in model.adapters()] == ["TemporalAttentionAdapter"] * 2
    trained = trainable_parameters(model)
    assert {name.split(".")[0] for name in trained} == {"before", "head", "vit"}  # of the backbone, the final norm
    assert all(name.startswith(("before.", "head.", "vit.norm.")) for name in trained)


def test_a_fresh_custom_adapter_leaves_the_backbone_as_it_was(recipe: Recipe) -> None:
    plain = build_model(
        config.replace(recipe, strategy="linear_probe", **{"own.file": "", "own.sha256": "", "own.adapter": ""})
    )
    torch.testing.assert_close(build_model(recipe)(clips(recipe)), plain(clips(recipe)), rtol=1e-5, atol=1e-5)


def test_attention_over_time_tells_a_clip_from_its_reversal_once_it_has_learned(recipe: Recipe) -> None:
    model = build_model(recipe)
    pixels = clips(recipe)
    torch.testing.assert_close(model(pixels), model(pixels.flip(1)), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for adapter in model.adapters():
            adapter.up.weight.normal_(generator=torch.Generator().manual_seed(1))
    assert (model(pixels) - model(pixels.flip(1))).abs().max() > 1e-2


def test_the_macs_of_a_custom_adapter_are_counted_by_running_it(recipe: Recipe, tiny_recipe: Recipe) -> None:
    C, T = 8, recipe.data.num_frames
    model = build_model(recipe, device="meta")
    D, N = model.width, model.vit.shape.num_patches
    one = T * N * (2 * D * C + 3 * C * C + 2 * T * C)  # down, up; query, key, value; scores and their product
    without = cost_of(config.replace(tiny_recipe, strategy="linear_probe")).macs_per_view
    assert cost_of(recipe).macs_per_view == without + 2 * one


def test_the_identity_of_a_custom_arm_is_its_code_and_not_its_place(tmp_path: Path, tiny_recipe: Recipe) -> None:
    code = "class Mine:\n    pass\n"
    (tmp_path / "elsewhere").mkdir()
    here = custom_adapter(written(tmp_path / "mine.py", code).Mine)
    there = custom_adapter(written(tmp_path / "elsewhere" / "mine.py", code).Mine)
    changed = custom_adapter(written(tmp_path / "changed.py", code + "# more\n").Mine)
    one, same, other = (config.identity(config.replace(tiny_recipe, **f)) for f in (here, there, changed))
    assert one == same != other


def test_a_run_folder_of_a_custom_arm_goes_on_after_its_file_has_moved(tmp_path: Path, recipe: Recipe) -> None:
    record.prepare_folder(tmp_path, recipe)
    assert record.check_config(tmp_path, config.replace(recipe, **{"own.file": "/moved/temporal_attention.py"}))
    with pytest.raises(ConfigError, match=r"own\.sha256"):
        record.check_config(tmp_path, config.replace(recipe, **{"own.sha256": "0" * 64}))


def test_a_run_folder_from_before_there_was_custom_code_is_still_known(tmp_path: Path, tiny_recipe: Recipe) -> None:
    fields = {path: value for path, value in config.flatten(tiny_recipe).items() if not path.startswith("own.")}
    files.write_json(tmp_path / record.CONFIG, fields)
    assert record.check_config(tmp_path, tiny_recipe)


def test_custom_code_that_changed_since_or_is_gone_is_refused(tmp_path: Path, tiny_recipe: Recipe) -> None:
    path = tmp_path / "changing.py"
    fields = custom_adapter(written(path, "class Changing:\n    pass\n").Changing)
    own = config.replace(tiny_recipe, **fields).own
    path.write_text("class Changing:\n    x = 1\n")
    with pytest.raises(ConfigError, match="has changed since this trial was described"):
        load(own, "Changing")
    path.unlink()
    with pytest.raises(ConfigError, match="is not there; on a cluster"):
        load(own, "Changing")


def test_code_that_a_trial_could_not_import_is_refused() -> None:
    class Local:
        pass

    with pytest.raises(ConfigError, match="must stand at the top of a Python file"):
        custom_adapter(Local)


@pytest.mark.parametrize("fields", [{"file": "mine.py"}, {"adapter": "Mine"}, {"sha256": "0", "model": "build"}])
def test_half_a_description_of_custom_code_is_refused(fields: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="belong together"):
        CustomCode(**fields)


def test_a_custom_strategy_trains_what_it_says(tiny_recipe: Recipe, ideas: Any) -> None:
    mine = trainable_parameters(build_model(config.replace(tiny_recipe, **custom_model(ideas.with_biases))))
    plain = trainable_parameters(build_model(tiny_recipe))
    added = mine.keys() - plain.keys()
    assert added and all(name.startswith("vit.") and name.endswith("bias") for name in added)


def test_every_parameter_that_a_custom_model_trains_gets_a_gradient(tiny_recipe: Recipe, ideas: Any) -> None:
    for fields in (
        custom_model(ideas.with_biases),
        custom_model(ideas.beside_mlp) | {"adapter.placement": "after_mhsa", "adapter.blocks": (2, 3)},
    ):
        model = build_model(config.replace(tiny_recipe, **fields))
        with torch.no_grad():
            for adapter in model.adapters():
                adapter.conv.weight.normal_()
        model(clips(tiny_recipe)).square().sum().backward()
        for name, parameter in trainable_parameters(model).items():
            assert parameter.grad is not None, name


def test_a_custom_placement_computes_what_it_says(tiny_recipe: Recipe, ideas: Any) -> None:
    fields = custom_model(ideas.beside_mlp) | {"adapter.placement": "after_mhsa", "adapter.blocks": (1, 3)}
    model = build_model(config.replace(tiny_recipe, **fields))
    with torch.no_grad():
        for adapter in model.adapters():
            adapter.conv.weight.normal_(generator=torch.Generator().manual_seed(2))
    pixels, T = clips(tiny_recipe), tiny_recipe.data.num_frames
    x = model.vit.embed(((pixels / 255 - model.mean_311) / model.std_311).flatten(0, 1))
    for index, block in enumerate(model.vit.blocks):
        x = x + block.attend(x)
        branch = model.after[str(index)](x, T) - x if str(index) in model.after else 0
        x = x + block.mlp(x) + branch
    expected = model.head(model.vit.norm(x[:, 0].unflatten(0, (-1, T)).mean(1)))
    torch.testing.assert_close(model(pixels), expected, rtol=1e-4, atol=1e-5)


def test_a_custom_model_must_be_a_classifier_and_train_something(tmp_path: Path, tiny_recipe: Recipe) -> None:
    module = written(
        tmp_path / "wrong.py",
        """
        from stadapter.model.build import classifier

        def nothing(recipe, vit, mean, std):
            return None

        def frozen(recipe, vit, mean, std):
            return classifier(recipe, vit, mean, std).requires_grad_(False)
        """,
    )
    with pytest.raises(ConfigError, match="returned NoneType, not a stadapter"):
        build_model(config.replace(tiny_recipe, **custom_model(module.nothing)))
    with pytest.raises(ConfigError, match="nothing in it is trained"):
        build_model(config.replace(tiny_recipe, **custom_model(module.frozen)))


OF_BEFORE = """
import torch
from torch import Tensor, nn

from stadapter.adapter import STAdapter
from stadapter.config import AdapterConfig, Recipe
from stadapter.model import Triple, VideoClassifier, classifier
from stadapter.own import own_adapter
from stadapter.vit import ViT


class Mine(STAdapter):
    def __init__(self, width: int, adapter: AdapterConfig) -> None:
        super().__init__(width, adapter.bottleneck_width)


class WithTeacher(VideoClassifier):
    def __init__(self, *arguments, **keywords) -> None:
        super().__init__(*arguments, **keywords)
        self.teacher = nn.Linear(2, 2)


def with_teacher(recipe: Recipe, vit: ViT, mean: Triple, std: Triple) -> VideoClassifier:
    return classifier(recipe, vit, mean, std, WithTeacher)
"""


def test_a_custom_file_of_the_first_layout_still_loads(tmp_path: Path, tiny_recipe: Recipe) -> None:
    path = tmp_path / "of_before.py"
    path.write_text(OF_BEFORE)
    described = {"own.file": str(path), "own.sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    code = (
        "import json, sys\n"
        "from stadapter import config, recipes\n"
        "from stadapter.model.build import build_model\n"
        "fields = json.loads(sys.argv[1])\n"
        "for name in ({'own.adapter': 'Mine'}, {'own.model': 'with_teacher'}):\n"
        "    model = build_model(config.replace(recipes.embedded, **fields, **name))\n"
        "    print(type(model).__name__, type(model.adapters()[0]).__name__)\n"
    )  # in a process of its own, where nothing else has imported the old names
    done = subprocess.run([sys.executable, "-c", code, json.dumps(described)], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["VideoClassifier Mine", "WithTeacher STAdapter"], done.stderr


def test_parts_that_only_a_derived_class_knows_stay_frozen(tmp_path: Path, tiny_recipe: Recipe) -> None:
    module = written(
        tmp_path / "taught.py",
        """
        from torch import nn
        from stadapter.model.build import classifier
        from stadapter.model.classifier import VideoClassifier

        class WithTeacher(VideoClassifier):
            def __init__(self, *arguments, **keywords):
                super().__init__(*arguments, **keywords)
                self.teacher = nn.Linear(2, 2)

        def with_teacher(recipe, vit, mean, std):
            return classifier(recipe, vit, mean, std, WithTeacher)
        """,
    )
    model = build_model(config.replace(tiny_recipe, **custom_model(module.with_teacher)))
    assert trainable_parameters(model).keys() == trainable_parameters(build_model(tiny_recipe)).keys()


def test_what_cls_gathers_in_a_custom_adapter_reaches_the_logits(tmp_path: Path, tiny_recipe: Recipe) -> None:
    """After the last attention only CLS is computed, unless an adapter there may change CLS from the patches."""
    module = written(
        tmp_path / "gathering.py",
        """
        import torch
        from torch import nn

        class Gathering(nn.Module):
            adapts_cls = True

            def __init__(self, width, adapter):
                super().__init__()
                self.scale = nn.Parameter(torch.ones(width))

            def forward(self, x_MSD, num_frames, onto_MSD=None):
                onto_MSD = x_MSD if onto_MSD is None else onto_MSD
                mean_M1D = x_MSD[:, 1:].mean(1, keepdim=True) * self.scale
                return torch.cat([onto_MSD[:, :1] + mean_M1D, onto_MSD[:, 1:]], dim=1)
        """,
    )
    fields = custom_adapter(module.Gathering) | {"adapter.placement": "after_mlp", "adapter.blocks": (5,)}
    model = build_model(config.replace(tiny_recipe, **fields))
    assert isinstance(model, VideoClassifier) and not model.dead_adapters()
    model(clips(tiny_recipe)).sum().backward()
    gradient = model.adapters()[0].scale.grad
    assert gradient is not None and gradient.isfinite().all() and gradient.abs().max() > 0


def test_a_custom_arm_trains_in_a_plain_process(recipe: Recipe, clip_folder: Path, tmp_path: Path) -> None:
    result = train(recipe, tmp_path, TrainOptions(data_root=clip_folder))
    assert result.recipe["own.adapter"] == "TemporalAttentionAdapter"
