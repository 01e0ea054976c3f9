"""The video classifier: an image ViT, adapters or other parts between its branches, and a linear head.

    frames -> tokens -> block x depth -> CLS, mean over frames -> final norm -> dropout -> head -> logits

    block:  u = before(x);  v = after(u + attention(u));  w = after_mlp(v + MLP(v));  w + parallel's branch(x)

Each place holds an adapter X + f(X), or nothing. `parallel` stands beside the whole block: its branch reads the
block's input and is added to the block's output. The parts of other strategies (`stadapter.model.baselines`) are

- `time`: attention over time, before all else in a block
- `prompts`: further tokens that a block's attention sees
- `lora`: changes of the attention's matrices
- `temporal`: blocks over the frames' CLS, before their mean
- `pool`: attention over all tokens behind the last block, added to the normalised mean

Shapes: B clips, T frames, M = B * T images, S = 1 + N tokens (CLS first), D width, K classes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stadapter.backbone.vit import AttentionChange, ViT
from stadapter.config import AdapterConfig, BaselineConfig, Strategy, derive_seed
from stadapter.model.adapter import STAdapter
from stadapter.model.placement import PLACES, PLACES_BEHIND, blocks_with_adapter
from stadapter.strategies import STRATEGIES

Triple = tuple[float, float, float]
AdapterClass = Callable[[int, AdapterConfig], nn.Module]  # (width, the recipe's fields) -> one adapter


class VideoClassifier(nn.Module):
    """A classifier of clips: pixels [B, T, 3, H, W] in, logits [B, K] out (float32).

    `before`, `after`, `after_mlp` and `parallel` hold the adapters, keyed by 0-based block index; `adapter` None builds
    none. The strategy's row says of which class they are, unless `custom_adapter` does, and which other part there is.

    Initial values depend on `seed` alone, those of each part on a random stream of its own: two models with the same
    seed start with the same head, and with the same adapters where both have them.
    """

    before: nn.ModuleDict
    after: nn.ModuleDict
    after_mlp: nn.ModuleDict
    parallel: nn.ModuleDict

    def __init__(
        self,
        vit: ViT,
        num_classes: int,
        adapter: AdapterConfig | None,
        seed: int = 0,
        mean: Triple = (0.5, 0.5, 0.5),
        std: Triple = (0.5, 0.5, 0.5),
        *,
        strategy: Strategy = "st_adapter",
        rival: BaselineConfig | None = None,
        num_frames: int = 8,
        custom_adapter: AdapterClass | None = None,
    ) -> None:
        super().__init__()
        row = STRATEGIES[strategy]
        self.vit = vit
        self.recompute = False  # True: the MLPs' activations are computed again in the backward pass (TrainOptions)
        self.adapters_are_custom = custom_adapter is not None
        # The parts besides adapters; a strategy's row adds at most one. `lora` and `prompts` have an item per block.
        self.time: Callable[[Tensor, int], Tensor] | None = None
        self.prompts: Sequence[Tensor] | None = None
        self.lora: Sequence[AttentionChange] | None = None
        self.temporal: Callable[[Tensor], Tensor] | None = None
        self.pool: Callable[[Tensor], Tensor] | None = None

        if adapter is not None and row.adapter:
            self._add_adapters(adapter, custom_adapter or code(row.adapter).from_config, seed)
        else:
            self._add_adapters(None, None, seed)
        if row.adds:
            part, stream = code(row.adds), functools.partial(seeded, seed, f"init/{strategy}")
            setattr(self, part.part, part.build(vit, rival or BaselineConfig(), num_frames, stream))
        self._add_head(num_classes, seed)
        self._keep_normalisation(mean, std)
        self._warn_of_dead_adapters()

    def _add_adapters(self, adapter: AdapterConfig | None, make: AdapterClass | None, seed: int) -> None:
        for place in PLACES:
            adapters = nn.ModuleDict()
            for block in blocks_with_adapter(adapter, place, self.vit.shape.depth):
                assert adapter is not None and make is not None
                with seeded(seed, f"init/{place}", block):
                    adapters[str(block)] = make(self.width, adapter)
            self.add_module(place, adapters)

    def _add_head(self, num_classes: int, seed: int) -> None:
        with seeded(seed, "init/head"):
            self.head = nn.Linear(self.width, num_classes)
            nn.init.normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def _keep_normalisation(self, mean: Triple, std: Triple) -> None:
        # Not in the state: constants of the backbone, not weights.
        self.mean_311: Tensor
        self.std_311: Tensor
        self.register_buffer("mean_311", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std_311", torch.tensor(std).view(3, 1, 1), persistent=False)

    def _warn_of_dead_adapters(self) -> None:
        if dead := dead_parameters(self):
            last = len(self.vit.blocks) - 1
            warnings.warn(
                f"the adapter behind the attention of the last block ({last}) can never receive a gradient, "
                f"since only CLS is read from there on: its {dead:,} parameters are built and counted, but not "
                "computed or trained; leave that block out of adapter.blocks, or use before_mhsa, to drop them",
                stacklevel=3,
            )

    def trained_parts(self) -> list[nn.Module]:
        """Return the parts beside the backbone that are trained: the head, the adapters and what the strategy adds."""
        added = (self.time, self.prompts, self.lora, self.temporal, self.pool)
        return [self.head, *self.adapters(), *(part for part in added if isinstance(part, nn.Module))]

    @property
    def width(self) -> int:
        """The length D of the vector that the head reads."""
        return self.vit.shape.width

    def forward(self, pixels_BTCHW: Tensor, head_keep_BD: Tensor | None = None, start: int = 0) -> Tensor:
        """Return logits [B, K], float32, of pixels: uint8 in 0 ... 255, or float in [0, 1].

        `head_keep_BD` is dropout before the head: 0 where a feature is dropped, 1 / (1 - p) where it is kept. The
        caller draws it, so that it does not depend on how clips are spread over GPUs; without it nothing is dropped.
        With a `start` above 0, the input is tokens [B, T, S, D] instead, as `tokens_before(start)` returns them.
        """
        if start:
            T = pixels_BTCHW.shape[1]
            x_MSD = self._run(pixels_BTCHW.flatten(0, 1), T, range(start, len(self.vit.blocks)))
            return self._logits(x_MSD, T, head_keep_BD)
        return self.forward_normalised(self._normalised(pixels_BTCHW), head_keep_BD)

    def forward_normalised(self, pixels_BTCHW: Tensor, head_keep_BD: Tensor | None = None) -> Tensor:
        """Return logits as `forward` does, of float pixels that are normalised already."""
        T = pixels_BTCHW.shape[1]
        return self._logits(self.run_blocks(pixels_BTCHW.flatten(0, 1), T), T, head_keep_BD)

    @torch.no_grad()
    def tokens_before(self, block: int, pixels_BTCHW: Tensor) -> Tensor:
        """Return the tokens [B, T, S, D] that this block reads, without a graph, of pixels as in `forward`.

        If `block` is the depth, these are the tokens behind the last block.
        """
        B, T = pixels_BTCHW.shape[:2]
        x_MSD = self.vit.embed(self._normalised(pixels_BTCHW).flatten(0, 1))
        return self._run(x_MSD, T, range(block)).unflatten(0, (B, T))

    def _normalised(self, pixels: Tensor) -> Tensor:
        scaled = pixels / 255 if pixels.dtype == torch.uint8 else pixels.float()
        return (scaled - self.mean_311) / self.std_311

    def _logits(self, x_MSD: Tensor, num_frames: int, head_keep_BD: Tensor | None) -> Tensor:
        # In float32 whatever the precision: it costs nothing here, and a mean and a loss want the digits.
        with torch.autocast(x_MSD.device.type, enabled=False):
            cls_BTD = x_MSD[:, 0].float().unflatten(0, (-1, num_frames))
            if self.temporal is not None:
                cls_BTD = self.temporal(cls_BTD)
            features_BD = self.vit.norm(cls_BTD.mean(1))
            if self.pool is not None:
                features_BD = features_BD + self.pool(self.vit.norm(x_MSD.float()).unflatten(0, (-1, num_frames)))
            if head_keep_BD is not None:
                features_BD = features_BD * head_keep_BD
            return self.head(features_BD)

    def run_blocks(self, pixels_MCHW: Tensor, num_frames: int) -> Tensor:
        """Return the tokens behind the last block, before the final norm, of normalised pixels.

        These are all tokens, [M, S, D], or CLS alone, [M, 1, D], if nothing else is read there.
        """
        with _graph_if(self.first_trained_block() < 0):
            x_MSD = self.vit.embed(pixels_MCHW)
        return self._run(x_MSD, num_frames, range(len(self.vit.blocks)))

    def _run(self, x_MSD: Tensor, num_frames: int, blocks: range) -> Tensor:
        first, last, reads_cls_only = self.first_trained_block(), len(self.vit.blocks) - 1, self.reads_cls_only()
        # With only CLS to compute, the last block is cheap, but would keep nearly as much as any other. Recompute it in
        # the backward pass, except (a) if it alone saves activations, (b) with a spatial kernel, whose convolution is
        # too slow for that, (c) with attention over time, or (d) with custom code, which may draw random numbers.
        plain = type(self) is VideoClassifier and self.time is None and not self.adapters_are_custom
        adapters = self._adapters_of(last, tuple(PLACES))
        spatial = any(isinstance(a, STAdapter) and a.conv.kernel_size[1:] != (1, 1) for a in adapters)
        again = reads_cls_only and plain and not spatial and first < last
        for index in blocks:
            run = functools.partial(self.block, index, num_frames=num_frames, cls_only=index == last and reads_cls_only)
            with _graph_if(index >= first):  # below the first trained block nothing needs a gradient
                x_MSD = _recomputed(run, x_MSD) if again and index == last else run(x_MSD)
        return x_MSD

    def reads_cls_only(self) -> bool:
        """Return True if nothing but CLS is read behind the last block."""
        # What CLS gathers from the patches in a custom adapter is not known: then all tokens are computed.
        behind = self._adapters_of(len(self.vit.blocks) - 1, PLACES_BEHIND)
        return self.pool is None and not (self.adapters_are_custom and any(map(_adapts_cls, behind)))

    def block(self, index: int, x_MSD: Tensor, num_frames: int, cls_only: bool) -> Tensor:
        """Return the tokens behind one block and all that is around it, [M, S, D].

        With `cls_only` they are CLS alone, [M, 1, D]: the patches' queries and MLP are left out, and so is an adapter
        behind the attention that does not touch CLS.
        """
        block, key = self.vit.blocks[index], str(index)
        input_MSD = x_MSD
        if self.time is not None:
            x_MSD = self.time(x_MSD, index)
        if key in self.before:
            x_MSD = self.before[key](x_MSD, num_frames)
        seen_MSD = x_MSD
        if self.prompts:
            prompts_MPD = self.prompts[index].to(x_MSD.dtype).expand(len(x_MSD), -1, -1)
            seen_MSD = torch.cat([x_MSD, prompts_MPD], dim=1)
        attended_MSD = block.attend(seen_MSD, cls_only, self.lora[index] if self.lora else None)
        S = 1 if cls_only else x_MSD.shape[1]
        x_MSD = x_MSD[:, :S] + attended_MSD[:, :S]
        behind = {place: getattr(self, place)[key] for place in PLACES_BEHIND if key in getattr(self, place)}
        if cls_only:
            behind = {place: adapter for place, adapter in behind.items() if _adapts_cls(adapter)}
        if "after" in behind:
            x_MSD = behind["after"](x_MSD, num_frames)
        x_MSD = x_MSD + (_recomputed(block.mlp, x_MSD) if self.recompute else block.mlp(x_MSD))
        if "after_mlp" in behind:
            x_MSD = behind["after_mlp"](x_MSD, num_frames)
        if "parallel" in behind:
            x_MSD = behind["parallel"](input_MSD[:, :S], num_frames, onto_MSD=x_MSD)
        return x_MSD

    def around(self, block: int) -> list[Any]:
        """Return the modules and parameters in and around one block: the block, its adapters, LoRA and prompts."""
        items = [part[block] for part in (self.lora, self.prompts) if part]
        return [self.vit.blocks[block], *self._adapters_of(block, tuple(PLACES)), *items]

    def first_trained_block(self) -> int:
        """Return the lowest block with a trained parameter in or around it: -1 if one is below, the depth if none."""
        behind = [part for part in (self.temporal, self.pool) if part is not None]
        trained = {parameter for parameter in self.parameters() if parameter.requires_grad}
        trained -= _parameters(self.head, self.vit.norm, *behind)
        by_block = [_parameters(*self.around(block)) for block in range(len(self.vit.blocks))]
        if trained.difference(*by_block):  # the embedding, attention over time, or what a derived model adds
            return -1
        return next((block for block, here in enumerate(by_block) if trained & here), len(by_block))

    def frozen_blocks(self) -> int:
        """Return how many blocks, from the lowest, are the frozen backbone's and nothing else: 0 ... depth."""
        adapted = [int(block) for place in PLACES for block in getattr(self, place)]  # a custom one may train nothing
        return max(0, min([self.first_trained_block(), *adapted]))

    def adapters(self) -> list[Any]:
        """Return all adapters, place by place."""
        return [adapter for place in PLACES for adapter in getattr(self, place).values()]

    def dead_adapters(self) -> list[nn.Module]:
        """Return the adapters that can never receive a gradient.

        They are in the last block, behind the attention, where only CLS is read, and CLS passes them untouched.
        """
        if self.pool is not None:
            return []
        behind = self._adapters_of(len(self.vit.blocks) - 1, PLACES_BEHIND)
        return [adapter for adapter in behind if not _adapts_cls(adapter)]

    def parts(self) -> list[Any]:
        """Return the modules that the strategy adds besides adapters."""
        return [part for part in (self.time, self.prompts, self.lora, self.temporal, self.pool) if part is not None]

    def _adapters_of(self, block: int, places: Sequence[str]) -> list[nn.Module]:
        return [getattr(self, place)[str(block)] for place in places if str(block) in getattr(self, place)]


