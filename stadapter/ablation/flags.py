"""The flags that every ablation script shares."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from stadapter import config, recipes
from stadapter.ablation.gpus import GPUS
from stadapter.config import ConfigError, Recipe
from stadapter.data.lists.storage import data_root
from stadapter.training.flags import add_reading_flags, add_speed_flags
from stadapter.training.options import DEFAULT_CHECKPOINT_EVERY_S, GPU_CLIPS_PER_PASS
from stadapter.trials.sweep import DEFAULT_OUTPUT, DEFAULT_STORE

Values = Sequence[str] | Callable[[Recipe], Sequence[str]]
DEFAULT_SEEDS = 2
DEFAULT_MAX_FAILURES = 2

EXIT_CODES = """\
exit codes: 0 every trial asked for finished; 1 some trial failed; 2 the input cannot work, nothing was started;
130 stopped (the same command continues)."""


def make_parser(doc: str, name: str, values: Values) -> argparse.ArgumentParser:
    shown = "depends on the recipe, see above" if callable(values) else " ".join(values)
    parser = argparse.ArgumentParser(
        description=doc.strip(),
        epilog=f"{recipes.listing()}\n\nfields for --set:\n{_field_help()}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what is compared (decides the numbers)")
    what.add_argument(
        "--recipe", metavar="NAME",
        help="the training that the arms vary (default: embedded on a machine without GPUs, ssv2_clip_b16 with)",
    )  # fmt: skip
    what.add_argument("--values", nargs="+", metavar="V", help=f"the arms (default: {shown})")
    what.add_argument(
        "--seeds", type=int, default=DEFAULT_SEEDS, metavar="N",
        help="trials per arm; seed k sees the same clips in the same order in every arm (default: %(default)s)",
    )  # fmt: skip
    what.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="FIELD=VALUE",
        help="change a field of the recipe in every arm, such as optim.epochs=1; repeatable, fields below",
    )  # fmt: skip
    what.add_argument(
        "--data-root", type=data_root, metavar="FOLDER",
        help="where the recipe's data set lies, or its address (s3://...); the embedded one needs none",
    )  # fmt: skip
    what.add_argument("--weights", type=Path, metavar="FILE", help="backbone weights from this file instead of the hub")

    where = parser.add_argument_group("where it runs (does not change the numbers)")
    where.add_argument(
        "--num-gpus", type=int, metavar="N",
        help="GPUs to use in all, 0 for none (default: all that the machine has, or the cluster with --address)",
    )  # fmt: skip
    where.add_argument(
        "--gpus-per-trial", type=int, default=1, metavar="N",
        help="GPUs that share a trial, data parallel; the global batch stays the recipe's (default: %(default)s)",
    )  # fmt: skip
    where.add_argument(
        "--trials-per-gpu", type=int, default=1, metavar="N",
        help="trials that share a GPU, where they are small; --plan says how many fit (default: %(default)s)",
    )  # fmt: skip
    where.add_argument(
        "--processes-per-trial", type=int, metavar="N",
        help="without GPUs: processes that share a trial, data parallel (default: 1)",
    )  # fmt: skip
    where.add_argument(
        "--cpus-per-process", type=int, metavar="N",
        help="CPU cores of each training process (default: 1 without GPUs; with GPUs, the cores shared equally)",
    )  # fmt: skip
    where.add_argument(
        "--num-workers", type=int, metavar="N",
        help="loader processes per training process (default: 0 without GPUs; with GPUs, one less than its cores)",
    )  # fmt: skip
    where.add_argument(
        "--clips-per-pass", type=int, metavar="N",
        help=f"clips in one pass of a process; more are accumulated (default: all, or {GPU_CLIPS_PER_PASS} on a GPU)",
    )  # fmt: skip
    where.add_argument(
        "--checkpoint-every", type=float, default=DEFAULT_CHECKPOINT_EVERY_S, metavar="SECONDS",
        help="within an epoch; each epoch ends with a checkpoint as well (default: %(default)g)",
    )  # fmt: skip
    add_speed_flags(where)
    add_reading_flags(where)
    where.add_argument(
        "--decode-on-cluster", action="store_true",
        help="decode on all nodes of the cluster (Ray Data) instead of in loader processes beside the training; for "
        "machines whose cores cannot feed their GPUs",
    )  # fmt: skip
    where.add_argument(
        "--address", metavar="ADDRESS",
        help="join this running Ray cluster ('auto', host:port or ray://host:port) instead of starting Ray here; "
        "--output and --data-root must then be on a file system that its nodes share",
    )  # fmt: skip
    where.add_argument(
        "--dashboard-port",
        type=int,
        metavar="PORT",
        help="serve Ray's dashboard on 127.0.0.1 at this port (default: none)",
    )

    which = parser.add_argument_group("which trials run (does not change the numbers)")
    which.add_argument(
        "--plan", action="store_true",
        help="start nothing and write nothing: print every trial's state, and what the missing ones will cost; works "
        "without GPUs and without the data",
    )  # fmt: skip
    which.add_argument(
        "--gpu", choices=sorted(GPUS), metavar="NAME",
        help=f"with --plan: the GPU to plan for ({', '.join(sorted(GPUS))})",
    )  # fmt: skip
    which.add_argument(
        "--only", nargs="+", metavar="WORD",
        help="run the trials whose name holds one of these words, such as 'kernel 3x3x3' or 'seed 0'; the table marks "
        "the others as missing",
    )  # fmt: skip
    which.add_argument(
        "--force", action="store_true",
        help="run finished trials again; their old records move to OUTPUT/replaced. Forgets failures, too",
    )  # fmt: skip
    which.add_argument(
        "--max-failures", type=int, default=DEFAULT_MAX_FAILURES, metavar="N",
        help="give a trial up when it has failed N times, over all launches; until then it is tried again from its "
        "last checkpoint. Another N, or --force, counts anew (default: %(default)s)",
    )  # fmt: skip

    kept = parser.add_argument_group("what is kept")
    kept.add_argument(
        "--output", type=Path, default=DEFAULT_OUTPUT, metavar="FOLDER",
        help="trials and tables; a finished trial found here is used again, not run again (default: %(default)s)",
    )  # fmt: skip
    kept.add_argument(
        "--tracking-uri", default=DEFAULT_STORE, metavar="URI",
        help="MLflow store that mirrors the runs: sqlite:///FILE or http://HOST:PORT, or 'none' (default: %(default)s)",
    )  # fmt: skip
    return parser


def _field_help() -> str:
    lines = [
        f"  {path} = {value}"
        for path, value in config.flatten(recipes.embedded).items()
        if path not in ("name", "seed")
    ]
    return "\n".join(lines) + "\n  (values shown: the embedded recipe's)"


def check_numbers(options: argparse.Namespace) -> None:
    bounds = {"seeds": 1, "gpus_per_trial": 1, "processes_per_trial": 1, "cpus_per_process": 1, "clips_per_pass": 1}
    bounds |= {"trials_per_gpu": 1, "max_failures": 1}
    for name, least in {**bounds, "num_gpus": 0, "num_workers": 0, "dashboard_port": 1}.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {least}")


def check_gpu_flags(options: argparse.Namespace, num_gpus: int) -> None:
    """ConfigError where flags about GPUs contradict their number or each other."""
    if not num_gpus and options.gpus_per_trial > 1:
        raise ConfigError(
            f"--gpus-per-trial {options.gpus_per_trial}: there are no GPUs to use; see --processes-per-trial"
        )
    if not num_gpus and options.trials_per_gpu > 1:
        raise ConfigError(f"--trials-per-gpu {options.trials_per_gpu}: there are no GPUs to use")
    if options.trials_per_gpu > 1 and options.gpus_per_trial > 1:
        raise ConfigError(
            f"--trials-per-gpu {options.trials_per_gpu}: not together with --gpus-per-trial {options.gpus_per_trial}"
        )
    if num_gpus and options.gpus_per_trial > num_gpus:
        raise ConfigError(f"--gpus-per-trial {options.gpus_per_trial}: more than the {num_gpus} GPUs to use in all")
    if num_gpus and options.processes_per_trial:
        raise ConfigError("--processes-per-trial is for training without GPUs; use --gpus-per-trial")


def check_port(flag: str, port: int) -> None:
    """ConfigError where nothing can listen on this port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"{flag} {port}: cannot be used ({reason}); choose another port") from None
