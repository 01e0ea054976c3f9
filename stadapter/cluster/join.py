"""Joining a running Ray cluster. Ray loads here and not before: it reads who may reach it while it is imported."""

from __future__ import annotations

import os
import socket


def join_cluster(address: str) -> int:
    """Join the running Ray cluster at `address` and return how many GPUs it has. Raises ConfigError if none answers."""
    # Ray's switch for the address of this machine in a cluster: 127.0.0.1, or the one at which others reach it.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0" if _listens_on_loopback_alone(address) else "1"
    from stadapter.cluster.ray_runtime import join

    return join(address)


def _listens_on_loopback_alone(address: str) -> bool:
    """Whether the cluster at `address` can be reached from this machine alone, as one of a one-node Slurm job can."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "localhost") or not port.isdigit():
        return False
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # sends nothing: asks which address this machine has for others
            mine = probe.getsockname()[0]
        socket.create_connection((mine, int(port)), timeout=1).close()
    except OSError:
        return True
    return False
