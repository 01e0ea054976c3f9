"""Experiments on adapting a frozen image transformer to video (ST-Adapter, arXiv 2206.13559).

The names below are imported when they are first used, and PyTorch with them.
"""

import importlib
from typing import TYPE_CHECKING, Any

from stadapter.version import __version__

if TYPE_CHECKING:
    from stadapter.model.adapter import STAdapter
    from stadapter.model.attach import (
        adapter_state,
        add_st_adapters,
        clips_of,
        load_adapter_state,
        remove_st_adapters,
        set_num_frames,
    )
    from stadapter.model.model_file import load, load_into, save

__all__ = [
    "STAdapter",
    "__version__",
    "adapter_state",
    "add_st_adapters",
    "clips_of",
    "load",
    "load_adapter_state",
    "load_into",
    "remove_st_adapters",
    "save",
    "set_num_frames",
]

_MODULES = {"STAdapter": "adapter", "load": "model_file", "load_into": "model_file", "save": "model_file"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.model.{_MODULES.get(name, 'attach')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
