"""What a record says about the code and the libraries that made it."""

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
    """Library versions, code version and machine: what a reader needs to judge or repeat a number."""
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            versions[library] = "not installed"
    commit, dirty = _git()
    return {"versions": versions, "git_commit": commit, "git_dirty": dirty, "host": platform.node()}


def _git() -> tuple[str, bool]:
    """Commit of the source tree this package runs from, and whether it has changes.

    Outside of one: what the job was submitted from, where it is one (`stadapter.cluster.submit.job`), else "unknown".
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
