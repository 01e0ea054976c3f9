"""The video classifier: a frozen image ViT, adapters between its branches, and a linear head.

    frames -> tokens -> [before adapter -> + attention -> after adapter -> + MLP] x depth -> CLS, mean over frames
    -> final norm -> dropout -> head -> logits

Shapes: B clips, T frames, M = B * T images, S = 1 + N tokens (CLS first), D width, K classes.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from stadapter.adapter import STAdapter
from stadapter.backbones import load_backbone
from stadapter.config import AdapterConfig, ConfigError, Recipe, derive_seed
from stadapter.strategies import freeze, uses_adapters
from stadapter.vit import ViT

Triple = tuple[float, float, float]


class VideoClassifier(nn.Module):
    """Pixels [B, T, 3, H, W] in, logits [B, K] out (float32).

    `before` and `after` hold the adapters before attention and after its residual, keyed by 0-based block index.
    `adapter` None builds none. The adapters' and the head's initial values depend on `seed` alone, each on its own
    stream: two models with the same seed start with the same head, and with the same adapters where both have them.
    """

    def __init__(
        self,
        vit: ViT,
        num_classes: int,
        adapter: AdapterConfig | None,
        seed: int = 0,
        mean: Triple = (0.5, 0.5, 0.5),
        std: Triple = (0.5, 0.5, 0.5),
    ) -> None:
        super().__init__()
        self.vit = vit
        self.before = nn.ModuleDict()
        self.after = nn.ModuleDict()
        if adapter is not None:
            shape = (vit.shape.width, adapter.bottleneck_width, adapter.kernel_size, adapter.activation)
            for place, adapters in (("before", self.before), ("after", self.after)):
                if adapter.placement in (f"{place}_mhsa", "both"):
                    for block in adapted_blocks(adapter, vit.shape.depth):
                        with _seeded(seed, f"init/{place}", block):
                            adapters[str(block)] = STAdapter(*shape)
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
                f"the after_mhsa adapter of the last block ({vit.shape.depth - 1}) can never receive a gradient, since "
                f"only CLS is read after its attention: its {dead:,} parameters are built and counted, but not "
                "computed or trained; leave that block out of adapter.blocks, or use before_mhsa, to drop them",
                stacklevel=2,
            )

    @property
    def width(self) -> int:
        """D: the length of the vector that the head reads."""
        return self.vit.shape.width

    def forward(self, pixels_BTCHW: Tensor, head_keep_BD: Tensor | None = None) -> Tensor:
        """Pixels, uint8 in 0..255 or float in [0, 1] -> logits [B, K], float32.

        `head_keep_BD` is dropout before the head: 0 where a feature is dropped, 1 / (1 - p) where it is kept. The
        caller draws it, so that it need not depend on how clips are spread over GPUs; without it nothing is dropped.
        """
        scaled = pixels_BTCHW / 255 if pixels_BTCHW.dtype == torch.uint8 else pixels_BTCHW.float()
        return self.forward_normalised((scaled - self.mean_311) / self.std_311, head_keep_BD)

    def forward_normalised(self, pixels_BTCHW: Tensor, head_keep_BD: Tensor | None = None) -> Tensor:
        """As `forward`, for float pixels that are normalised already."""
        B, T = pixels_BTCHW.shape[:2]
        x_MSD = self._blocks(pixels_BTCHW.flatten(0, 1), T)
        # In float32 whatever the precision: it costs nothing here, and a mean and a loss want the digits.
        with torch.autocast(x_MSD.device.type, enabled=False):
            features_BD = self.vit.norm(x_MSD[:, 0].float().view(B, T, -1).mean(1))
            if head_keep_BD is not None:
                features_BD = features_BD * head_keep_BD
            return self.head(features_BD)

    def _blocks(self, pixels_MCHW: Tensor, num_frames: int) -> Tensor:
        """Normalised pixels -> CLS tokens [M, 1, D] after the last block, before the final norm."""
        first, last = self._first_trained_block(), len(self.vit.blocks) - 1
        with _graph_if(first < 0):
            x_MSD = self.vit.embed(pixels_MCHW)
        for index, block in enumerate(self.vit.blocks):
            with _graph_if(index >= first):  # below the first trained block nothing needs a gradient
                if str(index) in self.before:
                    x_MSD = self.before[str(index)](x_MSD, num_frames)
                if index == last:
                    # Only CLS is read from here on: the patches' queries and MLP are left out, and so is an adapter
                    # after attention, which does not touch CLS.
                    x_MSD = x_MSD[:, :1] + block.attend(x_MSD, cls_only=True)
                else:
                    x_MSD = x_MSD + block.attend(x_MSD)
                    if str(index) in self.after:
                        x_MSD = self.after[str(index)](x_MSD, num_frames)
                x_MSD = x_MSD + block.mlp(x_MSD)
        return x_MSD

    def _first_trained_block(self) -> int:
        """The lowest block with a trained parameter in it or its adapters; -1: below the blocks; depth: none."""
        blocks = {len(self.vit.blocks)}
        for name, _ in trainable_parameters(self).items():
            group, *path = name.split(".")
            if group in ("before", "after"):
                blocks.add(int(path[0]))
            elif path[0] == "blocks":
                blocks.add(int(path[1]))
            elif group == "vit" and path[0] != "norm":
                blocks.add(-1)
        return min(blocks)

    def dead_adapters(self) -> list[nn.Module]:
        """The adapters that can never receive a gradient."""
        last = str(len(self.vit.blocks) - 1)
        return [self.after[last]] if last in self.after else []


def adapted_blocks(adapter: AdapterConfig, depth: int) -> tuple[int, ...]:
    """The blocks that carry adapters, ascending. ConfigError for a block that the backbone does not have."""
    if adapter.blocks is None:
        return tuple(range(depth))
    if not adapter.blocks:
        raise ConfigError("adapter.blocks is empty: name a block, or use strategy linear_probe for no adapters")
    for block in adapter.blocks:
        if not 0 <= block < depth:
            raise ConfigError(
                f"adapter.blocks = {adapter.blocks}: there is no block {block}; the backbone has 0 to {depth - 1}"
            )
    return tuple(sorted(adapter.blocks))


def build_model(
    recipe: Recipe, *, weights_file: Path | None = None, device: torch.device | str = "cpu"
) -> VideoClassifier:
    """The recipe's model, frozen as its strategy says, float32; on device "meta" without any weights. ConfigError."""
    data = recipe.data
    vit, backbone = load_backbone(recipe.backbone, data.frame_size, weights_file=weights_file, device=device)
    adapter = recipe.adapter if uses_adapters(recipe.strategy) else None
    # On the CPU also for a GPU: its random numbers are the same everywhere.
    with torch.device("meta" if torch.device(device).type == "meta" else "cpu"):
        model = VideoClassifier(vit, data.num_classes, adapter, recipe.seed, backbone.mean, backbone.std)
    freeze(model, recipe.strategy, recipe.train_final_norm)
    return model.to(device)


