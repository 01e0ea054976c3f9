"""Provenance: the code, the libraries and the machine that made a record."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_LIBRARIES = (
    "torch",
    "torchvision",
    "timm",
    "open_clip_torch",
    "ray",
    "mlflow",
    "decord",
    "av",
    "numpy",
    "scikit-learn",
)


@cache
def provenance() -> dict[str, Any]:
    """Return the fields of a record that a reader needs to judge or repeat its numbers.

    These are `versions` by library, `git_commit`, `git_dirty` and `host`.
    """
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            versions[library] = "not installed"
    commit, dirty = _git()
    return {"versions": versions, "git_commit": commit, "git_dirty": dirty, "host": platform.node()}


def _git() -> tuple[str, bool]:
    """Return the commit of the source tree that this package runs from, and True if the tree has changes.

    Outside a source tree, a submitted job knows its commit (`stadapter.cluster.submit.job`); else it is "unknown".
    """
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # A package installed into another project's tree is not described by that project's commit.
        if not git("ls-files", Path(__file__).name):
            return _submitted()
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return _submitted()


def _submitted() -> tuple[str, bool]:
    commit, changes, _ = os.environ.get("STADAPTER_COMMIT", "unknown").partition("+changes")
    return commit, bool(changes)
