"""Answers: sweeps with their records, read from an output folder. `tracking.reader` reads the same from MLflow."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from stadapter.results import table
from stadapter.results.table import Records, Row
from stadapter.trials.sweep import Sweep, load_sweep, records, sweep_folders


@dataclass(frozen=True)
class Answer:
    """A question (its sweep) with the record of each trial, None if there is none."""

    sweep: Sweep
    records: Records

    @property
    def name(self) -> str:
        """The name of the sweep's folder, such as `kernel-embedded`."""
        return self.sweep.folder(Path()).name

    @cached_property
    def rows(self) -> list[Row]:
        """The statistics, one row per arm."""
        return table.make_rows(self.sweep, self.records)

    @property
    def notes(self) -> list[str]:
        """The notes that a reader needs to judge the table."""
        return table.notes(self.sweep, self.rows, self.records)


def from_folder(output: Path | str = "runs") -> list[Answer]:
    """Return every sweep under an output folder, by name. Raises ConfigError if there is none."""
    output = Path(output)
    sweeps = [load_sweep(folder) for folder in sweep_folders(output)]
    return [Answer(sweep, records(sweep, output)) for sweep in sweeps]