def cast_frozen(model: VideoClassifier, dtype: torch.dtype) -> None:
    """Store the frozen matrices in `dtype`, as the paper does on GPUs; then run the model under autocast to `dtype`.

    Half the memory, and no cast at every step. What is trained stays in float32, and so do the frozen norms and
    embeddings (1 % of the weights), which autocast wants in float32 anyway.
    """
    for module in model.vit.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)


def dead_parameters(model: VideoClassifier) -> int:
    """How many parameters sit in adapters that can never receive a gradient."""
    return sum(parameter.numel() for adapter in model.dead_adapters() for parameter in adapter.parameters())


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What an optimiser is given, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint of the training needs, by name: detached, not copied."""
    return {name: parameter.detach() for name, parameter in trainable_parameters(model).items()}


def load_trainable_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """The inverse of `trainable_state`, in place. ConfigError unless names and shapes are exactly the model's."""
    parameters = trainable_parameters(model)
    missing, unexpected = sorted(parameters.keys() - state.keys()), sorted(state.keys() - parameters.keys())
    if missing or unexpected:
        raise ConfigError(
            f"the checkpoint is of another model: it lacks {_some(missing)}, and has {_some(unexpected)} "
            "that the model does not train; use the recipe it was made with"
        )
    for name, parameter in parameters.items():
        if parameter.shape != state[name].shape:
            raise ConfigError(
                f"the checkpoint is of another model: {name} is {list(state[name].shape)}, but the model's is "
                f"{list(parameter.shape)}; use the recipe it was made with"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) or "nothing"
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _graph_if(wanted: bool) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if wanted else torch.no_grad()


@contextlib.contextmanager
def _seeded(seed: int, purpose: str, *numbers: int) -> Iterator[None]:
    """Random numbers drawn inside come from a stream of their own, and the global one is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, purpose, *numbers))
        yield
