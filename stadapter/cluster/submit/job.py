"""A job for a cluster of any kind: a command, the code and environment that it runs with, and where it writes.

A job is a command line of this machine, made independent of this machine: its paths are absolute, its code is a copy
of the checkout at a known commit, its secrets are names.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NoReturn

from stadapter.config import ConfigError
from stadapter.data.lists.storage import is_remote
from stadapter.trials.sweep import DEFAULT_OUTPUT

COMMIT = "STADAPTER_COMMIT"  # the commit, for a run outside of a git checkout; see trials.provenance
MAX_CODE_BYTES = 200_000_000
MAX_STEM = 20  # an id then fits the 47 characters that KubeRay allows

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_NAME = r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)"
_SECRET = re.compile(rf"{_SECRET_NAME}$", re.IGNORECASE)
_ASSIGNED = re.compile(rf"{_SECRET_NAME}=[\"']?[^\s\"'$]", re.IGNORECASE)
_PASSWORD = re.compile(r"//[^/\s@]*:[^/\s]*@")  # in an address
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class Code:
    """A git checkout: its folder, its commit, and if it holds changes that are in no commit."""

    root: str
    commit: str
    dirty: bool

    def __str__(self) -> str:
        return self.commit + ("+changes" if self.dirty else "")


@dataclass(frozen=True)
class Packages:
    """The Python environment that a job was submitted from."""

    python: str  # the version
    prefix: str  # the folder
    installed: tuple[str, ...]  # name==version, sorted

    def digest(self) -> str:
        return hashlib.sha256("\n".join(self.installed).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"Python {self.python}, {self.prefix}, {len(self.installed)} packages, sha256 {self.digest()}"


@dataclass(frozen=True)
class Job:
    """A command that runs on a cluster, with the code, environment and paths that make it the same there."""

    id: str
    words: tuple[str, ...]  # the script, relative to the checkout, and its flags; all paths absolute
    output: str
    data_root: str | None
    code: Code
    packages: Packages
    env: tuple[tuple[str, str], ...] = ()
    secret_env: tuple[str, ...] = ()  # names only; no value is ever written

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Job:
        """Return the job whose `dataclasses.asdict` was written as JSON."""
        packages = fields["packages"]
        return cls(
            id=fields["id"],
            words=tuple(fields["words"]),
            output=fields["output"],
            data_root=fields["data_root"],
            code=Code(**fields["code"]),
            packages=Packages(packages["python"], packages["prefix"], tuple(packages["installed"])),
            env=tuple((name, value) for name, value in fields["env"]),
            secret_env=tuple(fields["secret_env"]),
        )

    def described(self) -> dict[str, str]:
        """Return where the job comes from, for the metadata of a cluster."""
        facts = {"commit": str(self.code), "environment": str(self.packages), "output": self.output}
        return facts | ({"data-root": self.data_root} if self.data_root else {})


def make_job(
    words: Sequence[str], env: Sequence[str] = (), secret_env: Sequence[str] = (), *, shared_paths: bool
) -> Job:
    """Return the job that runs `words`, a script and its flags. Raises ConfigError if it could not run on a cluster.

    `env` holds NAME=VALUE, `secret_env` names alone. With `shared_paths` the cluster sees this machine's files, and
    relative paths are made absolute; without, they mean nothing there and are refused.
    """
    script, *flags = _checked(words)
    code = _code_of(Path(script).resolve().parent)
    flags, output, data_root = _settle_paths(flags, Path.cwd() if shared_paths else None)
    return Job(
        id=_new_id(script),
        words=(os.path.relpath(Path(script).resolve(), code.root), *flags),
        output=output,
        data_root=data_root,
        code=code,
        packages=_packages(),
        env=tuple(_variable(text) for text in env),
        secret_env=tuple(_secret_name(name) for name in secret_env),
    )


def _checked(words: Sequence[str]) -> Sequence[str]:
    """Return the words. Raises ConfigError if they name no script of this machine or hold a password."""
    if not words:
        raise ConfigError("no command: name a script behind `--`, such as -- experiments/ablate_kernel.py --seeds 3")
    for word in words:
        check_printable("the command", word)
    for flag in words[1:]:
        _check_no_password("the command behind `--`", flag)
    if not Path(words[0]).is_file():
        raise ConfigError(f"{words[0]}: there is no such script; paths are relative to the current folder")
    return words


def _new_id(script: str) -> str:
    """Return a new job's name: the script's, the time, and four random digits. It fits what KubeRay allows."""
    stem = re.sub("[^a-z0-9]+", "-", Path(script).stem.lower()).lstrip("-0123456789")[:MAX_STEM].rstrip("-") or "job"
    return f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def check_printable(where: str, text: str) -> str:
    """Return `text`. Raises ConfigError if it would break the line of a script that it is written into."""
    if _CONTROL.search(text):
        raise ConfigError(f"{where}: {text!r} holds a line break or another control character")
    return text


def check_no_secret(where: str, commands: str) -> None:
    """Raise ConfigError if shell commands that are written into a file set a secret to its value."""
    if _ASSIGNED.search(commands) or _PASSWORD.search(commands):
        raise ConfigError(
            f"{where}: holds what looks like a secret, and would be written into a file; use --secret-env"
        )


def _check_no_password(where: str, text: str) -> None:
    if _PASSWORD.search(text):
        raise ConfigError(
            f"{where}: holds a password, which would be written into a file; leave it out of the address and use "
            "--secret-env (MLflow reads MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD)"
        )


def _variable(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not _NAME.fullmatch(name):
        raise ConfigError(f"--env {name}: expected NAME=VALUE")
    if _SECRET.search(name):
        raise ConfigError(f"--env {name}=...: looks like a secret, and would be written into a file; use --secret-env")
    _check_no_password(f"--env {name}", value)
    return name, check_printable(f"--env {name}", value)


def _secret_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        # The name is not repeated: if it is NAME=VALUE, the value is the secret.
        raise ConfigError("--secret-env: expected the name of an environment variable, without its value")
    return name


class _Flags(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"the command behind `--`: {message}")


def _settle_paths(flags: list[str], here: Path | None) -> tuple[list[str], str, str | None]:
    """Return the flags with every path absolute, the output, and the data root.

    Relative paths are relative to `here`; without it they raise ConfigError.
    """
    parser = _Flags(add_help=False)
    for flag in ("--output", "--data-root", "--weights", "--tracking-uri", "--address"):
        parser.add_argument(flag)
    given, rest = parser.parse_known_args(flags)
    if given.address is not None:
        raise ConfigError(f"--address {given.address}: leave it out; the job joins the cluster that it runs on")

    def absolute(flag: str, path: str) -> str:
        if is_remote(path) or os.path.isabs(path):
            return path
        if here is None:
            raise ConfigError(f"{flag} {path}: means nothing there; give an absolute path that the cluster's nodes see")
        return os.path.abspath(here / path)

    if given.output is None and here is None:
        raise ConfigError("--output: missing; name an absolute folder that all nodes of the cluster see")
    output = absolute("--output", given.output or str(DEFAULT_OUTPUT))
    settled = ["--output", output]
    data_root = absolute("--data-root", given.data_root) if given.data_root else None
    if data_root:
        settled += ["--data-root", data_root]
    if given.weights:
        settled += ["--weights", absolute("--weights", given.weights)]
    store = given.tracking_uri or f"sqlite:///{output}/mlflow.db"
    if store.startswith("sqlite:///"):
        store = "sqlite:///" + absolute("--tracking-uri", store.removeprefix("sqlite:///"))
    return [*rest, *settled, "--tracking-uri", store], output, data_root


def _code_of(folder: Path) -> Code:
    root = _git(folder, "rev-parse", "--show-toplevel")
    return Code(root, _git(root, "rev-parse", "HEAD"), bool(_git(root, "status", "--porcelain")))


def _git(folder: Path | str, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"{folder}: is in no git checkout with a commit, so the job's code would have no version")
    return done.stdout.strip()


def _packages() -> Packages:
    found = {f"{each.metadata['Name']}=={each.version}" for each in distributions()}
    return Packages(".".join(map(str, sys.version_info[:3])), sys.prefix, tuple(sorted(found, key=str.lower)))


def copy_code(job: Job, target: Path) -> None:
    """Copy the checkout into the folder `target`, without files that git ignores and without the job's output."""
    root = Path(job.code.root)
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    output = Path(job.output)
    left_out = output if output != root and output.is_relative_to(root) else output / "submissions"
    wanted = [
        path
        for path in sorted({root / name for name in listed if name})
        if path.is_file() and not path.is_relative_to(left_out)
    ]
    sizes = {path: path.stat().st_size for path in wanted}
    if sum(sizes.values()) > MAX_CODE_BYTES:
        largest = max(sizes, key=lambda path: sizes[path])
        raise ConfigError(
            f"{root}: {sum(sizes.values()) / 1e6:.0f} MB would travel with the job, {largest.relative_to(root)} alone "
            f"has {sizes[largest] / 1e6:.0f} MB; let .gitignore name what is not code"
        )
    for path in wanted:
        copy = target / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
