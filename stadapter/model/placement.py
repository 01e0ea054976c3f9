"""Where adapters can be in a transformer block, which blocks carry them, and of which kind they are."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from stadapter.config import AdapterConfig, ConfigError
from stadapter.model.adapter import STAdapter
from stadapter.model.baselines import PlainAdapter

AdapterClass = Callable[[int, AdapterConfig], nn.Module]

# Places in a block (see stadapter.model.classifier), and the placements that put an adapter there.
PLACES = {
    "before": ("before_mhsa", "both"),
    "after": ("after_mhsa", "both"),
    "after_mlp": ("after_mlp",),
    "parallel": ("parallel",),
}
PLACES_BEHIND = ("after", "after_mlp", "parallel")  # what these add is read after the block's attention


def blocks_with_adapter(adapter: AdapterConfig | None, place: str, depth: int) -> tuple[int, ...]:
    """The blocks with an adapter at this place, ascending. ConfigError for a block that the backbone does not have."""
    if adapter is None or adapter.placement not in PLACES[place]:
        return ()
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


def make_adapter(adapter: AdapterConfig, width: int, *, plain: bool, own: AdapterClass | None = None) -> nn.Module:
    """One adapter for tokens of this width; `plain`: without convolution; `own`: of this class."""
    if own is not None:
        return own(width, adapter)
    if plain:
        return PlainAdapter(width, adapter.bottleneck_width)
    return STAdapter(
        width,
        adapter.bottleneck_width,
        adapter.kernel_size,
        adapter.activation,
        adapt_cls=adapter.adapt_cls,
        zero_init_conv=adapter.zero_init_conv,
    )
