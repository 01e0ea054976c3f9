"""`python -m analysis`: tables, figures and one report from the records of finished sweeps."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from stadapter.config import ConfigError

EPILOG = "exit codes: 0 done; 2 the input cannot work. An incomplete sweep is reported, with its holes marked."


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m analysis",
        description="Print the tables of all finished sweeps and write one report with figures.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs"),
        metavar="FOLDER",
        help="the sweeps' --output (default: %(default)s)",
    )
    parser.add_argument(
        "--tracking-uri", metavar="URI", help="read the records from this MLflow store instead of the folder"
    )
    parser.add_argument(
        "--report", type=Path, metavar="FOLDER", help="where the report is written (default: report in the --output)"
    )
    options = parser.parse_args(arguments)
    try:
        return _run(options.output, options.tracking_uri, options.report or options.output / "report")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(output: Path, tracking_uri: str | None, folder: Path) -> int:
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


if __name__ == "__main__":
    sys.exit(main())
