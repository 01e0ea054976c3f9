"""The weights of every library load into the same plain ViT, which computes the library's outputs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from open_clip.transformer import VisionTransformer as OpenClipVit
from safetensors.torch import save_file
from timm.layers.activations import QuickGELU
from timm.models.vision_transformer import VisionTransformer as TimmVit
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

from stadapter.backbone import hubs
from stadapter.backbone.hubs import _timm_shape
from stadapter.backbone.load import describe_backbone, load_backbone, resample_positions
from stadapter.backbone.state_dicts import from_open_clip, from_timm, read_state, to_open_clip
from stadapter.backbone.vit import ViT, VitShape, seed_weights
from stadapter.config import BackboneConfig, ConfigError

TINY = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 2, "heads": 4, "mlp_ratio": 4.0, "output_dim": 20}
TINY_SHAPE = VitShape(32, 8, 48, 2, 4, 192, activation="quick_gelu", norm_eps=1e-5, pre_norm=True, patch_bias=False)
PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def randomise(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2, generator=generator)
            if "norm" in name or "ln_" in name:
                parameter.add_(1)


@pytest.fixture
def clip_tower() -> OpenClipVit:
    """Return a tiny image tower of open_clip with random weights, which outputs its tokens after the final norm."""
    tower = OpenClipVit(**TINY, act_layer=open_clip.transformer.QuickGELU, output_tokens=True).eval()
    randomise(tower)
    return tower


@pytest.fixture
def clip_state(clip_tower: OpenClipVit) -> dict[str, torch.Tensor]:
    """Return the state of a whole CLIP model, which has a text tower too."""
    state = {f"visual.{name}": tensor for name, tensor in clip_tower.state_dict().items()}
    return state | {"transformer.resblocks.0.mlp.c_fc.weight": torch.zeros(2, 2), "logit_scale": torch.zeros(())}


def vit_with(state: dict[str, torch.Tensor], shape: VitShape = TINY_SHAPE) -> ViT:
    vit = ViT(shape)
    vit.load_state_dict(state)
    return vit


def test_open_clip_layout_gives_open_clips_features(clip_tower, clip_state) -> None:
    vit = vit_with(from_open_clip(clip_state))
    pooled, patches = clip_tower(PIXELS)
    features = vit(PIXELS)
    torch.testing.assert_close(features[:, 0] @ clip_tower.proj, pooled, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features[:, 1:], patches, rtol=1e-5, atol=1e-5)


def test_timm_layout_gives_timms_features() -> None:
    model = timm.create_model("test_vit").eval()
    randomise(model)
    shape = dataclasses.replace(_timm_shape("test_vit", model, quick_gelu=False), image_size=160)
    pixels = torch.randn(2, 3, 160, 160)
    features = vit_with(from_timm(model.state_dict()), shape)(pixels)
    torch.testing.assert_close(features, model.forward_features(pixels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"init_values": 0.1}, {"no_embed_class": True}, {"qkv_bias": False}])
def test_options_of_plain_timm_vits_are_followed(options) -> None:
    model = TimmVit(32, 8, embed_dim=48, depth=2, num_heads=4, num_classes=0, **options).eval()
    randomise(model)
    vit = vit_with(from_timm(model.state_dict()), _timm_shape("tiny", model, quick_gelu=False))
    torch.testing.assert_close(vit(PIXELS), model.forward_features(PIXELS), rtol=1e-5, atol=1e-5)


def test_same_clip_weights_through_both_libraries_give_the_same_features(clip_state, tmp_path) -> None:
    model = TimmVit(
        32,
        8,
        embed_dim=48,
        depth=2,
        num_heads=4,
        num_classes=20,
        pre_norm=True,
        norm_layer=lambda width, **k: nn.LayerNorm(width, eps=1e-5, **k),
        act_layer=QuickGELU,
    ).eval()
    model.load_state_dict(checkpoint_filter_fn(dict(clip_state), model), strict=False)  # timm's own conversion
    save_file(clip_state, tmp_path / "clip.safetensors")
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    assert _timm_shape("tiny", model, quick_gelu=False) == TINY_SHAPE
    by_clip, by_timm = (vit_with(read_state(tmp_path / f"{name}.safetensors")) for name in ("clip", "timm"))
    assert torch.equal(by_clip(PIXELS), by_timm(PIXELS))
    torch.testing.assert_close(by_timm(PIXELS), model.forward_features(PIXELS), rtol=1e-5, atol=1e-5)


def test_open_clip_names_survive_the_round_trip(clip_tower) -> None:
    state = {name: tensor for name, tensor in clip_tower.state_dict().items() if name != "proj"}
    back = to_open_clip(from_open_clip(state))
    assert back.keys() == state.keys()


@pytest.mark.parametrize("kind", ["safetensors", "pt", "bin", "wrapped", "jit"])
def test_weights_are_read_from_every_kind_of_file(kind, clip_state, tmp_path) -> None:
    file = tmp_path / f"weights.{kind if kind in ('safetensors', 'bin') else 'pt'}"
    if kind == "safetensors":
        save_file(clip_state, file)
    elif kind == "jit":  # the archives that OpenAI published
        root = nn.Module()
        root.visual = nn.Module()
        for name, tensor in clip_state.items():
            *path, leaf = name.split(".")
            module = root
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(leaf, nn.Parameter(tensor))
        torch.jit.script(root).save(str(file))
    else:
        torch.save({"state_dict": clip_state, "epoch": 3} if kind == "wrapped" else clip_state, file)
    expected = from_open_clip(clip_state)
    state = read_state(file)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_load_backbone_reads_timm_weights_and_resamples_positions(tmp_path) -> None:
    model = timm.create_model("test_vit")
    randomise(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    vit, backbone = load_backbone(BackboneConfig("timm/test_vit"), 96, weights_file=tmp_path / "model.safetensors")
    assert backbone.shape.image_size == 96 and backbone.shape == vit.shape
    expected = resample_positions(model.pos_embed[0].detach(), 6)
    torch.testing.assert_close(vit.pos_embed.detach(), expected)
    assert vit(torch.randn(1, 3, 96, 96)).shape == (1, 37, 64)


def test_load_backbone_reads_open_clip_weights(clip_state, tmp_path) -> None:
    config = {"embed_dim": 20, "quick_gelu": True, "text_cfg": {"layers": 1}}
    config["vision_cfg"] = {"image_size": 32, "layers": 2, "width": 48, "head_width": 12, "patch_size": 8}
    (tmp_path / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    save_file(clip_state, tmp_path / "weights.safetensors")
    name = BackboneConfig("open_clip/tiny-clip")
    vit, backbone = load_backbone(name, 32, weights_file=tmp_path / "weights.safetensors")
    assert backbone.shape == TINY_SHAPE
    assert torch.equal(vit(PIXELS), vit_with(from_open_clip(clip_state))(PIXELS))


def test_load_backbone_reads_its_own_layout(tmp_path) -> None:
    vit, _ = load_backbone(BackboneConfig("timm/test_vit", "seed:3"), 160)
    save_file({name: tensor.half() for name, tensor in vit.state_dict().items()}, tmp_path / "own.safetensors")
    again, _ = load_backbone(BackboneConfig("timm/test_vit"), 160, weights_file=tmp_path / "own.safetensors")
    assert again.cls_token.dtype == torch.float32
    torch.testing.assert_close(again.state_dict(), vit.state_dict(), rtol=1e-3, atol=1e-4)


def test_seeded_weights_depend_on_the_seed_alone() -> None:
    first, same, other = (load_backbone(BackboneConfig("timm/test_vit", f"seed:{n}"), 32)[0] for n in (1, 1, 2))
    assert torch.equal(first(PIXELS), same(PIXELS))
    assert not torch.allclose(first(PIXELS), other(PIXELS))


def test_meta_device_needs_no_weights() -> None:
    vit, _ = load_backbone(BackboneConfig("timm/vit_large_patch14_clip_224.openai"), 224, device="meta")
    assert vit.cls_token.is_meta
    assert sum(p.numel() for p in vit.parameters()) == 303_179_776


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("timm/vit_base_patch16_clip_224.openai", "quick_gelu"),
        ("timm/vit_base_patch16_clip_quickgelu_224.openai", "quick_gelu"),
        ("timm/vit_base_patch16_clip_224.dfn2b", "quick_gelu"),
        ("timm/vit_base_patch16_clip_224.openai_ft_in1k", "gelu"),
        ("timm/vit_base_patch16_clip_224.laion2b", "gelu"),
        ("open_clip/ViT-B-16/openai", "quick_gelu"),
        ("open_clip/ViT-B-16-quickgelu/openai", "quick_gelu"),
        ("open_clip/ViT-B-16/laion2b_s34b_b88k", "gelu"),
    ],
)
def test_quick_gelu_where_the_weights_were_trained_with_it(name, activation) -> None:
    backbone = describe_backbone(BackboneConfig(name))
    assert backbone.shape.activation == activation
    assert (backbone.mean, backbone.std) == (CLIP_MEAN, CLIP_STD)


def test_both_libraries_describe_the_same_clip_alike() -> None:
    by_timm = describe_backbone(BackboneConfig("timm/vit_large_patch14_clip_224.openai"))
    assert by_timm == describe_backbone(BackboneConfig("open_clip/ViT-L-14/openai"))
    assert (by_timm.shape.width, by_timm.shape.depth, by_timm.shape.heads, by_timm.shape.grid) == (1024, 24, 16, 16)


def test_augreg_has_its_own_normalisation_and_the_exact_gelu() -> None:
    backbone = describe_backbone(BackboneConfig("timm/vit_base_patch16_224.augreg_in21k"))
    assert (backbone.mean, backbone.std) == ((0.5,) * 3, (0.5,) * 3)
    assert backbone.shape == VitShape(224, 16, 768, 12, 12, 3072)


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("timm/vit_base_patch14_reg4_dinov2.lvd142m", "4 register tokens"),
        ("timm/vit_base_patch16_siglip_224.webli", "no class token"),
        ("timm/vit_giant_patch14_dinov2.lvd142m", "SwiGLU"),
        ("timm/vit_base_patch16_xp_224", "parallel"),
        ("timm/vit_base_patch16_rope_224", "architecture of its own"),
        ("timm/vit_base_r50_s16_224", "patch embedding of its own"),
        ("open_clip/RN50/openai", "ResNet"),
        ("open_clip/ViT-B-16-SigLIP/webli", "timm image tower"),
        ("open_clip/coca_ViT-B-32/laion2b_s13b_b90k", "attentional_pool"),
    ],
)
def test_what_the_plain_vit_lacks_is_named(name, feature) -> None:
    with pytest.raises(ConfigError, match=feature) as caught:
        describe_backbone(BackboneConfig(name))
    assert "\n" not in str(caught.value)


def test_qk_norm_is_named() -> None:
    model = TimmVit(32, 8, embed_dim=48, depth=1, num_heads=4, qk_norm=True)
    with pytest.raises(ConfigError, match="qk_norm"):
        _timm_shape("tiny", model, quick_gelu=False)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("timm/vit_base_pach16_224", "did you mean vit_base_patch16_224"),
        ("timm/vit_base_patch16_clip_224.opnai", "did you mean vit_base_patch16_clip_224.openai"),
        ("open_clip/ViT-B-61/openai", "did you mean ViT-B-16"),
        ("open_clip/ViT-B-16/opnai", "ViT-B-16 has openai"),
        ("vit_base_patch16_224", "timm/<model>"),
    ],
)
def test_unknown_names_get_a_suggestion(name, hint) -> None:
    with pytest.raises(ConfigError, match=hint):
        describe_backbone(BackboneConfig(name))


@pytest.mark.parametrize("name", ["timm/vit_base_patch16_clip_224.openai", "open_clip/ViT-B-16/openai"])
def test_offline_without_weights_names_the_file_to_fetch(name, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hubs, "_reachable", lambda url: False)
    with pytest.raises(
        ConfigError, match=r"hf download timm/vit_base_patch16_clip_224.openai \S+\.safetensors"
    ) as caught:
        load_backbone(BackboneConfig(name), 224)
    assert "--weights FILE" in str(caught.value) and "\n" not in str(caught.value)


def test_weights_in_the_hubs_cache_need_no_network(monkeypatch, tmp_path) -> None:
    model = timm.create_model("test_vit")
    randomise(model)
    snapshot = tmp_path / "models--timm--test_vit.r160_in1k" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    save_file(model.state_dict(), snapshot / "model.safetensors")
    (tmp_path / "models--timm--test_vit.r160_in1k" / "refs").mkdir()
    (tmp_path / "models--timm--test_vit.r160_in1k" / "refs" / "main").write_text("0")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hubs, "_reachable", lambda url: pytest.fail("asked the network"))
    vit, _ = load_backbone(BackboneConfig("timm/test_vit.r160_in1k"), 160)
    assert torch.equal(vit.cls_token, model.cls_token.flatten())


def test_a_dead_network_is_noticed_at_once() -> None:
    assert not hubs._reachable("http://127.0.0.1:9")  # the discard port: nobody listens


def test_recipe_made_with_a_file_insists_on_that_file(tmp_path) -> None:
    vit = ViT(describe_backbone(BackboneConfig("timm/test_vit")).shape)
    seed_weights(vit, 0)
    file = tmp_path / "weights.safetensors"
    save_file(vit.state_dict(), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    load_backbone(BackboneConfig("timm/test_vit", digest), 160, weights_file=file)
    with pytest.raises(ConfigError, match="pass it with --weights"):
        load_backbone(BackboneConfig("timm/test_vit", digest), 160)
    with pytest.raises(ConfigError, match="its SHA-256 is"):
        load_backbone(BackboneConfig("timm/test_vit", "0" * 64), 160, weights_file=file)


def _bad_files() -> dict[str, object]:
    return {
        "names.safetensors": {"encoder.layer.0.weight": torch.zeros(1)},
        "narrow.safetensors": {"patch_embed.proj.weight": torch.zeros(1), "blocks.0.mlp.fc1.weight": torch.zeros(1, 1)},
        "garbage.safetensors": b"garbage",
        "garbage.pt": b"garbage",
        "code.pt": Path,
        "missing.safetensors": None,
        "missing.pt": None,
    }


@pytest.mark.parametrize("name", _bad_files())
def test_bad_weight_files_get_one_line_that_names_them(name, tmp_path) -> None:
    content = _bad_files()[name]
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif name.endswith(".safetensors") and content:
        save_file(content, tmp_path / name)
    elif content:
        torch.save({"weights": content}, tmp_path / name)
    with pytest.raises(ConfigError, match=name) as caught:
        load_backbone(BackboneConfig("timm/test_vit"), 160, weights_file=tmp_path / name)
    assert "\n" not in str(caught.value)


def test_weights_of_another_architecture_are_refused(clip_state, tmp_path) -> None:
    save_file(clip_state, tmp_path / "weights.safetensors")
    with pytest.raises(ConfigError, match="another architecture"):
        load_backbone(BackboneConfig("timm/test_vit"), 160, weights_file=tmp_path / "weights.safetensors")


def test_frame_size_must_be_a_multiple_of_the_patch_size() -> None:
    with pytest.raises(ConfigError, match=r"data\.frame_size = 100: must be a multiple of 16"):
        load_backbone(BackboneConfig("timm/test_vit", "seed:0"), 100)


def test_resampling_keeps_cls_and_the_size_it_has() -> None:
    pos_embed = torch.randn(17, 8)
    assert torch.equal(resample_positions(pos_embed, 4), pos_embed)
    assert torch.equal(resample_positions(pos_embed, 7)[0], pos_embed[0])


def test_resampling_is_bicubic_without_antialiasing() -> None:
    pos_embed = torch.randn(1 + 36, 8)
    grid = pos_embed[1:].reshape(6, 6, 8).permute(2, 0, 1)[None]
    plain = F.interpolate(grid, size=(3, 3), mode="bicubic", align_corners=False)
    torch.testing.assert_close(resample_positions(pos_embed, 3)[1:], plain[0].permute(1, 2, 0).reshape(9, 8))


def test_embedded_backbone_is_described_without_its_weights() -> None:
    backbone = describe_backbone(BackboneConfig("embedded"))
    assert (backbone.shape.image_size, backbone.shape.width, backbone.mean) == (60, 96, (0.5,) * 3)


def test_embedded_backbone_ships_with_the_package() -> None:
    vit, backbone = load_backbone(BackboneConfig("embedded"), 60)
    assert vit.shape == backbone.shape
    assert vit(torch.randn(2, 3, 60, 60)).isfinite().all()
