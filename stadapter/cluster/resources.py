"""How much of a machine or a cluster a sweep uses. Light: Ray is not loaded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Resources:
    """What the sweep may use."""

    num_gpus: int = 0
    processes_per_trial: int = 1  # data parallel; with GPUs, each process has one
    cpus_per_process: int = 1
    trials_per_gpu: int = 1  # small trials that share a GPU; with processes_per_trial 1 only
    address: str | None = None  # of a running cluster; None: start Ray on this machine
    dashboard_port: int | None = None
    decode_on_cluster: bool = False  # a CPU at least stays free of trials
