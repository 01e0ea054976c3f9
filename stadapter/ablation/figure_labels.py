"""Names beside points, placed so that they cover neither a point nor each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer
from matplotlib.transforms import Bbox

_POINT_PX = 6.0
# (dx, dy) in points, and how the text hangs on that place: right, left, above, below, then further away.
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
    """Name the points of the axes' error bars, in their order; each takes the first free of a few places.

    A name with no free place is left out: the other panel, which has every arm on its axis, shows it.
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
