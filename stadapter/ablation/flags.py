"""The flags that every ablation script shares, and those that the commands about its sweeps share with it."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from stadapter import config, recipes
from stadapter.ablation.options import DEFAULT_MAX_FAILURES, SweepOptions
from stadapter.ablation.plan.gpus import GPUS
from stadapter.config import ConfigError, Recipe
from stadapter.training.flags import (
    add_checkpoint_every,
    add_clips_per_pass,
    add_data_root,
    add_loader_processes,
    add_reading_flags,
    add_set,
    add_speed_flags,
    add_weights,
    complete_files,
    reading_flags,
    speed_flags,
)
from stadapter.training.options import TrainOptions
from stadapter.trials.sweep import DEFAULT_OUTPUT, DEFAULT_STORE

Values = Sequence[str] | Callable[[Recipe], Sequence[str]]
Parser = argparse.ArgumentParser | argparse._ArgumentGroup
DEFAULT_SEEDS = 2
NO_STORE = "none"  # for --tracking-uri

EXIT_CODES = """\
exit codes: 0 every trial asked for finished; 1 some trial failed; 2 the input cannot work, nothing was started;
130 stopped (the same command continues)."""


def add_output(parser: Parser, help_text: str = "the sweeps' --output (default: %(default)s)") -> None:
    """Add --output, the folder of trials and tables."""
    complete_files(parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, metavar="FOLDER", help=help_text))


def add_store(parser: Parser, help_text: str = "the MLflow store (default: %(default)s)") -> None:
    """Add --tracking-uri, the MLflow store that mirrors the runs."""
    parser.add_argument("--tracking-uri", default=DEFAULT_STORE, metavar="URI", help=help_text)


def make_parser(doc: str, values: Values) -> argparse.ArgumentParser:
    """Return the parser of an ablation script, whose docstring is `doc`."""
    shown = "depends on the recipe, see above" if callable(values) else " ".join(values)
    parser = argparse.ArgumentParser(
        description=doc.strip(),
        epilog=f"{recipes.listing()}\n\nfields for --set:\n{_field_help()}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_what(parser, shown)
    _add_where(parser)
    _add_which(parser)
    kept = parser.add_argument_group("what is kept")
    add_output(
        kept, "trials and tables; a finished trial found here is used again, not run again (default: %(default)s)"
    )
    add_store(
        kept,
        "MLflow store that mirrors the runs: sqlite:///FILE or http://HOST:PORT, or 'none' (default: %(default)s)",
    )
    return parser


def _add_what(parser: argparse.ArgumentParser, shown: str) -> None:
    group = parser.add_argument_group("what is compared (decides the numbers)")
    group.add_argument(
        "--recipe", metavar="NAME",
        help="the training that the arms vary (default: embedded on a machine without GPUs, ssv2_clip_b16 with)",
    )  # fmt: skip
    group.add_argument("--values", nargs="+", metavar="V", help=f"the arms (default: {shown})")
    group.add_argument(
        "--seeds", type=int, default=DEFAULT_SEEDS, metavar="N",
        help="trials per arm; seed k sees the same clips in the same order in every arm (default: %(default)s)",
    )  # fmt: skip
    add_set(group, "change a field of the recipe in every arm, such as optim.epochs=1; repeatable, fields below")
    add_data_root(group)
    add_weights(group)


def _add_where(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where it runs (does not change the numbers)")
    group.add_argument(
        "--num-gpus", type=int, metavar="N",
        help="GPUs to use in all, 0 for none (default: all that the machine has, or the cluster with --address)",
    )  # fmt: skip
    group.add_argument(
        "--gpus-per-trial", type=int, default=1, metavar="N",
        help="GPUs that share a trial, data parallel; the global batch stays the recipe's (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--trials-per-gpu", type=int, default=1, metavar="N",
        help="trials that share a GPU, where they are small; --plan says how many fit (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--processes-per-trial", type=int, metavar="N",
        help="without GPUs: processes that share a trial, data parallel (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--cpus-per-process", type=int, metavar="N",
        help="CPU cores of each training process (default: 1 without GPUs; with GPUs, the cores shared equally)",
    )  # fmt: skip
    add_loader_processes(group)
    add_clips_per_pass(group)
    add_checkpoint_every(group)
    add_speed_flags(group)
    add_reading_flags(group)
    group.add_argument(
        "--decode-on-cluster", action="store_true",
        help="decode on all nodes of the cluster (Ray Data) instead of in loader processes beside the training; for "
        "machines whose cores cannot feed their GPUs",
    )  # fmt: skip
    group.add_argument(
        "--address", metavar="ADDRESS",
        help="join this running Ray cluster ('auto', host:port or ray://host:port) instead of starting Ray here; "
        "--output and --data-root must then be on a file system that its nodes share",
    )  # fmt: skip
    group.add_argument(
        "--dashboard-port",
        type=int,
        metavar="PORT",
        help="serve Ray's dashboard on 127.0.0.1 at this port (default: none)",
    )


def _add_which(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which trials run (does not change the numbers)")
    group.add_argument(
        "--plan", action="store_true",
        help="start nothing and write nothing: print every trial's state, and what the missing ones will cost; works "
        "without GPUs and without the data",
    )  # fmt: skip
    group.add_argument(
        "--gpu", choices=sorted(GPUS), metavar="NAME",
        help=f"with --plan: the GPU to plan for ({', '.join(sorted(GPUS))})",
    )  # fmt: skip
    group.add_argument(
        "--only", nargs="+", metavar="WORD",
        help="run the trials whose name holds one of these words, such as 'kernel 3x3x3' or 'seed 0'; the table marks "
        "the others as missing",
    )  # fmt: skip
    group.add_argument(
        "--force", action="store_true",
        help="run finished trials again; their old records move to OUTPUT/replaced. Forgets failures, too",
    )  # fmt: skip
    group.add_argument(
        "--max-failures", type=int, default=DEFAULT_MAX_FAILURES, metavar="N",
        help="give a trial up when it has failed N times, over all launches; until then it is tried again from its "
        "last checkpoint. Another N, or --force, counts anew (default: %(default)s)",
    )  # fmt: skip


def _field_help() -> str:
    lines = [
        f"  {path} = {value}"
        for path, value in config.flatten(recipes.embedded).items()
        if path not in ("name", "seed")
    ]
    return "\n".join(lines) + "\n  (values shown: the embedded recipe's)"


def sweep_options(given: argparse.Namespace) -> SweepOptions:
    """Return what the flags ask for. Raises ConfigError for a value that cannot work."""
    if given.seeds < 1:
        raise ConfigError(f"--seeds {given.seeds}: must be at least 1")
    return SweepOptions(
        output=given.output,
        tracking_uri=None if given.tracking_uri == NO_STORE else given.tracking_uri,
        only=tuple(given.only or ()),
        force=given.force,
        max_failures=given.max_failures,
        num_gpus=given.num_gpus,
        gpus_per_trial=given.gpus_per_trial,
        trials_per_gpu=given.trials_per_gpu,
        processes_per_trial=given.processes_per_trial,
        cpus_per_process=given.cpus_per_process,
        num_workers=given.num_workers,
        address=given.address,
        dashboard_port=given.dashboard_port,
        decode_on_cluster=given.decode_on_cluster,
        gpu=given.gpu,
        training=TrainOptions(
            data_root=given.data_root,
            weights_file=given.weights and given.weights.resolve(),
            clips_per_pass=given.clips_per_pass,
            checkpoint_every_s=given.checkpoint_every,
            **speed_flags(given),
            **reading_flags(given),
        ),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    )
