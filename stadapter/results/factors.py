"""How the arms of a sweep lie along its axis: the series of a figure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from stadapter.results.table import Row
from stadapter.trials.sweep import Axis


@dataclass(frozen=True)
class Series:
    """Arms that belong together in a figure, sorted by x."""

    label: str
    x: tuple[float, ...]
    rows: tuple[Row, ...]

    @property
    def connected(self) -> bool:
        """True if a line between the arms means something: not if they all have the same x."""
        return len(set(self.x)) > 1


@dataclass(frozen=True)
class Factor:
    """The ablated factor as a figure shows it. Without an axis there are no series: the arms are listed by name."""

    label: str = ""
    series: tuple[Series, ...] = ()
    is_log: bool = False

    @property
    def is_number(self) -> bool:
        """True if the arms lie on an axis."""
        return bool(self.series)

    def shifted(self) -> list[Series]:
        """Return the series side by side, so that arms with the same x do not hide each other."""
        span = max(x for s in self.series for x in s.x) - min(x for s in self.series for x in s.x)
        step = 0.0 if self.is_log else 0.015 * span
        middle = (len(self.series) - 1) / 2
        return [
            dataclasses.replace(series, x=tuple(x + (number - middle) * step for x in series.x))
            for number, series in enumerate(self.series)
        ]


def find_factor(axis: Axis | None, rows: Sequence[Row]) -> Factor:
    """Return the series of these arms on the sweep's axis; no series if the sweep has no axis or an arm has no x."""
    if axis is None or any(row.x is None for row in rows):
        return Factor()
    names = dict.fromkeys(name for row in rows for name in row.series)
    series = [_series(name, [row for row in rows if name in row.series]) for name in names]
    drawn = [one for one in series if not _lies_on_another(one)]
    drawn.sort(key=lambda one: len(one.rows) == 1)  # lines first
    return Factor(axis.label, tuple(drawn), axis.is_log)


def _series(name: str, rows: Sequence[Row]) -> Series:
    points = sorted(((row.x, row) for row in rows if row.x is not None), key=lambda point: point[0])
    return Series(name, tuple(float(x) for x, _ in points), tuple(row for _, row in points))


def _lies_on_another(series: Series) -> bool:
    """Return True if the series has one arm alone, which the first series that it names shows already."""
    return len(series.rows) == 1 and series.rows[0].series[0] != series.label
