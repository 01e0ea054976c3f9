"""The figure of a sweep: accuracy against the ablated factor, the trainable parameters and the cost.

A point is the mean over seeds, a small ring one seed, a bar the standard deviation over seeds, cut at 0 and 100 %; an
arm with one finished seed has no bar. The 95 % intervals stand in the tables: with two seeds they are nine times the
standard deviation, and bars of that length would hide the means.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from stadapter.results.factors import Factor, find_factor
from stadapter.results.sources import Answer
from stadapter.results.table import Row


def draw_overview(answers: Sequence[Answer]) -> Figure:
    """Return the figure of all arms: accuracy against trainable parameters, one colour per question."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        axes = figure.subplots()
        defaults: set[tuple[float, float]] = set()  # one point where all questions share the default recipe
        for number, answer in enumerate(answers):
            rows = [row for row in answer.rows if row.top1]
            defaults |= {(r.trainable_params or 0, r.top1.mean) for r in rows if r.is_default and r.top1}
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            axes.plot(
                [row.trainable_params or 0 for row in rows],
                [row.top1.mean for row in rows if row.top1],
                marker,
                color=colour,
                alpha=0.85,
                markeredgecolor="white",
                label=answer.sweep.name,
            )
        for number, (x, mean) in enumerate(sorted(defaults)):
            label = {"label": "default arm" if number == 0 else None}
            axes.plot([x], [mean], **RING | label)
        parameter_axis(axes, "trainable parameters")
        axes.set_ylabel(TOP1)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), title="question")
        return figure


_POINT_PX = 6.0
# (dx, dy) in points, and the alignment of the text there: right, left, above, below, then further away.
_PLACES = [
    (9, 0, "left", "center"),
    (-9, 0, "right", "center"),
    (0, 7, "center", "bottom"),
    (0, -7, "center", "top"),
    (6, 7, "left", "bottom"),
    (-6, 7, "right", "bottom"),
    (6, -7, "left", "top"),
    (-6, -7, "right", "top"),
    (8, 16, "left", "bottom"),
    (8, -16, "left", "top"),
    (-8, 16, "right", "bottom"),
    (-8, -16, "right", "top"),
]


def label_points(axes: Axes, labels: Sequence[str]) -> None:
    """Name the points of the axes' error bars, in their order, each at the first free of a few places.

    A name without a free place is left out: the other panel has every arm on its axis.
    """
    figure = axes.figure.get_figure(root=True)
    assert figure is not None
    renderer = FigureCanvasAgg(figure).get_renderer()
    bars: list[Any] = [container for container in axes.containers if isinstance(container, ErrorbarContainer)]
    centres = [axes.transData.transform(bar.lines[0].get_xydata()[0]) for bar in bars]
    taken = [Bbox.from_bounds(x - _POINT_PX, y - _POINT_PX, 2 * _POINT_PX, 2 * _POINT_PX) for x, y in centres]
    for bar in bars:
        for segment in bar.lines[2][0].get_segments():
            if len(segment):  # none where one seed has no spread
                (x0, y0), (x1, y1) = axes.transData.transform(segment)
                taken.append(Bbox.from_extents(x0 - 1, y0, x1 + 1, y1))
    frame = axes.get_window_extent(renderer)
    for bar, label in zip(bars, labels, strict=True):
        x, y = bar.lines[0].get_xydata()[0]
        for dx, dy, horizontal, vertical in _PLACES:
            text = axes.annotate(
                label,
                (float(x), float(y)),
                (dx, dy),
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                fontsize=8,
            )
            box = text.get_window_extent(renderer)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


# Okabe and Ito's palette, told apart with any colour vision; the markers differ as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")  # one more, so that no pair of both comes twice soon
INK, FAINT = "#222222", "#8a8a8a"
TOP1 = "top-1 accuracy (%)"
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "stadapter",
    "savefig.dpi": 150,
}
_PANEL_IN = (4.6, 3.5)  # width, height
_LEAST_SPAN = 4.0  # points of accuracy that an axis shows at least: noise must not fill a figure
_VARIES = 0.05  # a relative change of parameters or cost that is worth an axis
_TRADEOFFS = {"trainable_params": "trainable parameters", "gmacs": "cost of a clip (GMACs, all views)"}  # of a Row


