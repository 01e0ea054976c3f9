"""Files by path or by address (`s3://...`, all that fsspec reads), and local copies of those at addresses.

A remote video is copied once into a local folder of bounded size and decoded from there; the files used least recently
make room. A copy is written beside its place and renamed, so no process ever reads half of one. A remote file that
changes under its address is not noticed: clips of a data set do not change. fsspec (0.12 s) and filelock are imported
late, since command lines need only `data_root`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from stadapter.config import ConfigError, first_line
from stadapter.data.lists.bounded_folder import Entry, cache_folder, remove_least_recently_used

Root = str | os.PathLike[str]

DEFAULT_LOCAL_COPIES_GB = 50.0
_SCAN_SHARE = 64  # the copies are measured each time a process has added this part of its limit


@dataclass(frozen=True)
class LocalCopies:
    """The folder of the copies of remote files, and its limit, which each process may exceed by 1/64."""

    folder: Path
    limit_bytes: int


def default_local_copies(gigabytes: float = DEFAULT_LOCAL_COPIES_GB) -> LocalCopies:
    """Return the folder in $STADAPTER_CACHE, or in ~/.cache/stadapter."""
    return LocalCopies(cache_folder("spill"), int(gigabytes * 1e9))


def data_root(text: str) -> str:
    """Return a --data-root as it is handed on: an address unchanged, a path absolute."""
    return text if is_remote(text) else os.path.abspath(text)


def is_remote(path: Root) -> bool:
    """Return True for an address."""
    return "://" in os.fspath(path)


def join(root: Root, path: str) -> str:
    """Return `path` under `root`; an absolute path or an address stays as it is."""
    if is_remote(path) or not is_remote(root):
        return path if is_remote(path) else os.path.join(root, path)
    return f"{os.fspath(root).rstrip('/')}/{path}"


def is_file(path: Root) -> bool:
    if not is_remote(path):
        return os.path.isfile(path)
    with _errors(path):
        system, place = _filesystem(path)
        return system.isfile(place)


def is_folder(path: Root) -> bool:
    if not is_remote(path):
        return os.path.isdir(path)
    with _errors(path):
        system, place = _filesystem(path)
        return system.isdir(place)


def list_folder(path: Root) -> tuple[list[str], list[str]]:
    """Return (names of folders, names of files) directly in a folder, each sorted."""
    if not is_remote(path):
        with os.scandir(path) as found:
            entries = [(entry.name, entry.is_dir()) for entry in found]
    else:
        with _errors(path):
            system, place = _filesystem(path)
            listed = system.ls(place, detail=True)
        entries = [(entry["name"].rstrip("/").rsplit("/", 1)[-1], entry["type"] == "directory") for entry in listed]
    folders = sorted(name for name, is_dir in entries if is_dir)
    return folders, sorted(name for name, is_dir in entries if not is_dir)


@contextlib.contextmanager
def open_text(path: Root) -> Iterator[IO[str]]:
    """Open a text file in UTF-8, its line ends untouched. Raises FileNotFoundError if it is missing."""
    with contextlib.ExitStack() as stack:
        if is_remote(path):
            with _errors(path):
                system, place = _filesystem(path)
                file = stack.enter_context(system.open(place, "r", encoding="utf-8-sig", newline=""))
        else:
            file = stack.enter_context(open(path, encoding="utf-8-sig", newline=""))
        try:
            yield file
        except UnicodeDecodeError as error:
            raise ConfigError(f"{os.fspath(path)}: is not text in UTF-8 ({error.reason}); save it as UTF-8") from None


def local_copy(path: str, local_copies: LocalCopies) -> str:
    """Return the path of a file that can be opened here: `path` itself, or the local copy of an address.

    Raises OSError if it cannot be read. Another process may remove the copy, to make room, before it is opened: then
    call this again.
    """
    if not is_remote(path):
        return path
    digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()
    copy = local_copies.folder / digest[:2] / (digest + os.path.splitext(path)[1])
    with contextlib.suppress(FileNotFoundError):
        _mark_used(copy)
        return str(copy)
    size = _fetch(path, copy)
    _make_room(local_copies, size, copy)
    return str(copy)


def _fetch(address: str, copy: Path) -> int:
    """Copy a remote file, which appears under its name whole; return its bytes. Raises OSError if it cannot be read."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(suffix=".part", dir=copy.parent)
    try:
        try:
            system, place = _filesystem(address)
            with open(handle, "wb") as target, system.open(place, "rb") as source:
                shutil.copyfileobj(source, target, 2**20)
        except OSError:
            raise
        except Exception as error:  # each of fsspec's back ends has errors of its own
            raise OSError(f"{type(error).__name__}: {first_line(error)}") from None
        size = os.path.getsize(part)
        _mark_used(part)
        os.replace(part, copy)
        return size
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)


def _mark_used(copy: Root) -> None:
    """Set the time of use to now. The time of change is always 0, since the cache of frames goes by it."""
    os.utime(copy, (time.time(), 0))


_added: dict[Path, int] = {}  # bytes that this process has copied since it last measured


def _make_room(local_copies: LocalCopies, size: int, newest: Path) -> None:
    """Remove the files used least recently until the copies are within their limit; never the newest."""
    from filelock import FileLock

    _added[local_copies.folder] = _added.get(local_copies.folder, 0) + size
    if _added[local_copies.folder] * _SCAN_SHARE < local_copies.limit_bytes:
        return
    _added[local_copies.folder] = 0

    def remove(file: Path) -> bool:
        if file == newest or file.name.endswith((".part", ".lock")):
            return False
        file.unlink(missing_ok=True)
        return True

    with FileLock(local_copies.folder / ".lock"):
        files = (Path(folder) / name for folder, _, names in os.walk(local_copies.folder) for name in names)
        remove_least_recently_used(_entries(files), local_copies.limit_bytes, remove)


def _entries(files: Iterable[Path]) -> Iterator[Entry]:
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            stat = file.stat()
            yield Entry(file, stat.st_size, stat.st_atime)


def _filesystem(path: Root) -> tuple[Any, str]:
    import fsspec

    system, place = fsspec.core.url_to_fs(os.fspath(path))
    return system, place


@contextlib.contextmanager
def _errors(path: Root) -> Iterator[None]:
    """Turn errors about an address that the user gave into ConfigError; a missing file stays FileNotFoundError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except ImportError as error:
        raise ConfigError(f"{os.fspath(path)}: needs a package that is not installed ({error})") from None
    except Exception as error:  # each of fsspec's back ends has errors of its own
        raise ConfigError(f"{os.fspath(path)}: cannot be read ({first_line(error)})") from None
