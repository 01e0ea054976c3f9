"""Joining a running Ray cluster. This module is light: Ray reads the variable that is set here while it is imported."""

from __future__ import annotations

import os
import socket


def join_cluster(address: str) -> int:
    """Join the running Ray cluster at `address` and return how many GPUs it has. Raises ConfigError if none answers."""
    # "0": this machine's address in the cluster is 127.0.0.1. "1": it is the one at which other machines reach it.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0" if _only_on_loopback(address) else "1"
    from stadapter.cluster.ray_runtime import join

    return join(address)


def _only_on_loopback(address: str) -> bool:
    """Return True if the cluster can be reached from this machine alone, as that of a Slurm job of one node."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "localhost") or not port.isdigit():
        return False
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # sends nothing: it only chooses this machine's address for others
            address_for_others = probe.getsockname()[0]
        socket.create_connection((address_for_others, int(port)), timeout=1).close()
    except OSError:
        return True
    return False
