"""The command that writes the report: tables, figures and one page from the records of finished sweeps."""

from __future__ import annotations

import argparse
from pathlib import Path

from stadapter.commands.models import Commands, add_parser
from stadapter.config import ConfigError
from stadapter.trials.sweep import DEFAULT_OUTPUT

EPILOG = "exit codes: 0 done; 2 the input cannot work. An incomplete sweep is reported, with its holes marked."


def add_report(commands: Commands) -> None:
    parser = add_parser(
        commands,
        "report",
        "write the tables and figures of all sweeps as one page",
        "Print the tables of all finished sweeps and write one report with figures.",
        EPILOG,
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=DEFAULT_OUTPUT,
        metavar="FOLDER",
        help="the sweeps' --output (default: %(default)s)",
    )
    parser.add_argument(
        "--tracking-uri", metavar="URI", help="read the records from this MLflow store instead of the folder"
    )
    parser.add_argument(
        "--report", type=Path, metavar="FOLDER", help="where the report is written (default: report in the --output)"
    )
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    output, tracking_uri = options.output, options.tracking_uri
    folder = options.report or output / "report"
    from stadapter.results import table
    from stadapter.results.report import write_report
    from stadapter.results.sources import from_folder
    from stadapter.tracking.reader import from_mlflow

    answers = from_mlflow(tracking_uri) if tracking_uri else from_folder(output)
    for answer in answers:
        print(f"{answer.sweep.question}\n\n{table.to_text(answer.sweep, answer.records)}")
    try:
        page = write_report(answers, folder)
    except OSError as error:
        raise ConfigError(f"--report {folder}: cannot be written ({error.strerror}); choose another folder") from None
    print(f"Report: {page} (and report.md, tables/, figures/ beside it)")
    return 0
