"""Grids of text as tables: padded for a terminal, or in Markdown. A grid is a header and lines of as many cells."""

from __future__ import annotations

from collections.abc import Sequence

GAP = "  "
Grid = Sequence[Sequence[str]]


def padded(grid: Grid, *, ruled: bool = False) -> list[str]:
    """Return one line per line of the grid, the first column flush left and the others flush right.

    With `ruled`, a rule of dashes follows the header and another the last line.
    """
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    header, *body = [_line(cells, widths) for cells in grid]
    rule = ["-" * (sum(widths) + len(GAP) * (len(widths) - 1))] if ruled else []
    return [header, *rule, *body, *rule]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return GAP.join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]).rstrip()


def to_markdown(grid: Grid) -> str:
    """Return the grid as a table in Markdown, the first column flush left and the others flush right."""
    header, *body = ["| " + " | ".join(cells) + " |" for cells in grid]
    return "\n".join([header, "|---|" + "---:|" * (len(grid[0]) - 1), *body])
