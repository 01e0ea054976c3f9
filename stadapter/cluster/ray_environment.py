"""Ray, imported only once its environment is prepared: take `ray` and `tune` from here, never from Ray itself.

Ray reads most of these switches while it is imported, so their order is this module's business and nobody else's.
"""

from __future__ import annotations

import os

# Before Ray is imported: no banners, no usage reports, no result files that nobody reads, no 2 s wait per report.
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

# Ray's switch for machines that are no cluster: its ports listen on loopback alone. Read while Ray is imported; a
# command that joins a cluster sets it before that (`stadapter.ablation.script`).
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

if os.environ.get("STADAPTER_CACHE"):  # Tune gives every trial a working directory of its own
    os.environ["STADAPTER_CACHE"] = os.path.abspath(os.environ["STADAPTER_CACHE"])

import ray
from ray import tune

__all__ = ["ray", "tune"]
