"""The places of adapters in a transformer block, and the blocks that carry them."""

from __future__ import annotations

from stadapter.config import AdapterConfig, ConfigError

# A place in a block (see stadapter.model.classifier) -> the placements that put an adapter there.
PLACES = {
    "before": ("before_mhsa", "both"),
    "after": ("after_mhsa", "both"),
    "after_mlp": ("after_mlp",),
    "parallel": ("parallel",),
}
PLACES_BEHIND = ("after", "after_mlp", "parallel")  # what an adapter there adds is read after the block's attention


def blocks_with_adapter(adapter: AdapterConfig | None, place: str, depth: int) -> tuple[int, ...]:
    """Return the blocks with an adapter at this place, ascending.

    Raises ConfigError if no block is named, or one that the backbone does not have.
    """
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
