"""ST-Adapters added in place to a vision transformer from another library, for any training loop.

    vit = timm.create_model("vit_base_patch16_clip_224.openai", pretrained=True, num_classes=0)
    add_st_adapters(vit, num_frames=8)
    features = vit(frames)  # [B * T, 3, H, W], the frames of a clip one after another

A block keeps its parameters, their names and its place. Its class is replaced by a derived class whose `forward` runs
the same two branches with adapters around them, so copying, saving, compiling and distributing still work.

Shapes: B clips, T frames, M = B * T images, P prefix tokens (class, register, distillation), N patches, S = P + N
tokens per image, D width.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stadapter.config import AdapterConfig, ConfigError, Placement
from stadapter.model.adapter import STAdapter
from stadapter.model.placement import PLACES, blocks_with_adapter
from stadapter.model.state import load_trainable_state, trainable_state

V = TypeVar("V", bound=nn.Module)

_ADAPTERS, _TOKENS, _WAS_TRAINED = "st_adapters", "st_tokens", "st_was_trained"


def add_st_adapters(
    vit: V,
    num_frames: int = 8,
    bottleneck_width: int = 384,
    kernel_size: tuple[int, int, int] = (3, 1, 1),
    placement: Placement = "before_mhsa",
    blocks: tuple[int, ...] | None = None,
) -> V:
    """Add ST-Adapters to a plain ViT in place, freeze the rest, and return the same module.

    `vit` is timm's VisionTransformer, the image tower of open_clip or of OpenAI's CLIP (`model.visual`), or
    torchvision's VisionTransformer. Call it with images [B * T, 3, H, W] as before; its outputs start unchanged, as a
    new adapter is the identity. Only patches are adapted, not the class, register and distillation tokens.
    `kernel_size` is (t, h, w), all odd; `blocks` are 0-based, None means all.

    Adapters are float32, or more precise if the backbone is, on the device of their block. A head of the module is
    frozen too: `vit.head.requires_grad_()` trains it. Raises ConfigError, leaving the module unchanged, if the settings
    or the module do not suit.
    """
    if placement not in get_args(Placement):
        raise ConfigError(f"placement = {placement}: must be one of {', '.join(get_args(Placement))}")
    if next(_adapted_blocks(vit), None) is not None:
        raise ConfigError(f"{type(vit).__name__}: has ST-Adapters already; remove_st_adapters takes them out")
    adapter = AdapterConfig(bottleneck_width, kernel_size, placement=placement, blocks=blocks)
    tokens = dataclasses.replace(_describe(vit), num_frames=_checked(num_frames))
    all_blocks = list(_blocks(vit))
    places = {place: blocks_with_adapter(adapter, place, len(all_blocks)) for place in PLACES}
    for block in all_blocks:
        _branches(type(block), block)
    setattr(vit, _WAS_TRAINED, [name for name, parameter in vit.named_parameters() if parameter.requires_grad])
    vit.requires_grad_(False)
    for index, block in enumerate(all_blocks):
        here = [place for place, numbers in places.items() if index in numbers]
        if here:
            like = next(block.parameters())
            width = next(module for module in block.modules() if isinstance(module, nn.LayerNorm)).normalized_shape[0]
            made = nn.ModuleDict({place: STAdapter.from_config(width, adapter) for place in here})
            block.add_module(_ADAPTERS, made.to(like.device, torch.promote_types(like.dtype, torch.float32)))
            setattr(block, _TOKENS, tokens)
            block.__class__ = _adapted_class(type(block))
    return vit


def remove_st_adapters(vit: V) -> V:
    """Remove the adapters in place, restore which parameters are trained, and return the same module."""
    for block in list(_adapted_blocks(vit)):
        block.__class__ = block.plain_class
        delattr(block, _ADAPTERS)
        delattr(block, _TOKENS)
    if hasattr(vit, _WAS_TRAINED):
        for name in getattr(vit, _WAS_TRAINED):
            vit.get_parameter(name).requires_grad_(True)
        delattr(vit, _WAS_TRAINED)
    return vit


def set_num_frames(vit: nn.Module, num_frames: int) -> None:
    """Set the number of frames per clip for all later calls. Raises ConfigError if the module has no adapters."""
    blocks = list(_adapted_blocks(vit))
    if not blocks:
        raise ConfigError(f"{type(vit).__name__}: has no ST-Adapters; add_st_adapters puts them in")
    for block in blocks:
        setattr(block, _TOKENS, dataclasses.replace(getattr(block, _TOKENS), num_frames=_checked(num_frames)))


@contextlib.contextmanager
def clips_of(vit: nn.Module, num_frames: int) -> Iterator[None]:
    """Set the number of frames per clip inside a `with` block.

    With activation checkpointing, call `backward` inside the block too.
    """
    before = next((getattr(block, _TOKENS).num_frames for block in _adapted_blocks(vit)), num_frames)
    set_num_frames(vit, num_frames)
    try:
        yield
    finally:
        set_num_frames(vit, before)


def adapter_state(vit: nn.Module) -> dict[str, Tensor]:
    """Return the trained tensors by name, detached but not copied: the adapters and everything else unfrozen."""
    return trainable_state(vit)


def load_adapter_state(vit: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy an `adapter_state` into a model. Raises ConfigError if names or shapes differ from the trained tensors."""
    load_trainable_state(vit, state)


