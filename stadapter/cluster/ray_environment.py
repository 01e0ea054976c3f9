"""Ray, imported only once its environment is prepared: take `ray` and `tune` from here, never from Ray itself.

Ray reads most of these variables while it is imported, so no other module has to think of the order. A module that
needs a part of Ray beside these two imports this one first.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

# No banners, no usage reports, no result files that nothing reads, no 2 s wait for each report.
os.environ.update(
    RAY_AIR_NEW_OUTPUT="0",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_TRAIN_ENABLE_PRINT_PATCH="0",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.1",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
    TUNE_DISABLE_SIGINT_HANDLER="1",
    TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S="0",
)

# All of Ray's ports listen on loopback alone, in spite of the name. Joining a cluster sets it before this module loads
# (`cluster.join`).
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

if os.environ.get("STADAPTER_CACHE"):  # Tune changes the working directory of each trial
    os.environ["STADAPTER_CACHE"] = os.path.abspath(os.environ["STADAPTER_CACHE"])

import ray

if TYPE_CHECKING:
    from ray import tune

__all__ = ["ray", "tune", "variables"]


def __getattr__(name: str) -> Any:
    """Load Ray Tune on its first use: it takes 2 s more than Ray, which alone serves questions to a cluster."""
    if name != "tune":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from ray import tune

    return tune


@contextlib.contextmanager
def variables(**values: str) -> Iterator[None]:
    """Set environment variables within a context, and put back what was there before."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