def draw(answer: Answer) -> Figure:
    """Return the sweep's figure: a panel of the factor, and one each of trainable parameters and cost if they vary."""
    rows = [row for row in answer.rows if row.top1]
    with matplotlib.rc_context(STYLE):
        if not rows:
            return _empty_figure()
        factor = find_factor(answer.sweep.axis, rows)
        tradeoffs = {name: label for name, label in _TRADEOFFS.items() if _varies([getattr(r, name) for r in rows])}
        height = _PANEL_IN[1] if factor.is_number else max(_PANEL_IN[1], 1.3 + 0.32 * len(answer.rows))
        figure = Figure(figsize=(_PANEL_IN[0] * (1 + len(tradeoffs)), height), layout="constrained")
        first, *others = figure.subplots(1, 1 + len(tradeoffs), squeeze=False)[0]
        if factor.is_number:
            _draw_factor(first, factor)
        else:
            _draw_arms(first, answer.rows)
        _limit(first, rows, vertical=factor.is_number)
        for axes, (attribute, label) in zip(others, tradeoffs.items(), strict=True):
            _draw_tradeoff(axes, rows, attribute, label)
            _limit(axes, rows, vertical=True)
        if others or not factor.is_number:
            figure.draw_without_rendering()  # fixes the layout, which the labels are fitted into
            short = short_labels([row.arm for row in answer.rows])
            for axes in others:
                label_points(axes, [short[row.arm] for row in rows])
        return figure


def _empty_figure() -> Figure:
    figure = Figure(figsize=_PANEL_IN, layout="constrained")
    figure.text(0.5, 0.5, "no trial has finished", ha="center", color=FAINT)
    return figure


def short_labels(labels: Sequence[str]) -> dict[str, str]:
    """Return each arm's label without the words that all labels begin with: `3x3x3` of `kernel 3x3x3`."""
    starts = zip(*(label.split()[:-1] for label in labels), strict=False)
    shared = len(list(itertools.takewhile(lambda words: len(set(words)) == 1, starts)))
    return {label: " ".join(label.split()[shared:]) for label in labels}


def to_png(answer: Answer) -> bytes:
    """Return the figure as the content of a PNG file."""
    buffer = io.BytesIO()
    draw(answer).savefig(buffer, format="png", dpi=STYLE["savefig.dpi"])
    return buffer.getvalue()


def _varies(values: Sequence[float | None]) -> bool:
    known = [value for value in values if value]
    return len(known) > 1 and max(known) > min(known) * (1 + _VARIES)


