"""One writer per trial folder, even if several launches want it.

<output>/locks/<trial id>.lock    held with flock by the process that trains; the system releases it when that ends
<output>/locks/<trial id>.owner   names that process; touched every 15 s

Where flock reaches all machines (a local disk, NFS), the .lock file decides. Where flock reaches one machine only
(Lustre mounted with localflock), the .owner file decides between machines: an owner elsewhere that was touched lately
is left alone. An owner that fell silent and comes back finds that the folder has another owner, and its process ends. A
file system without any flock is refused before a trial starts.

The locks lie beside the trials, not in them, so that a trial's folder can be moved aside while it is held.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from stadapter.config import ConfigError
from stadapter.trials import files

HEARTBEAT_S = 15.0
SILENT_S = 8 * HEARTBEAT_S  # an owner on another machine without a heartbeat for so long counts as dead
POLL_S = 1.0


@dataclass(frozen=True)
class Owner:
    """The process that writes a trial's folder."""

    host: str
    pid: int
    command: str
    machine: str  # kernel and process namespace, in which `pid` is this process
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} ({self.command})"


class Busy(Exception):
    """An error for a folder that another process writes; the message names that process."""


def owner_of(folder: Path) -> Owner | None:
    """Return the process that writes a trial's folder now, or None. Nothing is touched."""
    path = _owner_path(folder)
    owner = _read(path)
    if owner is None or _silent_s(path, time.time()) > SILENT_S:
        return None
    return None if owner.machine == _machine() and not _is_alive(owner.pid) else owner


@contextlib.contextmanager
def writing(folder: Path, command: str = "", *, wait: bool = False, locks: Path | None = None) -> Iterator[None]:
    """Be the only writer of a trial's folder. Raises Busy if it has a writer already; with `wait`, waits for its end.

    `command` is shown to those who find the folder busy; by default it is this process's command line. `locks` is the
    folder for the locks of a run folder outside any sweep. Raises ConfigError if the file system has no flock.
    """
    path = _owner_path(folder) if locks is None else locks / f"{folder.name}.owner"
    check_flock(path.parent)
    while True:
        try:
            lock = _acquire(path)
            break
        except Busy:
            if not wait:
                raise
            time.sleep(POLL_S)
    words = files.without_passwords(command or shlex.join(sys.argv))
    me = Owner(
        socket.gethostname(),
        os.getpid(),
        words if len(words) < 120 else f"{words[:117]}...",
        _machine(),
        uuid.uuid4().hex,
    )
    ended = threading.Event()
    try:
        files.write_json(path, asdict(me))
        threading.Thread(target=_beat, args=(path, me, ended), daemon=True).start()
        yield
    finally:
        ended.set()
        if _read(path) == me:
            with contextlib.suppress(OSError):  # a read-only disk; an owner whose process ended owns nothing
                path.unlink(missing_ok=True)
        lock.release()


def check_flock(locks: Path) -> None:
    """Raise ConfigError if the file system of this folder has no flock: nothing could keep a second writer out."""
    locks.mkdir(parents=True, exist_ok=True)
    probe = locks / f"{uuid.uuid4().hex}.lock"
    try:
        with open(probe, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):  # the last: NFS without its lock service
            raise
        raise ConfigError(
            f"{locks}: its file system has no file locks, so two launches could write one trial; choose an --output on "
            "another one, or have it mounted with flock or localflock"
        ) from None
    finally:
        probe.unlink(missing_ok=True)


def _acquire(path: Path) -> BaseFileLock:
    """Lock a trial whose owner file is `path`. Raises Busy if it has a living owner, here or on another machine."""
    file = path.with_suffix(".lock")
    lock = FileLock(file, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise Busy(f"{path.stem} is being written by {_read(path) or 'another process'}") from None
    owner = _read(path)
    os.utime(file)  # the file system's own clock, whatever this machine's says
    if owner and owner.machine != _machine() and _silent_s(path, file.stat().st_mtime) <= SILENT_S:
        lock.release()
        raise Busy(f"{path.stem} is being written by {owner}")
    return lock


def _beat(path: Path, me: Owner, ended: threading.Event) -> None:
    """Touch the owner file until `ended`. End this process if the folder has another owner meanwhile."""
    while not ended.wait(HEARTBEAT_S):
        with contextlib.suppress(OSError):  # the file system is away for a moment; the next beat may reach it
            found = _read(path)
            if found is not None and found != me and not ended.is_set():
                _fence(f"{path}: taken over by {found} while this process was silent; it ends, or both would write")
            os.utime(path)


def _fence(why: str) -> None:
    print(why, file=sys.stderr, flush=True)
    os._exit(1)


def _owner_path(folder: Path) -> Path:
    return folder.parent.parent / "locks" / f"{folder.name}.owner"


def _read(path: Path) -> Owner | None:
    try:
        return Owner(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None


def _silent_s(path: Path, now: float) -> float:
    try:
        return now - path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")


def _machine() -> str:
    """Return a text that is equal in two processes exactly if a process number means the same in both."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's process, and alive
    return True
