"""Commands about sweeps that have run: their state, tables, runs in MLflow; and the search for settings."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from stadapter.ablation.flags import check_port
from stadapter.config import ConfigError
from stadapter.results import table
from stadapter.trials import status
from stadapter.trials.files import without_passwords
from stadapter.trials.sweep import DEFAULT_OUTPUT, DEFAULT_STORE, load_sweep, records, sweep_folders
from stadapter.tuning import tune

DEFAULT_UI_PORT = 5000


def add_status(commands: Any) -> None:
    parser = commands.add_parser(
        "status",
        help="say how far sweeps have come",
        description="Print each trial of each sweep: done, running, resumable, failed, or to do. Starts nothing.",
    )
    _add_output(parser)
    parser.set_defaults(run=_status)


def add_ui(commands: Any) -> None:
    parser = commands.add_parser("ui", help="serve MLflow's UI", description="Serve MLflow's UI on 127.0.0.1.")
    parser.add_argument("--port", type=int, default=DEFAULT_UI_PORT, help="(default: %(default)s)")
    _add_store(parser)
    parser.set_defaults(run=_ui)


def add_table(commands: Any) -> None:
    parser = commands.add_parser(
        "table", help="print the tables of finished sweeps", description="Print tables again, from the records."
    )
    _add_output(parser)
    parser.set_defaults(run=_table)


def add_sync(commands: Any) -> None:
    parser = commands.add_parser(
        "sync",
        help="bring an MLflow store up to date",
        description="Replay the records of every sweep into an MLflow store; nothing is written twice.",
    )
    _add_store(parser)
    _add_output(parser)
    parser.set_defaults(run=_sync)


def add_tune(commands: Any) -> None:
    parser = commands.add_parser(
        "tune",
        help="search for optimiser settings",
        description="Search learning rate, weight decay, warm-up and dropout on the validation split with Optuna. "
        "Trials of the --output that finished before are known to the search.",
    )
    tune.add_arguments(parser)
    _add_output(parser)
    parser.set_defaults(run=tune.run)


def _add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tracking-uri", default=DEFAULT_STORE, metavar="URI", help="the MLflow store (default: %(default)s)"
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        default=DEFAULT_OUTPUT,
        metavar="FOLDER",
        help="the sweeps' --output (default: %(default)s)",
    )


def _status(options: argparse.Namespace) -> int:
    output = options.output.resolve()
    for folder in sweep_folders(options.output):
        sweep = load_sweep(folder)
        entries = [status.entry(trial, output) for trial in sweep.trials]
        counts = Counter(entry.state for entry in entries)
        print(f"{folder.name}: {', '.join(f'{counts[state]} {state}' for state in status.STATES if counts[state])}")
        width = max(len(trial.name) for trial in sweep.trials)
        for entry in entries:
            print(f"  {entry.trial.name:<{width}}  {entry.trial.id}  {entry.status}")
    return 0


def _ui(options: argparse.Namespace) -> int:
    store = options.tracking_uri
    if store.startswith("sqlite:///") and not Path(store.removeprefix("sqlite:///")).exists():
        shown = without_passwords(store)
        raise ConfigError(f"--tracking-uri {shown}: there is no such file; run an ablation first, or name its store")
    check_port("--port", options.port)
    from stadapter.tracking.reader import pages

    print(f"MLflow on http://127.0.0.1:{options.port}; Ctrl-C ends it. The arms of each sweep, side by side:")
    for name, address in pages(store):
        print(f"  {name}: http://127.0.0.1:{options.port}{address}", flush=True)
    command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(options.port)]
    # In place of this process, so that a signal reaches the server. The store is no argument: whoever lists processes
    # would read a password in it.
    os.execve(sys.executable, [*command, "--workers", "1"], os.environ | {"MLFLOW_BACKEND_STORE_URI": store})


def _table(options: argparse.Namespace) -> int:
    for folder in sweep_folders(options.output):
        sweep = load_sweep(folder)
        print(f"{sweep.question}\n\n{table.to_text(sweep, records(sweep, options.output))}")
    return 0


def _sync(options: argparse.Namespace) -> int:
    from stadapter.tracking.mirror import sync

    store = without_passwords(options.tracking_uri)
    for folder in sweep_folders(options.output):
        sweep = load_sweep(folder)
        finished, begun = sync(sweep, options.output.resolve(), options.tracking_uri)
        print(f"{folder.name}: {finished} finished trials and {begun} begun ones are in {store}")
    return 0
