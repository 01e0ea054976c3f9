"""The options of a sweep beside its question: which trials run, where they run, and what is kept."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from pathlib import Path

from stadapter.config import ConfigError
from stadapter.training.options import TrainOptions
from stadapter.trials.sweep import DEFAULT_OUTPUT, DEFAULT_STORE

DEFAULT_MAX_FAILURES = 2
BOUNDS = {"num_gpus": 0, "num_workers": 0, "dashboard_port": 1}
BOUNDS |= dict.fromkeys(
    ("gpus_per_trial", "trials_per_gpu", "processes_per_trial", "cpus_per_process", "max_failures"), 1
)


@dataclass(frozen=True)
class SweepOptions:
    """The request for a sweep. Nothing here changes a number or a trial's identity.

    Raises ConfigError if a number is out of its range; the message names the flag.
    """

    output: Path = DEFAULT_OUTPUT  # trials and tables; a finished trial found here is not run again
    tracking_uri: str | None = DEFAULT_STORE  # the MLflow store that mirrors the runs; None: no mirror
    only: tuple[str, ...] = ()  # words in the names of the trials to run; empty: all of them
    force: bool = False  # run finished trials again, and forget failures
    max_failures: int = DEFAULT_MAX_FAILURES  # of a trial over all launches, after which it is given up
    num_gpus: int | None = None  # None: all GPUs of this machine, or of the cluster at `address`
    gpus_per_trial: int = 1
    trials_per_gpu: int = 1
    processes_per_trial: int | None = None  # without GPUs; None: 1
    cpus_per_process: int | None = None  # None: 1 without GPUs; with GPUs, the cores shared equally
    num_workers: int | None = None  # loader processes per process; None: 0 without GPUs, else one less than its cores
    address: str | None = None  # of a running Ray cluster; None: Ray starts on this machine
    dashboard_port: int | None = None
    decode_on_cluster: bool = False
    gpu: str | None = None  # the GPU that a plan is for
    # Of each trial. Loader processes and the remote loader are set by the fields above.
    training: TrainOptions = field(default_factory=TrainOptions)
    command: str = "run_sweep"  # shown to other launches that meet these trials

    def __post_init__(self) -> None:
        for name, least in BOUNDS.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
        if self.training.num_workers or self.training.remote_loader is not None:
            raise ConfigError("training: set num_workers and decode_on_cluster of the sweep instead")

    def processes(self, num_gpus: int) -> int:
        """Return how many processes share a trial, when the sweep uses `num_gpus` GPUs in all."""
        return self.gpus_per_trial if num_gpus else self.processes_per_trial or 1

    def check_gpus(self, num_gpus: int) -> None:
        """Raise ConfigError if options about GPUs contradict their number or each other."""
        if not num_gpus and self.gpus_per_trial > 1:
            raise ConfigError(
                f"--gpus-per-trial {self.gpus_per_trial}: there are no GPUs to use; see --processes-per-trial"
            )
        if not num_gpus and self.trials_per_gpu > 1:
            raise ConfigError(f"--trials-per-gpu {self.trials_per_gpu}: there are no GPUs to use")
        if self.trials_per_gpu > 1 and self.gpus_per_trial > 1:
            raise ConfigError(
                f"--trials-per-gpu {self.trials_per_gpu}: not together with --gpus-per-trial {self.gpus_per_trial}"
            )
        if num_gpus and self.gpus_per_trial > num_gpus:
            raise ConfigError(f"--gpus-per-trial {self.gpus_per_trial}: more than the {num_gpus} GPUs to use in all")
        if num_gpus and self.processes_per_trial:
            raise ConfigError("--processes-per-trial is for training without GPUs; use --gpus-per-trial")


def check_port(flag: str, port: int) -> None:
    """Raise ConfigError if nothing can listen on this port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"{flag} {port}: cannot be used ({reason}); choose another port") from None
