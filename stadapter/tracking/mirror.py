"""A copy of the run folders in MLflow, for comparing trials in a browser.

The run folders are the truth. The copy can be lost and made again at any time (`sync`), so no failure of the store may
end a sweep or hold it up. Only the driver process writes. `store` writes the runs; this module handles its failures.
"""

from __future__ import annotations

import re
import shlex
import threading
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from stadapter.config import ConfigError, first_line
from stadapter.tracking.store import STORE_ERRORS, Store
from stadapter.trials import files, record
from stadapter.trials.sweep import Sweep, Trial

# The most that a slow store may hold up a sweep in all: seconds, plus a share of the sweep's time so far.
PATIENCE_S, PATIENCE_SHARE = 10.0, 0.01
OPENING_S = 60.0  # a new database takes seconds, many on a busy machine; one behind a firewall never opens


class Mirror:
    """The copy of a running sweep in an MLflow store. No method raises or waits long because of the store."""

    def __init__(
        self,
        sweep: Sweep,
        output: Path,
        tracking_uri: str,
        *,
        experiment: str = "stadapter",
        say: Callable[[str], None] = print,
    ) -> None:
        self._store = Store(sweep, output, tracking_uri, experiment)
        self._say = say
        uri = shlex.quote(files.without_passwords(tracking_uri))
        self._sync = f"stadapter sync --output {shlex.quote(str(output))} --tracking-uri {uri}"
        self._began, self._waited = time.monotonic(), 0.0
        self._opening: Future[None] | None = None
        self.working = True

    def start(self, *, wait: bool = True) -> None:
        """Open the sweep's parent run, creating the store and the experiment if they are missing.

        A new database takes seconds. Without `wait` this returns at once, and the first write waits for the store.
        """
        # A daemon thread: Python would wait at its end for a thread of an executor, and an opening may take for ever.
        opening: Future[None] = Future()
        self._opening = opening
        threading.Thread(target=_run, args=(self._store.open, opening), daemon=True).start()
        if wait:
            self._try(self._opened)

    def trial_started(self, trial: Trial) -> None:
        """Open the run of a trial, or open it again if the trial was interrupted."""
        self._try(self._store.start_trial, trial)

    def trial_epoch(self, trial: Trial) -> None:
        """Log the epochs of a trial recorded since the last call."""
        self._try(self._store.log_epochs, trial)

    def trial_finished(self, trial: Trial) -> None:
        """Complete the run of a trial that has its record, whether it ran now or earlier."""
        self._try(self._store.finish_trial, trial)

    def trial_failed(self, trial: Trial, message: str) -> None:
        """Log the epochs of a trial that this sweep will not try again, and the reason."""
        self._try(self._store.fail_trial, trial, message)

    def finish(self, table_files: list[Path], status: str = "FINISHED") -> None:
        """Attach the tables and end the runs still open. `status` is MLflow's word for the parent run."""
        self._try(self._store.close, table_files, status)

    @property
    def address(self) -> str:
        """The path of the page that compares the arms, to append to a server's address; empty without a store."""
        self._try(self._opened)
        return self._store.address if self.working else ""

    def _opened(self) -> None:
        """Wait until the store is open. Raises the error of opening it, or TimeoutError after OPENING_S."""
        if self._opening is not None:
            futures.wait([self._opening], OPENING_S)
            if not self._opening.done():
                raise TimeoutError(f"it did not open within {OPENING_S:g} s")
            self._opening.result()
            self._opening = None  # not before: a second Ctrl-C may end the wait, and the last write waits again

    def _try(self, method: Callable[..., None], *arguments: Any) -> None:
        """Call a method of the store; after an error, or when patience is used up, call it no more."""
        if not self.working:
            return
        try:
            self._opened()
            began = time.monotonic()
            method(*arguments)
        except STORE_ERRORS as error:
            self._give_up(reason_of(error))
            return
        now = time.monotonic()
        # Only calls of more than a second count: a healthy store takes milliseconds, and was created above.
        if now - began > 1:
            self._waited += now - began
        if self._waited > PATIENCE_S + PATIENCE_SHARE * (now - self._began):
            self._give_up(f"it is slow: {self._waited:.0f} s waited")

    def _give_up(self, why: str) -> None:
        self.working = False
        self._say(
            f"warning: MLflow is left out from here on ({why}). The run folders have everything; "
            f"this brings the store up to date: {self._sync}"
        )


def _run(work: Callable[[], None], outcome: Future[None]) -> None:
    """Do the work, and tell `outcome` when it is done or which error it raised."""
    try:
        work()
        outcome.set_result(None)
    except BaseException as error:
        outcome.set_exception(error)


def sync(sweep: Sweep, output: Path, tracking_uri: str, *, experiment: str = "stadapter") -> tuple[int, int]:
    """Copy the run folders of a sweep into the store, leaving runs that are complete there alone.

    Returns the number of finished trials and of trials only begun. Raises ConfigError if the store cannot be written.
    """
    finished = begun = 0
    try:
        store = Store(sweep, output, tracking_uri, experiment)
        store.open()
        for trial in sweep.trials:
            if record.read_result(trial.folder(output)) is not None:
                store.finish_trial(trial)
                finished += 1
            elif record.read_metrics(trial.folder(output)):
                store.log_epochs(trial)
                begun += 1
        tables = sorted(path for path in sweep.folder(output).glob("*") if not path.name.startswith("."))
        store.close(tables, "FINISHED" if finished == len(sweep.trials) else "KILLED")
    except STORE_ERRORS as error:
        raise ConfigError(
            f"--tracking-uri {files.without_passwords(tracking_uri)}: cannot be written ({reason_of(error)})"
        ) from None
    return finished, begun


def reason_of(error: Exception) -> str:
    """Return a store's error as one line without passwords."""
    text = files.without_passwords(first_line(error))
    unreachable = re.match(r"API request to (\w+://[^/]+).* failed with exception", text)
    return f"{unreachable[1]} does not answer" if unreachable else text[:160]