def _draw_factor(axes: Axes, factor: Factor) -> None:
    for number, series in enumerate(factor.shifted()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        _draw_seeds(axes, series.x, series.rows, colour)
        means = [row.top1.mean for row in series.rows if row.top1]
        label = series.label or None
        line = "-" if series.connected else ""
        axes.errorbar(
            series.x,
            means,
            _error(series.rows),
            fmt=marker + line,
            color=colour,
            label=label,
            **_BAR,
        )
    _ring_default(axes, [(x, row) for s in factor.shifted() for x, row in zip(s.x, s.rows, strict=True)])
    points = [(x, row.published) for s in factor.series for x, row in zip(s.x, s.rows, strict=True)]
    for label, is_verified, face in (("published", True, INK), ("published, unverified", False, "none")):
        stars = [(x, value.top1) for x, value in points if value and value.is_verified == is_verified]
        if stars:
            axes.plot(*zip(*stars, strict=True), "*", color=INK, mfc=face, ms=11, label=label)
    if factor.is_log:
        axes.set_xscale("log", base=2)
    ticks = sorted({x for series in factor.series for x in series.x})
    axes.xaxis.set_major_locator(ticker.FixedLocator(ticks))
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xlabel(factor.label)
    axes.set_ylabel(TOP1)
    _legend(axes)


RING: Any = {
    "marker": "o",
    "mfc": "none",
    "mec": INK,
    "ms": 11,
    "mew": 1.2,
    "ls": "",
    "label": "default arm",
    "zorder": 4,
}
_BAR: Any = {"capsize": 3, "markersize": 6, "linewidth": 1.6, "elinewidth": 1.1, "markeredgecolor": "white"}


def _draw_arms(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw arms that have no number: one line each, the first on top. An arm without a result says so."""
    for position, row in enumerate(rows):
        if row.top1 is None:
            axes.text(0.02, position, "no result", transform=axes.get_yaxis_transform(), va="center", color=FAINT)
            continue
        seeds = list(row.top1_by_seed.values())
        axes.plot(seeds, [position] * len(seeds), "o", mfc="none", mec=COLOURS[0], ms=4, alpha=0.6, zorder=3)
        axes.errorbar(row.top1.mean, position, xerr=_error([row]), fmt="o", color=COLOURS[0], **_BAR)
        if row.is_default:
            axes.plot([row.top1.mean], [position], **RING)
    axes.set_yticks(range(len(rows)), [row.arm for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(TOP1)
    _legend(axes)


def _legend(axes: Axes) -> None:
    """Put the legend above the frame, where it covers no point."""
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, fontsize=9, handletextpad=0.5, columnspacing=1.2
        )


def _draw_tradeoff(axes: Axes, rows: Sequence[Row], attribute: str, label: str) -> None:
    for row in rows:
        x = [getattr(row, attribute)]
        axes.errorbar(x, [row.top1.mean if row.top1 else 0], _error([row]), fmt="o", color=COLOURS[0], **_BAR)
    _ring_default(axes, [(getattr(row, attribute), row) for row in rows])
    if attribute == "trainable_params":
        parameter_axis(axes, label)
    else:
        axes.set_xlabel(label)
    axes.margins(x=0.15)
    axes.set_ylabel(TOP1)


def parameter_axis(axes: Axes, label: str) -> None:
    """Make x a logarithmic axis of numbers of parameters, such as 50k."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    steps = (1.0,) if high / low > 100 else (1.0, 2.0, 5.0)
    axes.xaxis.set_major_locator(ticker.LogLocator(10, subs=steps))
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel(label)


def _draw_seeds(axes: Axes, x: Sequence[float], rows: Sequence[Row], colour: str) -> None:
    for at, row in zip(x, rows, strict=True):
        seeds = list(row.top1_by_seed.values())
        axes.plot([at] * len(seeds), seeds, "o", mfc="none", mec=colour, ms=4, alpha=0.6, zorder=3)


def _ring_default(axes: Axes, points: Sequence[tuple[float, Row]]) -> None:
    for x, row in [(x, row) for x, row in points if row.is_default][:1]:
        if row.top1:
            axes.plot([x], [row.top1.mean], **RING)


def _error(rows: Sequence[Row]) -> list[list[float]]:
    """Return the lengths of the bars below and above, cut at 0 and 100; NaN if one seed has no spread."""
    below, above = [], []
    for row in rows:
        summary = row.top1
        if summary is None or summary.sd is None:
            below.append(float("nan"))
            above.append(float("nan"))
        else:
            below.append(min(summary.sd, summary.mean))
            above.append(min(summary.sd, 100.0 - summary.mean))
    return [below, above]


def _limit(axes: Axes, rows: Sequence[Row], *, vertical: bool) -> None:
    """Leave room for the seeds and bars: at least four points of accuracy, and not far beyond 0 and 100."""
    ends = [row.top1.mean + sign * (row.top1.sd or 0.0) for row in rows if row.top1 for sign in (-1, 1)]
    values = ends + [value for row in rows for value in row.top1_by_seed.values()]
    values += [row.published.top1 for row in rows if row.published]
    span = max(values) - min(values)
    room = max(0.15 * span, (_LEAST_SPAN - span) / 2)
    low, high = max(-2.0, min(values) - room), min(100.0 + 0.05 * (span + 2 * room), max(values) + room)
    (axes.set_ylim if vertical else axes.set_xlim)(low, high)
