"""Questions to a Ray cluster's dashboard by way of Ray's own clients, with three things that those lack.

- The address counts that is given: Ray's clients prefer $RAY_API_SERVER_ADDRESS and $RAY_ADDRESS to it.
- The token is read for each question: Ray decides once for a process which token it has.
- A dashboard that accepts a connection and says nothing is given up: Ray's clients wait for ever.

Ray loads with this module, in 1.5 s: import it late.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from stadapter.cluster.ray_environment import ray, variables

# isort: split
# After ray_environment, which sets what Ray reads while it is imported.
from ray.job_submission import JobSubmissionClient
from ray.util.state import StateApiClient
from ray.util.state.common import ListApiOptions, StateResource
from ray.util.state.exception import RayStateApiException

from stadapter.config import ConfigError, last_line

LIMIT_S = 20.0
_REFUSED = getattr(ray.exceptions, "AuthenticationError", ())  # a Ray without tokens has no such error
_Answer = TypeVar("_Answer")

for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env"):
    logging.getLogger(name).setLevel(logging.ERROR)  # or each upload prints five lines


def ask(address: str, question: Callable[[JobSubmissionClient], _Answer], *, limited: bool = True) -> _Answer:
    """Return the answer of the Jobs API at `address`. Raises ConfigError if there is none, or not in LIMIT_S."""
    limit_s = LIMIT_S if limited else None
    return _answer(address, lambda headers: question(JobSubmissionClient(address, headers=headers)), limit_s)


def nodes_alive(address: str) -> int:
    """Return how many nodes the cluster has. Raises ConfigError if its dashboard does not answer."""

    def count(headers: dict[str, str]) -> int:
        client = StateApiClient(address, headers=headers)
        options = ListApiOptions(timeout=int(LIMIT_S))
        nodes = client.list(StateResource.NODES, options=options, raise_on_missing_output=False)
        return sum(node["state"] == "ALIVE" for node in nodes)

    return _answer(address, count, LIMIT_S)


def _answer(address: str, question: Callable[[dict[str, str]], _Answer], limit_s: float | None) -> _Answer:
    """Return what `question` makes of the headers of a request; every failure becomes a ConfigError of one line."""
    token = _token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with variables(RAY_API_SERVER_ADDRESS=address):
            return _in_time(lambda: question(headers), limit_s)
    except _REFUSED:
        found = "is not this cluster's" if token else "is missing"
        reason = f"the token {found}; set RAY_AUTH_TOKEN_PATH to the file that holds it"
    except RayStateApiException:  # its text is a paragraph about installing Ray
        reason = "no Ray dashboard answers there"
    except TimeoutError:
        reason = f"no Ray dashboard answers there (nothing in {limit_s:g} s)"
    except (OSError, ValueError, LookupError) as error:  # a closed port, or some other server
        reason = f"no Ray dashboard answers there ({last_line(error)})"
    except RuntimeError as error:  # Ray's clients raise it for every other status, with the server's traceback
        unknown = "status code 404" in str(error)
        reason = "does not know this job; the cluster may have been started anew" if unknown else last_line(error)
    raise ConfigError(f"--ray-address {address}: {reason}")


def _in_time(call: Callable[[], _Answer], limit_s: float | None) -> _Answer:
    """Return what `call` returns. Raises TimeoutError after `limit_s`, and leaves the call to a daemon thread."""
    answer: Future[_Answer] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer.result(limit_s)


def _token() -> str | None:
    """Return the cluster's token, found where Ray itself looks for it."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        return path.read_text().strip() or None
    except OSError as error:
        if named:
            raise ConfigError(f"RAY_AUTH_TOKEN_PATH {named}: cannot be read ({error.strerror})") from None
        return None
