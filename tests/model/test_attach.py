"""Adapters in other libraries' vision transformers: the recipe's numbers, in a module that works as before."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from golden import FILES, PLACEMENTS, Golden, assert_relative
from open_clip.transformer import QuickGELU, Transformer
from open_clip.transformer import VisionTransformer as OpenClipTower
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

import stadapter
from stadapter import (
    STAdapter,
    adapter_state,
    add_st_adapters,
    clips_of,
    load_into,
    remove_st_adapters,
    save,
    set_num_frames,
)
from stadapter.backbone.hubs import _timm_shape
from stadapter.backbone.state_dicts import from_open_clip, from_timm
from stadapter.backbone.vit import ViT, VitShape
from stadapter.config import AdapterConfig, ConfigError
from stadapter.model.classifier import VideoClassifier
from stadapter.model.placement import PLACES

T, B, WIDTH, DEPTH = 4, 2, 32, 3
SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2}


class ResidualAttentionBlock(nn.Module):
    """A block with the parts and names of OpenAI's code, tokens first."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2)
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(WIDTH, 64), gelu=QuickGELU(), c_proj=nn.Linear(64, WIDTH)))
        self.ln_2 = nn.LayerNorm(WIDTH)

    def attention(self, x_SMD: Tensor) -> Tensor:
        return self.attn(x_SMD, x_SMD, x_SMD, need_weights=False)[0]

    def forward(self, x_SMD: Tensor) -> Tensor:
        x_SMD = x_SMD + self.attention(self.ln_1(x_SMD))
        return x_SMD + self.mlp(self.ln_2(x_SMD))


class OpenAITower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn(17, WIDTH))
        self.transformer: Any = nn.Module()
        self.transformer.resblocks = nn.Sequential(*(ResidualAttentionBlock() for _ in range(DEPTH)))
        self.ln_post = nn.LayerNorm(WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer.resblocks(x.transpose(0, 1)).transpose(0, 1)[:, 0])


def torchvision_vit() -> TorchvisionViT:
    vit = TorchvisionViT(32, 8, DEPTH, 2, WIDTH, 64)
    vit.heads = nn.Identity()  # it starts at zero
    return vit


def open_clip_tower(batch_first: bool = True) -> OpenClipTower:
    tower = OpenClipTower(32, 8, WIDTH, DEPTH, 2, 2.0, output_dim=WIDTH)
    if not batch_first:
        blocks = Transformer(WIDTH, DEPTH, 2, 2.0, batch_first=False)
        blocks.load_state_dict(tower.transformer.state_dict())
        tower.transformer = blocks
    return tower


