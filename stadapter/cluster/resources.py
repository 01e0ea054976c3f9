"""How much of a machine or a cluster a sweep uses. This module is light: it does not load Ray."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Resources:
    """The share of a machine or a cluster that a sweep may use, and how its trials divide it."""

    num_gpus: int = 0
    processes_per_trial: int = 1  # data parallel; with GPUs, each process has one
    cpus_per_process: int = 1
    trials_per_gpu: int = 1  # small trials that share a GPU; with processes_per_trial 1 only
    address: str | None = None  # of a running cluster; None: start Ray on this machine
    dashboard_port: int | None = None
    decode_on_cluster: bool = False  # at least one CPU stays free of trials
