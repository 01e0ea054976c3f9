"""The report: what was asked, what came out, how sure that is, and the runs behind every number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stadapter.results import content, table
from stadapter.results.figure import draw, draw_overview
from stadapter.results.latex import write_tables
from stadapter.results.page import to_html
from stadapter.results.sources import Answer


def write_report(answers: Sequence[Answer], folder: Path) -> Path:
    """Write report.md, report.html (self-contained), tables/ and figures/; returns the path of the HTML."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for answer in answers:
        write_tables(answer, folder / "tables")
        figure = draw(answer)
        for suffix in ("png", "pdf"):
            figure.savefig(folder / "figures" / f"{answer.name}.{suffix}")
    for suffix in ("png", "pdf"):
        draw_overview(answers).savefig(folder / "figures" / f"overview.{suffix}")
    (folder / "report.md").write_text(to_markdown(answers))
    page = folder / "report.html"
    page.write_text(to_html(answers, folder / "figures"))
    return page


def to_markdown(answers: Sequence[Answer]) -> str:
    """The report as Markdown; its figures are links into figures/."""
    parts = [
        f"# {content.title(answers)}",
        *content.overview(answers),
        content.READING,
        "## At a glance",
        _markdown(content.glance(answers)),
    ]
    parts += ["![accuracy against trainable parameters of all arms](figures/overview.png)"]
    for answer in answers:
        parts += [f"## {content.heading(answer)}", answer.sweep.question]
        if answer.sweep.expected:
            parts.append(f"*Expected:* {answer.sweep.expected}")
        parts.append(f"*Found:* {content.finding(answer)}")
        parts.append(_markdown(table.grid(answer.rows)))
        parts.append(f"![{answer.sweep.question}](figures/{answer.name}.png)")
        parts.append("\n".join(f"- {note}" for note in answer.notes))
        parts.append("<details><summary>The runs behind these numbers</summary>")
        parts += [_markdown(content.runs(answer)), "</details>"]
    return "\n\n".join(parts) + "\n"


def _markdown(grid: Sequence[Sequence[str]]) -> str:
    header, *body = ["| " + " | ".join(cells) + " |" for cells in grid]
    return "\n".join([header, "|---|" + "---:|" * (len(grid[0]) - 1), *body])
