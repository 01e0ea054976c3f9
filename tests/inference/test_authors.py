"""The authors' checkpoints converted to files of this package and back: equal logits and equal bits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from authors import authors_file, golden_backbone, golden_recipe, is_theirs
from golden import FILES, PLACEMENTS, Golden, assert_relative

from stadapter import config, recipes
from stadapter.commands.main import main
from stadapter.config import ConfigError, Recipe
from stadapter.inference import authors
from stadapter.inference.authors import our_names
from stadapter.model import model_file
from stadapter.model.build import build_model
from stadapter.model.model_file import Header, load

BOTH = next(file for file in FILES if "both" in file.stem)


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def golden(request: Any) -> Golden:
    return Golden(request.param)


def rounded(golden: Golden) -> torch.Tensor:
    """Return the golden model's logits with its backbone rounded to half precision, as in the authors' code."""
    model = golden.model()
    for parameter in model.vit.parameters():
        parameter.data = parameter.data.half().float()
    return model.forward_normalised(golden.input_BTCHW)


def test_a_float32_checkpoint_gives_the_authors_logits_and_its_recipe(golden: Golden, tmp_path: Path) -> None:
    file = authors_file(tmp_path / "theirs.pth", golden)
    model, recipe = authors.from_authors(file, golden_recipe())
    assert_relative(model.forward_normalised(golden.input_BTCHW), golden.tensors["logits"], "logits")
    c = golden.config
    blocks = tuple(range(c["layers"] - c["adapter_layers"], c["layers"]))
    expected = {
        "data.num_classes": c["num_classes"],
        "data.frame_size": c["input_resolution"],
        "adapter.bottleneck_width": c["adapter_width"],
        "adapter.kernel_size": c["adapter_kernel_size"],
        "adapter.placement": PLACEMENTS[c["adapter_pre_attn"], c["adapter_pre_mlp"]],
        "adapter.blocks": None if len(blocks) == c["layers"] else blocks,
    }
    assert recipe == config.replace(golden_recipe(), **expected)


def test_a_half_precision_backbone_loses_no_more_than_its_digits(golden: Golden, tmp_path: Path) -> None:
    file = authors_file(tmp_path / "theirs.pth", golden, half=True)
    authors.save_converted(tmp_path / "ours.safetensors", *authors.from_authors(file, golden_recipe()))
    model, _ = load(tmp_path / "ours.safetensors")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    logits = model.forward_normalised(golden.input_BTCHW)
    assert_relative(logits, rounded(golden), "logits")
    error = (logits - golden.tensors["logits"]).abs().max() / golden.tensors["logits"].abs().max()
    assert error < 2e-3  # half precision has 11 bits


@pytest.mark.parametrize("half", [False, True], ids=["float32", "half"])
def test_back_in_the_authors_layout_every_bit_is_theirs(golden: Golden, tmp_path: Path, half: bool) -> None:
    theirs = authors_file(tmp_path / "theirs.pth", golden, half=half)
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.pth"
    authors.save_converted(ours, *authors.from_authors(theirs, golden_recipe()))
    assert authors.to_authors(ours, back) == (torch.float16 if half else torch.float32)
    before, after = (torch.load(file, weights_only=True)["model"] for file in (theirs, back))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


def test_a_checkpoint_without_its_backbone_takes_it_as_their_code_does(golden: Golden, tmp_path: Path) -> None:
    clip = tmp_path / "clip.pt"
    torch.save({name: tensor for name, tensor in golden.state.items() if not is_theirs(name)}, clip)
    file = authors_file(tmp_path / "theirs.pth", golden, backbone=False)
    recipe = config.replace(golden_recipe(), **{"data.frame_size": 32})
    model, recipe = authors.from_authors(file, recipe, weights_file=clip)
    assert_relative(model.forward_normalised(golden.input_BTCHW), rounded(golden), "logits")
    assert len(recipe.backbone.weights) == 64


def published(recipe: Recipe) -> dict[str, torch.Tensor]:
    """Return the trained tensors of the authors' model for this recipe, without values."""
    c, state = recipe.adapter, {}
    places = [
        place
        for place, fits in {"before": "before_mhsa", "after": "after_mhsa"}.items()
        if c.placement in (fits, "both")
    ]
    for place in places:
        for block in range(12):
            key = f"transformer.resblocks.{block}.adapter_pre_{'attn' if place == 'before' else 'mlp'}"
            state[f"{key}.conv.weight"] = torch.empty(c.bottleneck_width, 1, *c.kernel_size, device="meta")
    return state | {"fc.weight": torch.empty(recipe.data.num_classes, 768, device="meta")}


@pytest.mark.parametrize("recipe", [recipes.ssv2_clip_b16, recipes.kinetics400_clip_b16], ids=lambda r: r.name)
def test_the_published_layouts_are_the_authors_recipes(recipe: Recipe) -> None:
    assert authors.recipe_of(our_names(published(recipe)), None, "theirs.pth") == recipe