def code(name: str) -> Any:
    """Return the class that a strategy's row names: "file.Class" in this folder."""
    module, _, attribute = name.partition(".")
    return getattr(importlib.import_module(f"stadapter.model.{module}"), attribute)


def _parameters(*parts: nn.Module | Tensor | Any) -> set[Tensor]:
    parameters: set[Tensor] = set()
    for part in parts:
        # A Tensor, not a Parameter: `torch.func.functional_call` puts plain tensors in the parameters' places.
        parameters.update((part,) if isinstance(part, Tensor) else part.parameters())
    return parameters


def _adapts_cls(adapter: nn.Module) -> bool:
    return getattr(adapter, "adapts_cls", False)


def dead_parameters(model: VideoClassifier) -> int:
    """Return the number of parameters in adapters that can never receive a gradient."""
    return sum(parameter.numel() for adapter in model.dead_adapters() for parameter in adapter.parameters())


def _recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return `function(x)`, keeping x alone for the backward pass; the function must draw no random numbers."""
    if not torch.is_grad_enabled():
        return function(x)
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)


def _graph_if(wanted: bool) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if wanted else torch.no_grad()


@contextlib.contextmanager
def seeded(seed: int, purpose: str, *numbers: int) -> Iterator[None]:
    """Draw the random numbers inside from a stream for this purpose, and leave the global one as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, purpose, *numbers))
        yield
