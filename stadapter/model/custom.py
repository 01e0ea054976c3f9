"""Custom arms: an adapter, a placement or a strategy from one file outside the package.

    from stadapter.ablation import Arm, main
    from stadapter.model.custom import custom_adapter

    class MyAdapter(nn.Module):
        def __init__(self, width: int, adapter: AdapterConfig) -> None: ...
        def forward(self, x_MSD: Tensor, num_frames: int, onto_MSD: Tensor | None = None) -> Tensor: ...

    main(__doc__, ..., make_arm=lambda recipe, value: Arm("mine", custom_adapter(MyAdapter)))

The trial's identity includes the file's content, not its path. The training processes import the file by its path, so
on a cluster the path must be on a file system that every node sees. `docs/own_idea.md` is the guide.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stadapter.config import ConfigError, CustomCode


def custom_adapter(adapter: type) -> dict[str, Any]:
    """Return the fields of an arm with custom adapters. The class must be defined at the top level of its file.

    An adapter is built as `adapter(width, recipe.adapter)`, once per place and block, with random numbers seeded for
    that place, and called like `STAdapter.forward`, with tokens [M, 1 + N, D]. Only a class with `adapts_cls = True`
    may change CLS. Raises ConfigError if a trial could not import the class.
    """
    return _fields(adapter, "adapter")


def custom_model(build: Callable[..., Any]) -> dict[str, Any]:
    """Return the fields of an arm with a custom model. The function must be defined at the top level of its file.

    The function is called as `build(recipe, vit, mean, std)` with the loaded backbone and its normalisation. It returns
    a `stadapter.model.classifier.VideoClassifier` or an instance of a derived class, with `requires_grad` set on the
    trained parameters; `stadapter.model.build.classifier` makes the recipe's model to start from. Raises ConfigError if
    a trial could not import the function.
    """
    return _fields(build, "model")


def load(own: CustomCode, name: str) -> Any:
    """Return a class or function from a custom file. Raises ConfigError if the file is gone, changed or lacks it."""
    module_name = f"stadapter_own_{own.sha256[:16]}"
    if module_name not in sys.modules:
        path = Path(own.file)
        if not path.is_file():
            raise ConfigError(
                f"own.file = {path}: is not there; on a cluster it must lie on a file system that every node shares"
            )
        if _digest(path) != own.sha256:
            raise ConfigError(f"own.file = {path}: has changed since this trial was described; start its script again")
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        _offer_old_names()
        try:
            spec.loader.exec_module(module)
        except BaseException:  # Ctrl-C too: leave no half-loaded module behind
            del sys.modules[module_name]
            raise
    try:
        return getattr(sys.modules[module_name], name)
    except AttributeError:
        raise ConfigError(f"own.file = {own.file}: has no {name} at its top") from None


# Files written for the first layout of the package name these modules. Their content is part of a trial's identity, so
# they cannot be edited without becoming another trial.
_OLD_MODULES = {
    "adapter": "model.adapter",
    "backbones": "backbone.load",
    "lean": "backbone.ops",
    "own": "model.custom",
    "placement": "model.placement",
    "rivals": "model.baselines",
    "vit": "backbone.vit",
}
own_adapter, own_model = custom_adapter, custom_model  # likewise


def _offer_old_names() -> None:
    """Let a custom file import what it needs from where it was in the first layout of the package."""
    for old, new in _OLD_MODULES.items():
        sys.modules.setdefault(f"stadapter.{old}", importlib.import_module(f"stadapter.{new}"))
    package, names = importlib.import_module("stadapter.model"), importlib.import_module("stadapter.model.build")
    for name in ("Triple", "VideoClassifier", "build_model", "classifier"):
        setattr(package, name, getattr(names, name))


def _fields(code: Any, kind: str) -> dict[str, Any]:
    file = inspect.getsourcefile(code)
    if file is None or not Path(file).is_file() or code.__qualname__ != code.__name__:
        raise ConfigError(f"{code.__qualname__}: must stand at the top of a Python file, where a trial can import it")
    path = Path(file).resolve()
    unused = "model" if kind == "adapter" else "adapter"
    return {
        "own.file": str(path),
        "own.sha256": _digest(path),
        f"own.{kind}": code.__name__,
        f"own.{unused}": "",
    }


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
