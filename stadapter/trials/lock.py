"""One writer per trial folder, however many launches want it.

<output>/locks/<trial id>.lock    held with flock by the process that trains: it goes when the process goes
<output>/locks/<trial id>.owner   who that is; touched every few seconds

On one machine, and on shared file systems that pass flock on (NFS does), the first file decides. Where flock holds on
one machine only, the second one does: an owner on another machine that was touched lately is left alone. An owner that
fell silent and comes back finds that the folder is another's, and its process ends. Where there is no flock at all
(some mounts of Lustre), the first file is a lock by being there, and one whose owner fell silent is taken away.

The locks lie beside the trials, not in them, so that a trial's folder can be moved aside while it is held.
"""

from __future__ import annotations

import contextlib
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

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from stadapter.trials import files

HEARTBEAT_S = 15.0
SILENT_S = 8 * HEARTBEAT_S  # without a heartbeat for so long, an owner on another machine counts as dead
POLL_S = 1.0


@dataclass(frozen=True)
class Owner:
    """The process that writes a trial's folder."""

    host: str
    pid: int
    command: str
    machine: str  # kernel and process namespace: where `pid` means this process
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} ({self.command})"


class Busy(Exception):
    """Another process writes this folder; the message says which."""


def owner_of(folder: Path) -> Owner | None:
    """Who writes a trial's folder now, as far as can be told without touching anything."""
    path = _owner_path(folder)
    owner = _read(path)
    if owner is None or _silent_s(path, time.time()) > SILENT_S:
        return None
    return None if owner.machine == _machine() and not _is_alive(owner.pid) else owner


@contextlib.contextmanager
def writing(folder: Path, command: str = "", *, wait: bool = False, locks: Path | None = None) -> Iterator[None]:
    """Be the only writer of a trial's folder. Raises Busy if there is one already; with `wait`, waits for its end.

    `command` is what a person who finds the folder busy is told; by default this process's command line. `locks` is
    where the locks of a folder lie that belongs to no sweep.
    """
    path = _owner_path(folder) if locks is None else locks / f"{folder.name}.owner"
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


def _acquire(path: Path) -> BaseFileLock:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_suffix(".lock")
    lock: BaseFileLock = FileLock(file, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        # flock goes when its process goes, on whatever machine; a file that is the lock does not.
        if not isinstance(lock, SoftFileLock) or not _taken_away(file, path):
            raise Busy(f"{path.stem} is being written by {_read(path) or 'another process'}") from None
        return _acquire(path)
    owner = _read(path)
    os.utime(file)  # the file system's own clock, whatever this machine's says
    if owner and owner.machine != _machine() and _silent_s(path, file.stat().st_mtime) <= SILENT_S:
        lock.release()
        raise Busy(f"{path.stem} is being written by {owner}")
    return lock


def _taken_away(file: Path, path: Path) -> bool:
    """Take away a lock that nobody has touched for long, nor its owner's file; whether that was so."""
    clock, aside = (file.with_name(f"{file.name}.{uuid.uuid4().hex}") for _ in range(2))
    try:
        content = file.read_bytes()
        clock.touch()  # the file system's own clock
        now = clock.stat().st_mtime
        if min(_silent_s(file, now), _silent_s(path, now)) <= SILENT_S:
            return False
        os.rename(file, aside)
        if aside.read_bytes() != content:  # somebody else was faster, and has it now
            os.rename(aside, file)
            return False
        return True
    except FileNotFoundError:  # its owner has just released it, or somebody else is taking it away
        return False
    finally:
        for each in (clock, aside):
            each.unlink(missing_ok=True)


def _beat(path: Path, me: Owner, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_S):
        with contextlib.suppress(OSError):  # a file system that is away for a moment; the next beat may reach it
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
    """Equal in two processes exactly if a process number means the same in both."""
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
        pass  # somebody else's, and alive
    return True