# --- refusals


def refuse_reading(tmp_path: Path, why: str, base: Recipe | None, change: Any) -> None:
    golden = Golden(BOTH)
    golden.state = copy.copy(golden.state)
    change(golden.state)
    with pytest.raises(ConfigError, match=why) as refused:
        authors.from_authors(authors_file(tmp_path / "theirs.pth", golden), base)
    assert "\n" not in str(refused.value)


def test_checkpoints_of_other_models_are_refused(tmp_path: Path) -> None:
    def without(word: str) -> Any:
        return lambda state: [state.pop(name) for name in list(state) if word in name]

    base = golden_recipe()
    refuse_reading(tmp_path, "has no adapters", base, without("adapter"))
    refuse_reading(tmp_path, r"has no head \(fc\)", base, without("fc.weight"))
    refuse_reading(tmp_path, "has 5 classes and width 48", None, without("nothing"))
    refuse_reading(
        tmp_path, r"before attention in blocks \[0, 1, 2\] and after it in", base, without("0.adapter_pre_mlp")
    )
    refuse_reading(tmp_path, "lacks vit.blocks.1.fc1.weight", base, without("1.mlp.c_fc.weight"))
    refuse_reading(
        tmp_path, "and has vit.text that the model does not take", base, lambda state: state.update(text=torch.zeros(1))
    )
    narrow = {"transformer.resblocks.1.adapter_pre_mlp.fc1.bias": torch.zeros(7)}
    refuse_reading(tmp_path, r"after.1.down.bias is \[7\]", base, lambda state: state.update(narrow))
    refuse_reading(tmp_path, "is not CLIP's transformer with QuickGELU", recipes.embedded, without("nothing"))


@pytest.mark.filterwarnings("ignore:the adapter behind the attention of the last block")
@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"adapter.activation": "gelu"}, "adapter.activation = gelu"),
        ({"adapter.placement": "parallel"}, "adapter.placement = parallel"),
        ({"adapter.blocks": (0, 1)}, r"adapter.blocks = \(0, 1\)"),
        ({"strategy": "linear_probe"}, "strategy = linear_probe"),
        ({"train_final_norm": True}, "train_final_norm = True"),
    ],
)
def test_models_that_the_authors_code_does_not_have_are_refused(
    tmp_path: Path, fields: dict[str, Any], why: str
) -> None:
    plain = {"data.frame_size": 32, "backbone.weights": "seed:0", "adapter.placement": "before_mhsa"}
    recipe = config.replace(golden_recipe(), **plain | fields)
    model_file.write(tmp_path / "ours.safetensors", build_model(recipe).state_dict(), Header(recipe))
    with pytest.raises(ConfigError, match=why):
        authors.to_authors(tmp_path / "ours.safetensors", tmp_path / "theirs.pth")
    assert not (tmp_path / "theirs.pth").exists()


# --- as it is typed


def test_a_checkpoint_is_converted_tested_and_converted_back(tmp_path: Path, clip_folder: Path, capsys: Any) -> None:
    theirs, ours = authors_file(tmp_path / "theirs.pth", Golden(BOTH), half=True), tmp_path / "new" / "ours.safetensors"
    root = tmp_path / "data"
    root.mkdir()
    clips = sorted(clip_folder.rglob("val/*/*.mp4"))
    for name in ("train.txt", "val.txt"):
        (root / name).write_text("".join(f"{clip} {number % 5}\n" for number, clip in enumerate(clips)))
    flags = ["--recipe", "ssv2_clip_b16", "--set", f"backbone.name={golden_backbone()}", "--set", "data.dataset=list"]
    assert main(["convert", str(theirs), "--output", str(ours), *flags, "--data-root", str(root)]) == 0
    said = capsys.readouterr().out
    assert "6 adapters of width 12, kernel 3x3x3, both in all blocks, 5 classes" in said
    assert main(["evaluate", str(ours), "--data-root", str(root)]) == 0
    said = capsys.readouterr().out
    assert f"{len(clips)} clips" in said and "top1 " in said and "bad_clips" not in said
    assert main(["convert", str(ours), "--output", str(tmp_path / "back.pth")]) == 0
    assert "backbone in float16" in capsys.readouterr().out
    for words, why in (
        ([theirs, "--output", tmp_path / "x.bin"], "must end in .safetensors or .pth"),
        ([ours, "--output", tmp_path / "x.pth", "--recipe", "embedded"], "holds its recipe"),
        ([tmp_path / "gone.pth", "--output", tmp_path / "x.safetensors"], "gone.pth: cannot be read"),
    ):
        assert main(["convert", *map(str, words)]) == 2
        assert why in capsys.readouterr().err
