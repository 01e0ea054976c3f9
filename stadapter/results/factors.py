"""Which field a sweep varies, and how its arms lie along an axis."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stadapter import config
from stadapter.results.table import Row


@dataclass(frozen=True)
class Series:
    """Arms that belong together in a figure, sorted by x; `connected` where a line between them means something."""

    label: str
    x: tuple[float, ...]
    rows: tuple[Row, ...]
    connected: bool = True


@dataclass(frozen=True)
class Factor:
    """What varies. Without a numeric axis there are no series, and the arms are listed by name."""

    label: str = ""
    series: tuple[Series, ...] = ()
    is_log: bool = False

    @property
    def is_number(self) -> bool:
        return bool(self.series)

    def shifted(self) -> list[Series]:
        """The series side by side, so that arms with the same x do not hide each other."""
        span = max(x for s in self.series for x in s.x) - min(x for s in self.series for x in s.x)
        step = 0.0 if self.is_log else 0.015 * span
        middle = (len(self.series) - 1) / 2
        return [
            dataclasses.replace(series, x=tuple(x + (number - middle) * step for x in series.x))
            for number, series in enumerate(self.series)
        ]


def find_factor(rows: Sequence[Row]) -> Factor:
    """The one field that differs between the arms' recipes, if it is one that lies on an axis."""
    flat = [config.flatten(row.recipe) for row in rows]
    varying = {path for path in flat[0] if len({str(fields[path]) for fields in flat}) > 1}
    if varying == {"adapter.kernel_size"}:
        return _kernel(rows)
    if varying == {"adapter.bottleneck_width"}:
        return Factor(
            "bottleneck width (channels)", (_series("", rows, lambda r: r.recipe.adapter.bottleneck_width),), True
        )
    if varying == {"data.num_frames"}:
        return Factor("frames per clip", (_series("", rows, lambda r: r.recipe.data.num_frames),), True)
    if varying == {"adapter.blocks"}:
        return _depth(rows)
    return Factor()


def _series(label: str, rows: Sequence[Row], x: Callable[[Row], float], connected: bool = True) -> Series:
    ordered = sorted(rows, key=x)
    return Series(label, tuple(float(x(row)) for row in ordered), tuple(ordered), connected)


def _kernel(rows: Sequence[Row]) -> Factor:
    """One line per spatial extent over the temporal one."""
    spatial = sorted({row.recipe.adapter.kernel_size[1:] for row in rows})
    series = []
    for extent in spatial:
        mine = [row for row in rows if row.recipe.adapter.kernel_size[1:] == extent]
        label = f"spatial extent {extent[0]}×{extent[1]}"
        series.append(_series(label, mine, lambda row: row.recipe.adapter.kernel_size[0]))
    return Factor("temporal extent of the kernel (frames)", tuple(series))


def _depth(rows: Sequence[Row]) -> Factor:
    """Accuracy over the number of blocks: a line for the last ones, one for the first ones, points for the others."""
    named = [row.recipe.adapter.blocks for row in rows]
    end = max((max(blocks) for blocks in named if blocks), default=-1) + 1

    def blocks_of(row: Row) -> tuple[int, ...]:
        blocks = row.recipe.adapter.blocks
        return tuple(range(end)) if blocks is None else tuple(sorted(blocks))

    def count(row: Row) -> int:
        return len(blocks_of(row))

    last = [row for row in rows if blocks_of(row) == tuple(range(end))[-count(row) :]]
    first = [row for row in rows if blocks_of(row) == tuple(range(count(row)))]
    others = [row for row in rows if row not in last and row not in first]
    lines = [_series("last blocks", last, count), _series("first blocks", first, count)]
    series = [line for line in lines if line.rows and (len(line.rows) > 1 or line.label == "last blocks")]
    single = [row for row in others if count(row) == 1]
    if single:
        series.append(_series("one block", single, count, connected=False))
    series += [_series(row.arm, [row], count, connected=False) for row in others if row not in single]
    return Factor("number of blocks with adapters", tuple(series))
