"""Figures of answers. That of a single one is the figure which its sweep keeps, too."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure

from analysis.sources import Answer
from stadapter.ablation import figure as one
from stadapter.ablation.figure import COLOURS, MARKERS, RING, STYLE, TOP1, parameter_axis


def draw(answer: Answer) -> Figure:
    """The factor, and where they vary, trainable parameters and cost. Without a result, an empty note."""
    return one.draw(answer.rows)


def draw_overview(answers: Sequence[Answer]) -> Figure:
    """Accuracy against trainable parameters of every arm of every question, one colour per question."""
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
