"""The exit codes of every command and script, and the way from an error to its code and its line."""

from __future__ import annotations

import sys
from collections.abc import Callable

from stadapter.config import ConfigError
from stadapter.trials.files import WriteError

DONE = 0
FAILED = 1  # all of it, or some clip, trial or video
BAD_INPUT = 2  # nothing was started
STOPPED = 130  # by a signal: 128 + SIGINT, as shells report Ctrl-C


def exit_code_of(run: Callable[[], int], stopped: str = "stopped") -> int:
    """Run a command and return its exit code. An error that the user can mend becomes one line on standard error."""
    try:
        return run()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except WriteError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return STOPPED