MAKERS: dict[str, Any] = {
    "timm": lambda: VisionTransformer(**SIZES, num_classes=0),
    "timm, no class token": lambda: VisionTransformer(**SIZES, num_classes=0, class_token=False, global_pool="avg"),
    "timm, registers": lambda: VisionTransformer(**SIZES, num_classes=0, reg_tokens=3),
    "timm, distilled": lambda: VisionTransformerDistilled(**SIZES, num_classes=0),
    "timm, not square": lambda: VisionTransformer(**SIZES | {"img_size": (32, 48)}, num_classes=0, init_values=0.1),
    "open_clip": open_clip_tower,
    "open_clip, tokens first": lambda: open_clip_tower(batch_first=False),
    "OpenAI": OpenAITower,
    "torchvision": torchvision_vit,
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MAKERS[name]().eval()


def images(name: str = "timm", frames: int = B * T) -> Tensor:
    return torch.randn(frames, 3, 32, 48 if "not square" in name else 32, generator=torch.Generator().manual_seed(1))


def randomise(module: nn.Module, std: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=std, generator=generator)


def adapted(name: str = "timm", **options: Any) -> nn.Module:
    vit = add_st_adapters(make(name), T, 8, **{"kernel_size": (3, 3, 3), "placement": "both"} | options)
    randomise(vit)
    return vit


def recipe_name(name: str) -> str:
    """Return `before.1.down.weight`, the name in the recipe's model, for `blocks.1.st_adapters.before.down.weight`."""
    block, place, rest = name.partition("blocks.")[2].replace("st_adapters.", "").split(".", 2)
    return f"{place}.{block}.{rest}"


# --- the same numbers


def recipes_model(vit: Any, library: str, adapter: AdapterConfig) -> VideoClassifier:
    """Return the recipe's model with the weights and adapters of a library's model."""
    if library == "timm":
        plain = remove_st_adapters(copy.deepcopy(vit))
        shape, state = _timm_shape(library, plain, quick_gelu=False), from_timm(plain.state_dict())
    else:
        shape = VitShape(32, 8, WIDTH, DEPTH, 2, 64, norm_eps=1e-5, pre_norm=True, patch_bias=False)
        state = from_open_clip(remove_st_adapters(copy.deepcopy(vit)).state_dict())
    backbone = ViT(shape)
    backbone.load_state_dict(state)
    model = VideoClassifier(backbone, 5, adapter)
    for name, tensor in adapter_state(vit).items():
        model.get_parameter(recipe_name(name)).data.copy_(tensor)
    return model.eval()


@pytest.mark.parametrize("placement", ["before_mhsa", "after_mhsa", "both", "after_mlp", "parallel"])
@pytest.mark.parametrize("library", ["timm", "open_clip", "open_clip, tokens first"])
def test_features_and_gradients_equal_the_recipes_model(library: str, placement: Any) -> None:
    vit: Any = adapted(library, placement=placement, blocks=(0, 1))
    adapter = AdapterConfig(8, (3, 3, 3), placement=placement, blocks=(0, 1))
    model = recipes_model(vit, library.partition(",")[0], adapter)
    vit.norm = vit.ln_post = nn.Identity()  # the recipe's averages over frames before the norm
    vit.proj = None
    theirs = model.head(model.vit.norm(vit(images()).unflatten(0, (B, T)).mean(1)))
    ours = model.forward_normalised(images().unflatten(0, (B, T)))
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    theirs.square().sum().backward()
    ours.square().sum().backward()
    trained = [(name, parameter) for name, parameter in vit.named_parameters() if parameter.requires_grad]
    assert len(trained) == 6 * len(model.adapters())
    for name, parameter in trained:
        expected = model.get_parameter(recipe_name(name)).grad
        assert parameter.grad is not None and expected is not None
        assert_relative(parameter.grad, expected, name)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_open_clip_with_adapters_equals_the_authors_model(file: Path) -> None:
    golden = Golden(file)
    c, classifier = golden.config, golden.model()
    tower: Any = OpenClipTower(
        c["input_resolution"], c["patch_size"], c["width"], c["layers"], c["heads"], 4.0, act_layer=QuickGELU
    )
    add_st_adapters(
        tower,
        golden.input_BTCHW.shape[1],
        c["adapter_width"],
        tuple(c["adapter_kernel_size"]),
        PLACEMENTS[c["adapter_pre_attn"], c["adapter_pre_mlp"]],  # type: ignore[arg-type]
        tuple(range(c["layers"] - c["adapter_layers"], c["layers"])),
    )
    adapters = {
        f"transformer.resblocks.{block}.st_adapters.{place}.{name}": tensor
        for place in PLACES
        for block, adapter in getattr(classifier, place).items()
        for name, tensor in adapter.state_dict().items()
    }
    backbone = {name: t for name, t in golden.state.items() if "adapter" not in name and not name.startswith("fc.")}
    tower.load_state_dict(backbone | adapters | {"proj": tower.proj.detach()})
    tower.ln_post, tower.proj = nn.Identity(), None
    features_BD = tower(golden.input_BTCHW.flatten(0, 1)).unflatten(0, golden.input_BTCHW.shape[:2]).mean(1)
    logits = classifier.head(classifier.vit.norm(features_BD))
    assert_relative(logits, golden.tensors["logits"], "logits")
    F.cross_entropy(logits, golden.tensors["labels"]).backward()
    for name, parameter in tower.named_parameters():
        if parameter.requires_grad:
            assert_relative(parameter.grad, golden.gradients[recipe_name(name)], name)


@pytest.mark.parametrize("name", MAKERS)
def test_fresh_adapters_change_nothing(name: str) -> None:
    vit = make(name)
    before = vit(images(name))
    after = add_st_adapters(vit, T, 8, (3, 3, 3), "both")(images(name))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MAKERS)
def test_frames_of_a_clip_see_each_other_and_no_other_clip(name: str) -> None:
    vit = adapted(name)
    base = images(name)
    changed = base.clone()
    changed[0] += 1  # the first frame of the first clip
    moved = (vit(changed) - vit(base)).abs().flatten(1).amax(1)
    assert (moved[1:T] > 0).all()
    assert (moved[T:] == 0).all()