# --- a block with adapters


@dataclass(frozen=True)
class _Tokens:
    """The layout of a block's tokens."""

    num_prefix: int  # P
    grid: tuple[int, int]  # (rows, columns) of patches
    tokens_first: bool = False  # [S, M, D], the older layout of PyTorch's attention
    num_frames: int = 8


class _Adapted:
    """A mixin that adds adapters to a block: `_adapted_class` derives from it and from the block's class."""

    plain_class: type[nn.Module]
    st_adapters: nn.ModuleDict
    st_tokens: _Tokens

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the block's output with adapters, [M, S, D], or [S, M, D] with `tokens_first`.

        Further arguments go to the block's attention.
        """
        attend, mlp = _branches(self.plain_class)
        input_x = x
        x = self._adapt("before", x)
        x = x + attend(self, x, *args, **kwargs)
        x = self._adapt("after", x)
        x = x + mlp(self, x)
        x = self._adapt("after_mlp", x)
        return self._adapt("parallel", input_x, onto=x)

    def _adapt(self, place: str, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return `onto` (by default `x`) plus the branch of the adapter at a place, or unchanged without an adapter."""
        onto = x if onto is None else onto
        if place not in self.st_adapters:
            return onto
        adapter = self.st_adapters[place]
        assert isinstance(adapter, STAdapter)
        tokens = self.st_tokens
        if tokens.tokens_first:
            return _adapt_patches(adapter, x.transpose(0, 1), onto.transpose(0, 1), tokens).transpose(0, 1)
        return _adapt_patches(adapter, x, onto, tokens)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The derived class is made at run time, where a pickle cannot find it: name the plain class instead.
        return _without_content, (self.plain_class,), self.__getstate__()


_ADAPTED_CLASSES: dict[type[nn.Module], Any] = {}


def _adapted_class(plain: type[nn.Module]) -> Any:
    if plain not in _ADAPTED_CLASSES:
        _ADAPTED_CLASSES[plain] = type(f"{plain.__name__}WithSTAdapters", (_Adapted, plain), {"plain_class": plain})
    return _ADAPTED_CLASSES[plain]


def _without_content(plain: type[nn.Module]) -> Any:
    adapted = _adapted_class(plain)
    return adapted.__new__(adapted)


def _adapt_patches(adapter: STAdapter, x_MSD: Tensor, onto_MSD: Tensor, tokens: _Tokens) -> Tensor:
    M, P, N = x_MSD.shape[0], tokens.num_prefix, x_MSD.shape[1] - tokens.num_prefix
    if M % tokens.num_frames:
        raise ConfigError(
            f"{M} images are no clips of {tokens.num_frames} frames; set_num_frames(vit, ...) says how many there are"
        )
    if tokens.grid[0] * tokens.grid[1] != N and adapter.conv.kernel_size[1:] != (1, 1):
        raise ConfigError(
            f"{N} patches, but the adapters were made for {tokens.grid[0]} x {tokens.grid[1]}: a kernel of spatial "
            "extent must know their grid; give images of the size that the model had, or set its size before "
            "add_st_adapters"
        )
    dtype, out_dtype = adapter.down.weight.dtype, onto_MSD.dtype
    if not torch.is_autocast_enabled(x_MSD.device.type):  # a backbone in half precision keeps float32 adapters
        x_MSD, onto_MSD = x_MSD.to(dtype), onto_MSD.to(dtype)
    if P == 1:
        return adapter(x_MSD, tokens.num_frames, onto_MSD, grid=tokens.grid).to(out_dtype)
    # The adapter expects exactly one token before the patches: replace the P tokens by a blank one.
    padded_MSD, onto_padded_MSD = (F.pad(tensor[:, P:], (0, 0, 1, 0)) for tensor in (x_MSD, onto_MSD))
    patches_MND = adapter(padded_MSD, tokens.num_frames, onto_padded_MSD, grid=tokens.grid)[:, 1:]
    return torch.cat([onto_MSD[:, :P], patches_MND], dim=1).to(out_dtype)


