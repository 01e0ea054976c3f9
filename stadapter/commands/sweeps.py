"""The commands on sweeps: plan, status, table, ui, sync."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from stadapter.ablation.exit_codes import DONE
from stadapter.ablation.flags import add_output, add_store
from stadapter.ablation.options import check_port
from stadapter.commands.parsers import Commands, add_parser
from stadapter.config import ConfigError
from stadapter.results import table
from stadapter.trials import status
from stadapter.trials.files import without_passwords
from stadapter.trials.sweep import load_sweep, records, sweep_folders

DEFAULT_UI_PORT = 5000


def add_plan(commands: Commands) -> None:
    """Add `plan`."""
    parser = add_parser(
        commands,
        "plan",
        "say what a sweep would cost, and start nothing",
        "Say which trials of a script's sweep are done, and what the others will cost: the script with\n"
        "--plan. It needs neither GPUs nor data. The script's own flags follow it.",
        "examples:\n"
        "  stadapter plan experiments/ablate_kernel.py\n"
        "  stadapter plan experiments/ablate_kernel.py --recipe ssv2_clip_b16 --num-gpus 8 --gpu a100-80gb",
    )
    parser.add_argument("script", type=Path, metavar="SCRIPT", help="an experiment's Python file")
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="...", help="its flags; SCRIPT --help lists them")
    parser.set_defaults(run=_plan)


def add_status(commands: Commands) -> None:
    """Add `status`."""
    parser = commands.add_parser(
        "status",
        help="say how far sweeps have come",
        description="Print each trial of each sweep: done, running, resumable, failed, or to do. Starts nothing.",
    )
    add_output(parser)
    parser.set_defaults(run=_status)


def add_ui(commands: Commands) -> None:
    """Add `ui`."""
    parser = commands.add_parser("ui", help="serve MLflow's UI", description="Serve MLflow's UI on 127.0.0.1.")
    parser.add_argument("--port", type=int, default=DEFAULT_UI_PORT, help="(default: %(default)s)")
    add_store(parser)
    parser.set_defaults(run=_ui)


def add_table(commands: Commands) -> None:
    """Add `table`."""
    parser = commands.add_parser(
        "table", help="print the tables of finished sweeps", description="Print tables again, from the records."
    )
    add_output(parser)
    parser.set_defaults(run=_table)


def add_sync(commands: Commands) -> None:
    """Add `sync`."""
    parser = commands.add_parser(
        "sync",
        help="bring an MLflow store up to date",
        description="Replay the records of every sweep into an MLflow store; nothing is written twice.",
    )
    add_store(parser)
    add_output(parser)
    parser.set_defaults(run=_sync)


def _plan(options: argparse.Namespace) -> int:
    if not options.script.is_file():
        raise ConfigError(f"{options.script}: there is no such script; name one such as experiments/ablate_kernel.py")
    return subprocess.run([sys.executable, str(options.script), *options.flags, "--plan"]).returncode


def _status(options: argparse.Namespace) -> int:
    for folder in sweep_folders(options.output):
        entries = status.entries(load_sweep(folder), options.output.resolve())
        print(f"{folder.name}: {status.count_states(entries)}")
        width = max(len(entry.trial.name) for entry in entries)
        for entry in entries:
            print(f"  {entry.trial.name:<{width}}  {entry.trial.id}  {entry.status}")
    return DONE


def _ui(options: argparse.Namespace) -> int:
    store = options.tracking_uri
    if store.startswith("sqlite:///") and not Path(store.removeprefix("sqlite:///")).exists():
        shown = without_passwords(store)
        raise ConfigError(f"--tracking-uri {shown}: there is no such file; run an ablation first, or name its store")
    check_port("--port", options.port)
    # Late, as in `_sync`: MLflow takes seconds to load.
    from stadapter.tracking.reader import pages

    print(f"MLflow on http://127.0.0.1:{options.port}; Ctrl-C ends it. The arms of each sweep, side by side:")
    for name, address in pages(store):
        print(f"  {name}: http://127.0.0.1:{options.port}{address}", flush=True)
    command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(options.port)]
    # The server takes the place of this process, so that signals reach it. The store goes through the environment: an
    # address may hold a password, and arguments show in every list of processes.
    os.execve(sys.executable, [*command, "--workers", "1"], os.environ | {"MLFLOW_BACKEND_STORE_URI": store})


def _table(options: argparse.Namespace) -> int:
    for folder in sweep_folders(options.output):
        sweep = load_sweep(folder)
        print(f"{sweep.question}\n\n{table.to_text(sweep, records(sweep, options.output))}")
    return DONE


def _sync(options: argparse.Namespace) -> int:
    from stadapter.tracking.mirror import sync

    store = without_passwords(options.tracking_uri)
    for folder in sweep_folders(options.output):
        sweep = load_sweep(folder)
        finished, begun = sync(sweep, options.output.resolve(), options.tracking_uri)
        print(f"{folder.name}: {finished} finished trials and {begun} begun ones are in {store}")
    return DONE