@pytest.mark.parametrize("name", ["timm, no class token", "timm, registers", "timm, distilled"])
def test_only_patches_are_adapted(name: str) -> None:
    vit: Any = adapted(name, placement="after_mlp", blocks=(DEPTH - 1,))
    plain = remove_st_adapters(copy.deepcopy(vit))
    vit.norm = plain.norm = nn.Identity()
    P = vit.num_prefix_tokens
    with_adapter, without = vit.forward_features(images(name)), plain.forward_features(images(name))
    assert torch.equal(with_adapter[:, :P], without[:, :P])
    expected = vit.blocks[-1].st_adapters["after_mlp"](F.pad(without[:, P:], (0, 0, 1, 0)), T)[:, 1:]
    torch.testing.assert_close(with_adapter[:, P:], expected)


def test_a_grid_that_is_not_square_keeps_its_rows() -> None:
    vit: Any = adapted("timm, not square", placement="after_mlp", blocks=(DEPTH - 1,), kernel_size=(1, 3, 3))
    plain = remove_st_adapters(copy.deepcopy(vit))
    vit.norm = plain.norm = nn.Identity()
    x_MND = plain.forward_features(images("not square"))[:, 1:]
    adapter = vit.blocks[-1].st_adapters["after_mlp"]
    z_MChw = adapter.down(x_MND).transpose(1, 2).unflatten(2, (4, 6))
    z_MChw = F.conv2d(z_MChw, adapter.conv.weight[:, :, 0], adapter.conv.bias, padding=1, groups=8)
    expected = x_MND + adapter.up(z_MChw.flatten(2).transpose(1, 2))
    torch.testing.assert_close(vit.forward_features(images("not square"))[:, 1:], expected, rtol=1e-5, atol=1e-5)


# --- a module that still works


def test_the_same_module_comes_back_with_only_the_adapters_trained() -> None:
    vit = make("timm")
    names = set(vit.state_dict())
    assert add_st_adapters(vit, T, 8, blocks=(0, 2)) is vit
    assert names < set(vit.state_dict())  # the backbone's names are unchanged
    trained = {name for name, parameter in vit.named_parameters() if parameter.requires_grad}
    assert trained == set(adapter_state(vit)) == set(vit.state_dict()) - names
    assert {name.split(".")[1] for name in trained} == {"0", "2"}


@pytest.mark.parametrize("name", ["timm", "open_clip", "torchvision"])
def test_removing_gives_back_the_original(name: str) -> None:
    vit = make(name)
    next(vit.parameters()).requires_grad_(False)
    expected, state, kinds = vit(images()), set(vit.state_dict()), [type(module) for module in vit.modules()]
    trained = [parameter.requires_grad for parameter in vit.parameters()]
    randomise(add_st_adapters(vit, T, 8))
    assert not torch.equal(vit(images()), expected)
    assert remove_st_adapters(vit) is vit
    assert torch.equal(vit(images()), expected)
    assert (set(vit.state_dict()), [type(module) for module in vit.modules()]) == (state, kinds)
    assert [parameter.requires_grad for parameter in vit.parameters()] == trained
    assert set(vars(vit)) == set(vars(make(name)))


@pytest.mark.parametrize("name", ["timm", "open_clip, tokens first", "OpenAI", "torchvision"])
def test_copies_and_pickles_are_models_of_their_own(name: str) -> None:
    vit = adapted(name)
    buffer = io.BytesIO()
    torch.save(vit, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(vit), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(images()), vit(images()))
        assert type(twin) is type(vit)
        randomise(twin, std=0.5)
        assert not torch.equal(twin(images()), vit(images()))
        remove_st_adapters(twin)(images())


def test_it_compiles_as_one_graph() -> None:
    vit = adapted("torchvision")
    compiled = torch.compile(vit, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), vit(images()), rtol=1e-5, atol=1e-5)


def test_it_trains_under_distributed_data_parallel(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        vit = adapted()
        replica = DistributedDataParallel(vit)
        for _ in range(2):  # the second call finds any parameter that had no gradient
            replica(images()).square().sum().backward()
        assert all(parameter.grad is not None for parameter in vit.parameters() if parameter.requires_grad)
    finally:
        torch.distributed.destroy_process_group()


def test_it_trains_with_activation_checkpointing() -> None:
    vit: Any = adapted()
    vit(images()).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in vit.named_parameters() if p.grad is not None}
    vit.zero_grad()
    vit.train()
    vit.set_grad_checkpointing()
    vit(images()).square().sum().backward()
    assert expected
    for name, gradient in expected.items():
        torch.testing.assert_close(vit.get_parameter(name).grad, gradient)


