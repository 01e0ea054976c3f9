"""Ray itself: started on this machine, or a running cluster joined, and what there is of it."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stadapter.cluster.ray_environment import ray
from stadapter.cluster.resources import Resources
from stadapter.config import ConfigError

PACKAGE = Path(__file__).parents[1]  # the folder of this package, for the nodes of a cluster
REACH_TIMEOUT_S = 5.0


def join(address: str) -> int:
    """Join the running Ray cluster at `address` and return how many GPUs it has. See `cluster.join`."""
    if not ray.is_initialized():
        _check_reachable(address)
        # Its folder, not the module: within a submitted job Ray copies this value, and modules cannot be copied.
        environment: dict[str, Any] = {"py_modules": [str(PACKAGE)]}
        gcs = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
        if gcs and "://" not in gcs:
            environment["env_vars"] = {"RAY_ADDRESS": gcs}  # see `_own_address`
        _init(address, address=address, runtime_env=environment)
    return int(ray.cluster_resources().get("GPU", 0))


def cores_per_gpu() -> int:
    """Of the cluster that was joined: CPU cores for each GPU on the node that has the fewest."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    shares = [int(node.get("CPU", 0) // node["GPU"]) for node in nodes if node.get("GPU", 0)]
    return max(1, min(shares, default=1))


def _check_reachable(address: str) -> None:
    """Knock at the address: Ray itself tries for minutes, and reports each try."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator:
        return  # "auto" and the like: Ray knows at once
    try:
        socket.create_connection((host, int(port)), timeout=REACH_TIMEOUT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--address {address}: nothing answers there ({reason}); see `ray status`") from None


def _init(where: str, **options: Any) -> None:
    try:
        ray.init(logging_level=logging.CRITICAL, log_to_driver=False, **options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"{where}: Ray cannot be started or reached ({str(error).splitlines()[0]})") from None
    for name in ("ray", "ray.tune", "ray.train"):  # after ray.init, which sets levels of its own
        logging.getLogger(name).setLevel(logging.CRITICAL)


@contextlib.contextmanager
def _own_address() -> Iterator[None]:
    """A context in which a Ray that is started here has an address that its processes know.

    Ray Train looks after the resources of its trials by way of an address that it guesses where it is not told. With
    another Ray on the machine it guesses none, and a trial that died keeps its CPUs for ever; or the other one's, which
    knows of no such trial, and the resources of one that runs are taken away.
    """
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    ours = {"RAY_GCS_SERVER_PORT": port, "RAY_ADDRESS": f"{ray.util.get_node_ip_address()}:{port}"}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Cluster:
    """A context in which Ray is up: started here and stopped at the end, or one that was joined before."""

    def __init__(self, resources: Resources) -> None:
        self.resources = resources

    def __enter__(self) -> Cluster:
        wanted = self.resources
        if not ray.is_initialized():
            with _own_address():
                _init(
                    "this machine",
                    address="local",  # also where another cluster runs: that one is joined by --address only
                    num_cpus=os.cpu_count(),
                    num_gpus=wanted.num_gpus,
                    # Ray Train clears up after itself through the dashboard's State API.
                    include_dashboard=wanted.dashboard_port is not None or wanted.processes_per_trial > 1,
                    dashboard_host="127.0.0.1",
                    dashboard_port=wanted.dashboard_port,
                )
        try:
            self._check_capacity()
        except ConfigError:
            ray.shutdown()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        ray.shutdown()

    def _check_capacity(self) -> None:
        there = ray.cluster_resources()
        wanted = self.resources
        needed = wanted.processes_per_trial * wanted.cpus_per_process
        if wanted.decode_on_cluster and needed >= there.get("CPU", 0):
            raise ConfigError(
                f"--decode-on-cluster: a trial takes {needed} of the {there.get('CPU', 0):g} CPUs and leaves none to "
                "decode on; add nodes, or leave it out"
            )
        if needed > there.get("CPU", 0):
            raise ConfigError(
                f"a trial of {wanted.processes_per_trial} processes with {wanted.cpus_per_process} CPUs each "
                f"needs {needed} CPUs; there are {there.get('CPU', 0):g}"
            )

    def trials_at_once(self) -> int:
        """How many trials the resources hold."""
        wanted = self.resources
        cpus = int(ray.cluster_resources()["CPU"]) - wanted.decode_on_cluster
        at_once = cpus // (wanted.processes_per_trial * wanted.cpus_per_process)
        if wanted.num_gpus:
            at_once = min(at_once, wanted.num_gpus * wanted.trials_per_gpu // wanted.processes_per_trial)
        return max(1, at_once)