# --- the names in timm, open_clip, OpenAI's CLIP and torchvision

_Branch = Callable[..., Tensor]


def _timm_attend(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return block.drop_path1(block.ls1(block.attn(block.norm1(x), *args, **kwargs)))


def _timm_mlp(block: Any, x: Tensor) -> Tensor:
    return block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _open_clip_attend(
    block: Any, x: Tensor, k_x: None = None, v_x: None = None, attn_mask: Tensor | None = None
) -> Tensor:
    return block.ls_1(block.attention(block.ln_1(x), attn_mask=attn_mask))


def _open_clip_mlp(block: Any, x: Tensor) -> Tensor:
    return block.ls_2(block.mlp(block.ln_2(x)))


def _openai_attend(block: Any, x: Tensor) -> Tensor:
    return block.attention(block.ln_1(x))


def _torchvision_attend(block: Any, x: Tensor) -> Tensor:
    h = block.ln_1(x)
    return block.dropout(block.self_attention(h, h, h, need_weights=False)[0])


def _plain_mlp(block: Any, x: Tensor) -> Tensor:
    return block.mlp(block.ln_2(x))


def _branches(block_class: type[nn.Module], block: nn.Module | None = None) -> tuple[_Branch, _Branch]:
    """Return the attention and MLP branches of a class of blocks. Raises ConfigError if the class is unknown."""
    known: dict[tuple[str, str], tuple[_Branch, _Branch]] = {
        ("timm.models.vision_transformer", "Block"): (_timm_attend, _timm_mlp),
        ("open_clip.transformer", "ResidualAttentionBlock"): (_open_clip_attend, _open_clip_mlp),
        ("torchvision.models.vision_transformer", "EncoderBlock"): (_torchvision_attend, _plain_mlp),
    }
    place = (block_class.__module__, block_class.__qualname__)
    if place in known:
        return known[place]
    # OpenAI's code is copied under any module name: recognise the class by its name and children.
    openai = {"attn", "ln_1", "mlp", "ln_2"}
    if block_class.__name__ == "ResidualAttentionBlock" and (
        block is None or {name for name, _ in block.named_children()} == openai
    ):
        return _openai_attend, _plain_mlp
    raise ConfigError(
        f"{'.'.join(place)}: is not a plain transformer block; take a ViT with timm's Block, open_clip's or OpenAI "
        "CLIP's ResidualAttentionBlock, or torchvision's EncoderBlock"
    )


def _blocks(vit: Any) -> Any:
    """Return the transformer's blocks in order."""
    if hasattr(vit, "blocks"):
        return vit.blocks
    return vit.transformer.resblocks if hasattr(vit, "transformer") else vit.encoder.layers


def _describe(vit: Any) -> _Tokens:
    name = type(vit).__name__
    if hasattr(vit, "blocks") and hasattr(vit, "num_prefix_tokens") and hasattr(vit.patch_embed, "grid_size"):
        tokens, dropout = _Tokens(vit.num_prefix_tokens, tuple(vit.patch_embed.grid_size)), vit.patch_drop
    elif hasattr(vit, "conv1") and hasattr(getattr(vit, "transformer", None), "resblocks"):
        side = round((len(vit.positional_embedding) - 1) ** 0.5)
        grid = tuple(getattr(vit, "grid_size", (side, side)))
        tokens_first = not getattr(vit.transformer, "batch_first", False)
        tokens, dropout = _Tokens(1, grid, tokens_first), getattr(vit, "patch_dropout", nn.Identity())
    elif hasattr(vit, "conv_proj") and hasattr(getattr(vit, "encoder", None), "layers"):
        side = vit.image_size // vit.patch_size
        tokens, dropout = _Tokens(1, (side, side)), nn.Identity()
    else:
        tower = "; pass its image tower, model.visual" if hasattr(vit, "visual") else ""
        raise ConfigError(
            f"{name}: is not a plain vision transformer of timm, open_clip, OpenAI's CLIP or torchvision{tower}"
        )
    if not isinstance(dropout, nn.Identity | None):
        raise ConfigError(f"{name}: drops patches at random in training, so frames would not match; build it without")
    return tokens


def _adapted_blocks(vit: nn.Module) -> Iterator[Any]:
    return (module for module in vit.modules() if isinstance(module, _Adapted))


def _checked(num_frames: int) -> int:
    if num_frames < 1:
        raise ConfigError(f"num_frames = {num_frames}: must be at least 1")
    return num_frames