def test_a_few_steps_lower_the_loss() -> None:
    vit = add_st_adapters(make("timm"), T, 8)
    head = nn.Linear(WIDTH, 2)
    optimizer = torch.optim.AdamW([p for p in [*vit.parameters(), *head.parameters()] if p.requires_grad], lr=1e-2)
    clips, losses = images(), []
    for _ in range(20):
        loss = F.cross_entropy(head(vit(clips).unflatten(0, (B, T)).mean(1)), torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_a_backbone_in_half_precision_keeps_float32_adapters() -> None:
    vit = add_st_adapters(make("timm").bfloat16(), T, 8)
    assert {p.dtype for p in vit.parameters() if p.requires_grad} == {torch.float32}
    assert vit(images().bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        adapted()(images()).sum().backward()


def test_the_number_of_frames_can_change_between_calls() -> None:
    vit = adapted()
    with clips_of(vit, 2):
        by_two = vit(images())
    assert not torch.equal(by_two, vit(images()))
    set_num_frames(vit, 2)
    assert torch.equal(by_two, vit(images()))


# --- refusals


def refused(why: str, *arguments: Any, vit: nn.Module | None = None, **options: Any) -> None:
    with pytest.raises(ConfigError, match=why):
        add_st_adapters(vit or make("timm"), *arguments, **options)


def test_settings_that_cannot_work_are_refused_and_change_nothing() -> None:
    vit = make("timm")
    state = set(vit.state_dict())
    refused("kernel_size", kernel_size=(2, 1, 1), vit=vit)
    refused("there is no block 3", blocks=(3,), vit=vit)
    refused("placement = beside", placement="beside", vit=vit)
    refused("num_frames = 0", 0, vit=vit)
    assert set(vit.state_dict()) == state
    assert all(parameter.requires_grad for parameter in vit.parameters())


def test_adding_twice_is_refused() -> None:
    refused("has ST-Adapters already", vit=adapted())


def test_models_that_are_no_plain_transformers_are_refused() -> None:
    with torch.device("meta"):
        refused("EvaBlock: is not a plain transformer block", vit=timm.create_model("eva02_tiny_patch14_224"))
    refused("is not a plain vision transformer", vit=nn.Linear(2, 2))
    clip = open_clip.CLIP(16, {"layers": 1, "width": 64, "image_size": 32, "patch_size": 16}, {"layers": 1})
    refused("model.visual", vit=clip)
    refused("drops patches at random", vit=VisionTransformer(**SIZES, patch_drop_rate=0.5))


def test_images_that_are_no_whole_clips_are_refused() -> None:
    with pytest.raises(ConfigError, match="7 images are no clips of 4 frames"):
        adapted()(images(frames=7))


def test_images_of_another_size_need_a_kernel_without_spatial_extent() -> None:
    larger = torch.randn(T, 3, 40, 32)
    torch.manual_seed(0)
    flexible = VisionTransformer(**SIZES, num_classes=0, dynamic_img_size=True)
    assert add_st_adapters(flexible, T, 8, (3, 1, 1))(larger).shape == (T, WIDTH)
    remove_st_adapters(flexible)
    with pytest.raises(ConfigError, match="20 patches, but the adapters were made for 4 x 4"):
        add_st_adapters(flexible, T, 8, (3, 3, 3))(larger)


# --- files, and the package


def test_what_was_saved_goes_onto_the_same_backbone_only(tmp_path: Path) -> None:
    vit, file = adapted(), tmp_path / "adapters.safetensors"
    save(file, vit, backbone="vit_tiny", metrics={"top1": 50.0})
    fresh = add_st_adapters(make("timm"), T, 8, (3, 3, 3), "both")
    header = load_into(fresh, file)
    assert torch.equal(fresh(images()), vit(images()))
    assert (header.backbone, header.metrics) == ("vit_tiny", {"top1": 50.0})
    other = make("timm")
    other.get_parameter("blocks.0.mlp.fc1.weight").data[0, 0] += 1e-3
    with pytest.raises(ConfigError, match=r"was trained on other frozen weights \(vit_tiny\)"):
        load_into(add_st_adapters(other, T, 8, (3, 3, 3), "both"), file)
    with pytest.raises(ConfigError, match=r"adapters.safetensors: the checkpoint is of another model"):
        load_into(add_st_adapters(make("timm"), T, 8, (3, 3, 3)), file)


def test_importing_the_package_is_light_and_its_names_are_there() -> None:
    code = (
        "import sys, stadapter; assert not {'torch', 'ray', 'mlflow', 'numpy'} & set(sys.modules); "
        "assert set(stadapter.__all__) <= set(dir(stadapter)); from stadapter import STAdapter; "
        "assert STAdapter(8, 4) is not None and not {'ray', 'mlflow', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(getattr(stadapter, name) for name in stadapter.__all__)
    assert stadapter.STAdapter is STAdapter
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = stadapter.nothing
