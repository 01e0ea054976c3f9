"""The report: what was asked, what came out, how sure that is, and the runs behind every number."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from stadapter.results import content, grids, table
from stadapter.results.figure import draw, draw_overview
from stadapter.results.latex import write_tables
from stadapter.results.sources import Answer

OVERVIEW = "accuracy against trainable parameters of all arms"  # the text of the first figure


def write_report(answers: Sequence[Answer], folder: Path) -> Path:
    """Write report.md, report.html (self-contained), tables/ and figures/. Returns the path of the HTML."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    figures = {answer.name: draw(answer) for answer in answers} | {"overview": draw_overview(answers)}
    for name, figure in figures.items():
        for suffix in ("png", "pdf"):
            figure.savefig(folder / "figures" / f"{name}.{suffix}")
    for answer in answers:
        write_tables(answer, folder / "tables")
    (folder / "report.md").write_text(to_markdown(answers))
    page = folder / "report.html"
    page.write_text(to_html(answers, folder / "figures"))
    return page


def to_html(answers: Sequence[Answer], figures: Path) -> str:
    """Return the report as a page that needs no other file; `figures` holds overview.png and <name>.png of each answer.

    The text is escaped by the template. `**bold**` is the one mark of Markdown that it reads.
    """
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    return templates.get_template("report.html.j2").render(
        title=content.title(answers),
        introduction=[*content.overview(answers), content.READING],
        glance=content.glance(answers),
        overview_text=OVERVIEW,
        sections=[_section(answer) for answer in answers],
        figures={path.stem: base64.b64encode(path.read_bytes()).decode() for path in figures.glob("*.png")},
    )


def _section(answer: Answer) -> dict[str, Any]:
    """Return what both forms of the report say about one answer."""
    return {
        "name": answer.name,
        "heading": content.heading(answer),
        "question": answer.sweep.question,
        "expected": answer.sweep.expected,
        "finding": content.finding(answer),
        "table": table.grid(answer.rows),
        "kinds": ["default" if row.is_default else "hole" if row.hole else "" for row in answer.rows],
        "notes": answer.notes,
        "runs": content.runs(answer),
    }


def to_markdown(answers: Sequence[Answer]) -> str:
    """Return the report as Markdown; its figures are links into figures/."""
    parts = [
        f"# {content.title(answers)}",
        *content.overview(answers),
        content.READING,
        "## At a glance",
        grids.to_markdown(content.glance(answers)),
        f"![{OVERVIEW}](figures/overview.png)",
    ]
    for section in map(_section, answers):
        parts += [f"## {section['heading']}", section["question"]]
        if section["expected"]:
            parts.append(f"*Expected:* {section['expected']}")
        parts += [
            f"*Found:* {section['finding']}",
            grids.to_markdown(section["table"]),
            f"![{section['question']}](figures/{section['name']}.png)",
            "\n".join(f"- {note}" for note in section["notes"]),
            "<details><summary>The runs behind these numbers</summary>",
            grids.to_markdown(section["runs"]),
            "</details>",
        ]
    return "\n\n".join(parts) + "\n"
