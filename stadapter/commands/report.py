"""The command that writes the report: tables, figures and one page from the records of finished sweeps."""

from __future__ import annotations

import argparse
from pathlib import Path

from stadapter.ablation.exit_codes import DONE
from stadapter.ablation.flags import add_output
from stadapter.commands.parsers import Commands, add_parser
from stadapter.config import ConfigError
from stadapter.results import table
from stadapter.results.sources import from_folder

EPILOG = "exit codes: 0 done; 2 the input cannot work. An incomplete sweep is reported, with its holes marked."


def add_report(commands: Commands) -> None:
    """Add `report`."""
    parser = add_parser(
        commands,
        "report",
        "write the tables and figures of all sweeps as one page",
        "Print the tables of all finished sweeps and write one report with figures.",
        EPILOG,
    )
    add_output(parser)
    parser.add_argument(
        "--tracking-uri", metavar="URI", help="read the records from this MLflow store instead of the folder"
    )
    parser.add_argument(
        "--report", type=Path, metavar="FOLDER", help="where the report is written (default: report in the --output)"
    )
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    # Late: they load pandas or matplotlib, and MLflow.
    from stadapter.results.report import write_report
    from stadapter.tracking.reader import from_mlflow

    answers = from_mlflow(options.tracking_uri) if options.tracking_uri else from_folder(options.output)
    for answer in answers:
        print(f"{answer.sweep.question}\n\n{table.to_text(answer.sweep, answer.records)}")
    folder = options.report or options.output / "report"
    try:
        page = write_report(answers, folder)
    except OSError as error:
        raise ConfigError(f"--report {folder}: cannot be written ({error.strerror}); choose another folder") from None
    print(f"Report: {page} (and report.md, tables/, figures/ beside it)")
    return DONE
