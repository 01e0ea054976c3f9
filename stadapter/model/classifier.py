"""The video classifier: a frozen image ViT, adapters between its branches, and a linear head.

    frames -> tokens -> block x depth -> CLS, mean over frames -> final norm -> dropout -> head -> logits

    block:  u = before(x);  v = after(u + attention(u));  w = after_mlp(v + MLP(v));  w + parallel's branch(x)

Each placement is an adapter X + f(X), or nothing. `parallel` stands beside the whole block: its branch reads the
block's input and is added to the block's output. What other strategies add is in `stadapter.model.baselines`.

Shapes: B clips, T frames, M = B * T images, S = 1 + N tokens (CLS first), D width, K classes.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, MutableSequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stadapter.backbone.vit import ViT
from stadapter.config import AdapterConfig, BaselineConfig, Strategy, derive_seed
from stadapter.model.adapter import STAdapter
from stadapter.model.baselines import AttentionPool, DividedAttention, LoRA, TemporalTransformer, make_prompts
from stadapter.model.placement import PLACES, PLACES_BEHIND, AdapterClass, blocks_with_adapter, make_adapter
from stadapter.model.state import trainable_parameters

Triple = tuple[float, float, float]


class VideoClassifier(nn.Module):
    """Pixels [B, T, 3, H, W] in, logits [B, K] out (float32).

    `before`, `after`, `after_mlp` and `parallel` hold the adapters, keyed by 0-based block index; `adapter` None builds
    none. `strategy` decides what kind they are, unless `own_adapter` does, and which of `lora`, `prompts`, `time`,
    `temporal` and `pool` there is.
    The adapters' and the head's initial values depend on `seed` alone, each on its own stream: two models with the
    same seed start with the same head, and with the same adapters where both have them.
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
        own_adapter: AdapterClass | None = None,
    ) -> None:
        super().__init__()
        self.vit = vit
        self.recompute = False  # what the MLPs keep for the backward pass is computed again there: see TrainOptions
        self.adapters_are_own = own_adapter is not None
        shape, rival = vit.shape, rival or BaselineConfig()
        for place in PLACES:
            adapters = nn.ModuleDict()
            for block in blocks_with_adapter(adapter, place, shape.depth):
                assert adapter is not None
                with _seeded(seed, f"init/{place}", block):
                    adapters[str(block)] = make_adapter(
                        adapter, shape.width, plain=strategy == "adapter", own=own_adapter
                    )
            self.add_module(place, adapters)
        self.lora = cast("MutableSequence[LoRA]", nn.ModuleList())  # one per block, or none
        self.prompts = nn.ParameterList()  # likewise, [P, D]
        for block in range(shape.depth):
            with _seeded(seed, f"init/{strategy}", block):
                if strategy == "lora":
                    self.lora.append(LoRA(shape.width, rival.lora_rank))
                if strategy == "prompt":
                    self.prompts.append(make_prompts(shape, rival.prompts))
        self.time: DividedAttention | None = None
        self.temporal: TemporalTransformer | None = None
        self.pool: AttentionPool | None = None
        with _seeded(seed, f"init/{strategy}"):
            if strategy == "full_space_time":
                self.time = DividedAttention(vit, num_frames)
            if strategy == "temporal":
                self.temporal = TemporalTransformer(shape, num_frames, rival.temporal_blocks)
            if strategy == "attentional_pooling":
                self.pool = AttentionPool(shape, num_frames)
        with _seeded(seed, "init/head"):
            self.head = nn.Linear(vit.shape.width, num_classes)
            nn.init.normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        # Not in the state: constants of the backbone, not weights.
        self.mean_311: Tensor
        self.std_311: Tensor
        self.register_buffer("mean_311", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std_311", torch.tensor(std).view(3, 1, 1), persistent=False)
        if dead := dead_parameters(self):
            warnings.warn(
                f"the adapter behind the attention of the last block ({shape.depth - 1}) can never receive a gradient, "
                f"since only CLS is read from there on: its {dead:,} parameters are built and counted, but not "
                "computed or trained; leave that block out of adapter.blocks, or use before_mhsa, to drop them",
                stacklevel=2,
            )

    @property
    def width(self) -> int:
        """D: the length of the vector that the head reads."""
        return self.vit.shape.width

    def forward(self, pixels_BTCHW: Tensor, head_keep_BD: Tensor | None = None, start: int = 0) -> Tensor:
        """Pixels, uint8 in 0..255 or float in [0, 1] -> logits [B, K], float32.

        `head_keep_BD` is dropout before the head: 0 where a feature is dropped, 1 / (1 - p) where it is kept. The
        caller draws it, so that it need not depend on how clips are spread over GPUs; without it nothing is dropped.
        With a `start` above 0 the pixels are instead tokens [B, T, S, D], as `tokens_before(start)` gives them.
        """
        if start:
            T = pixels_BTCHW.shape[1]
            x_MSD = self._run(pixels_BTCHW.flatten(0, 1), T, range(start, len(self.vit.blocks)))
            return self._logits(x_MSD, T, head_keep_BD)
        return self.forward_normalised(self._normalised(pixels_BTCHW), head_keep_BD)

    def forward_normalised(self, pixels_BTCHW: Tensor, head_keep_BD: Tensor | None = None) -> Tensor:
        """As `forward`, for float pixels that are normalised already."""
        T = pixels_BTCHW.shape[1]
        return self._logits(self.run_blocks(pixels_BTCHW.flatten(0, 1), T), T, head_keep_BD)

    @torch.no_grad()
    def tokens_before(self, block: int, pixels_BTCHW: Tensor) -> Tensor:
        """What this block is given for pixels as in `forward`: tokens [B, T, S, D] without a graph. For the depth:
        what is read behind the last block."""
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
        """Normalised pixels -> tokens after the last block, before the final norm: all if they are pooled, else CLS."""
        with _graph_if(self.first_trained_block() < 0):
            x_MSD = self.vit.embed(pixels_MCHW)
        return self._run(x_MSD, num_frames, range(len(self.vit.blocks)))

    def _run(self, x_MSD: Tensor, num_frames: int, blocks: range) -> Tensor:
        first, last, reads_cls_only = self.first_trained_block(), len(self.vit.blocks) - 1, self.reads_cls_only()
        # With only CLS to compute, the last block is cheap, but would keep nearly as much as any other. It is computed
        # once where it is all there is to keep, where its convolution has spatial extent, and where somebody else adds
        # to it, since that may draw random numbers.
        plain = type(self) is VideoClassifier and self.time is None and not self.adapters_are_own
        adapters = [getattr(self, place)[str(last)] for place in PLACES if str(last) in getattr(self, place)]
        spatial = any(isinstance(a, STAdapter) and a.conv.kernel_size[1:] != (1, 1) for a in adapters)
        again = reads_cls_only and plain and not spatial and first < last
        for index in blocks:
            run = functools.partial(self.block, index, num_frames=num_frames, cls_only=index == last and reads_cls_only)
            with _graph_if(index >= first):  # below the first trained block nothing needs a gradient
                x_MSD = _recomputed(run, x_MSD) if again and index == last else run(x_MSD)
        return x_MSD

    def reads_cls_only(self) -> bool:
        """Whether nothing but CLS is read behind the last block."""
        # What CLS gathers from the patches in an adapter of somebody's own is not known: then all tokens are computed.
        behind = self._adapters_behind(len(self.vit.blocks) - 1)
        return self.pool is None and not (self.adapters_are_own and any(map(_adapts_cls, behind)))

    def block(self, index: int, x_MSD: Tensor, num_frames: int, cls_only: bool) -> Tensor:
        """One block with all that is around it. With `cls_only` nothing but CLS is read behind it: the patches' queries
        and MLP are left out, and so is an adapter behind the attention that does not touch CLS."""
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

    def first_trained_block(self) -> int:
        """The lowest block with a trained parameter in or around it; -1: below the blocks; depth: none."""
        blocks = {len(self.vit.blocks)}
        for name, _ in trainable_parameters(self).items():
            group, *path = name.split(".")
            if group in (*PLACES, "lora", "prompts"):
                blocks.add(int(path[0]))
            elif path[0] == "blocks" and group == "vit":
                blocks.add(int(path[1]))
            elif group not in ("head", "temporal", "pool") and not (group == "vit" and path[0] == "norm"):
                blocks.add(-1)  # the embedding, attention over time, and whatever a derived model adds
        return min(blocks)

    def frozen_blocks(self) -> int:
        """How many blocks, counted from the lowest, are the frozen backbone's and nothing else: 0 ... depth."""
        adapted = [int(block) for place in PLACES for block in getattr(self, place)]  # an own one may train nothing
        return max(0, min([self.first_trained_block(), *adapted]))

    def adapters(self) -> list[nn.Module]:
        """All of them, place by place."""
        return [adapter for place in PLACES for adapter in getattr(self, place).values()]

    def dead_adapters(self) -> list[nn.Module]:
        """The adapters that can never receive a gradient: CLS, all that is read behind the last block, passes by."""
        if self.pool is not None:
            return []
        return [adapter for adapter in self._adapters_behind(len(self.vit.blocks) - 1) if not _adapts_cls(adapter)]

    def _adapters_behind(self, block: int) -> list[nn.Module]:
        return [getattr(self, place)[str(block)] for place in PLACES_BEHIND if str(block) in getattr(self, place)]


def _adapts_cls(adapter: nn.Module) -> bool:
    return getattr(adapter, "adapts_cls", False)


def dead_parameters(model: VideoClassifier) -> int:
    """How many parameters sit in adapters that can never receive a gradient."""
    return sum(parameter.numel() for adapter in model.dead_adapters() for parameter in adapter.parameters())


def _recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)`, keeping x alone for the backward pass; it draws no random numbers."""
    if not torch.is_grad_enabled():
        return function(x)
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)


def _graph_if(wanted: bool) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if wanted else torch.no_grad()


@contextlib.contextmanager
def _seeded(seed: int, purpose: str, *numbers: int) -> Iterator[None]:
    """Random numbers drawn inside come from a stream of their own, and the global one is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, purpose, *numbers))
        yield
