"""Ray itself: started on this machine or joined on a cluster, with the check that a trial fits into it."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import Any

from stadapter.cluster.ray_environment import ray, variables
from stadapter.cluster.resources import Resources
from stadapter.config import ConfigError, first_line

PACKAGE = Path(__file__).parents[1]  # the folder of this package, for the nodes of a cluster
REACH_TIMEOUT_S = 5.0


def join(address: str) -> int:
    """Join the running Ray cluster at `address` and return how many GPUs it has. Callers use `cluster.join`."""
    if not ray.is_initialized():
        _check_reachable(address)
        # The folder, not the module: within a submitted job Ray copies this value, and modules cannot be copied.
        environment: dict[str, Any] = {"py_modules": [str(PACKAGE)]}
        gcs = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
        if gcs and "://" not in gcs:
            environment["env_vars"] = {"RAY_ADDRESS": gcs}  # see `_address_for_a_new_ray`
        _init(address, address=address, runtime_env=environment)
    return int(ray.cluster_resources().get("GPU", 0))


def cores_per_gpu() -> int:
    """Return how many CPU cores there are for each GPU, on the node of the joined cluster that has the fewest."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    shares = [int(node.get("CPU", 0) // node["GPU"]) for node in nodes if node.get("GPU", 0)]
    return max(1, min(shares, default=1))


def _check_reachable(address: str) -> None:
    """Raise ConfigError if nothing answers at the address. Ray itself would try for minutes, and report each try."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator:
        return  # "auto" and the like: Ray finds out at once
    try:
        socket.create_connection((host, int(port)), timeout=REACH_TIMEOUT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--address {address}: nothing answers there ({reason}); see `ray status`") from None


def _init(where: str, **options: Any) -> None:
    """Start or join Ray, without its log. Raises ConfigError, which names `where`, if that fails."""
    try:
        ray.init(logging_level=logging.CRITICAL, log_to_driver=False, **options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"{where}: Ray cannot be started or reached ({first_line(error)})") from None
    for name in ("ray", "ray.tune", "ray.train"):  # after ray.init, which sets other levels
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _address_for_a_new_ray() -> dict[str, str]:
    """Return the variables that give a Ray on this machine a fixed address, which its processes know.

    Ray Train watches over the resources of its trials through the address of Ray, and guesses that address if no
    variable names it. With another Ray on the machine there are two ways to go wrong: it guesses none, and a trial that
    died keeps its CPUs for ever; or it guesses the other one, which knows no such trial, and takes the resources of a
    running trial away.
    """
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    return {"RAY_GCS_SERVER_PORT": port, "RAY_ADDRESS": f"{ray.util.get_node_ip_address()}:{port}"}


class Cluster:
    """A context in which Ray is up, joined before or started here, and at whose end it is shut down."""

    def __init__(self, resources: Resources) -> None:
        self.resources = resources

    def __enter__(self) -> Cluster:
        wanted = self.resources
        if not ray.is_initialized():
            with variables(**_address_for_a_new_ray()):
                _init(
                    "this machine",
                    address="local",  # even if another cluster runs here: only --address joins one
                    num_cpus=os.cpu_count(),
                    num_gpus=wanted.num_gpus,
                    # Ray Train, which several processes need, frees its resources through the dashboard's State API.
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
        """Raise ConfigError if Ray has fewer CPUs than one trial needs."""
        cpus = ray.cluster_resources().get("CPU", 0)
        wanted = self.resources
        needed = wanted.processes_per_trial * wanted.cpus_per_process
        if wanted.decode_on_cluster and needed >= cpus:
            raise ConfigError(
                f"--decode-on-cluster: a trial takes {needed} of the {cpus:g} CPUs and leaves none to "
                "decode on; add nodes, or leave it out"
            )
        if needed > cpus:
            raise ConfigError(
                f"a trial of {wanted.processes_per_trial} processes with {wanted.cpus_per_process} CPUs each "
                f"needs {needed} CPUs; there are {cpus:g}"
            )

    def trials_at_once(self) -> int:
        """Return how many trials the resources hold, at least 1."""
        wanted = self.resources
        cpus = int(ray.cluster_resources()["CPU"]) - wanted.decode_on_cluster
        at_once = cpus // (wanted.processes_per_trial * wanted.cpus_per_process)
        if wanted.num_gpus:
            at_once = min(at_once, wanted.num_gpus * wanted.trials_per_gpu // wanted.processes_per_trial)
        return max(1, at_once)
