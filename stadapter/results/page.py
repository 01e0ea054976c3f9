"""The report as one HTML file that needs no other: figures and style are inside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from stadapter.results import content, table
from stadapter.results.sources import Answer

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 3rem; border-top: 1px solid #ddd; padding-top: 1.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead { border-top: 2px solid #222; border-bottom: 1px solid #222; } tbody { border-bottom: 2px solid #222; }
tr.default td { background: #f3f6fa; font-weight: 600; } tr.hole td { background: #fff3e0; }
img { max-width: 100%; height: auto; }
.notes, summary, nav { font-size: .85rem; color: #555; } .notes li { margin: 0; }
"""


def to_html(answers: Sequence[Answer], figures: Path) -> str:
    """The whole page. `figures` holds overview.png and <name>.png of each answer."""
    links = " · ".join(f'<a href="#{a.name}">{html.escape(content.heading(a))}</a>' for a in answers)
    parts = [f"<h1>{html.escape(content.title(answers))}</h1>", f"<nav>{links}</nav>"]
    parts += [_paragraph(text) for text in (*content.overview(answers), content.READING)]
    parts += ["<h2>At a glance</h2>", _table(content.glance(answers))]
    parts.append(_image(figures / "overview.png", "accuracy against trainable parameters of all arms"))
    for answer in answers:
        rows = answer.rows
        marks = ["default" if row.is_default else "hole" if row.hole else "" for row in rows]
        parts.append(f'<h2 id="{answer.name}">{html.escape(content.heading(answer))}</h2>')
        parts.append(_paragraph(answer.sweep.question))
        if answer.sweep.expected:
            parts.append(f"<p><em>Expected:</em> {html.escape(answer.sweep.expected)}</p>")
        parts.append(f"<p><em>Found:</em> {html.escape(content.finding(answer))}</p>")
        parts.append(_table(table.grid(rows), marks))
        parts.append(_image(figures / f"{answer.name}.png", answer.sweep.question))
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in answer.notes)
        parts.append(f'<ul class="notes">{notes}</ul>')
        parts.append(
            "<details><summary>The runs behind these numbers</summary>" + _table(content.runs(answer)) + "</details>"
        )
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
    name = html.escape(content.title(answers))
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><title>{name}</title>{head}</head>\n<body>\n{body}\n</body></html>\n'
    )


def _paragraph(text: str) -> str:
    """`**bold**` is the one mark that the texts of the report use."""
    pieces = html.escape(text).split("**")
    return "<p>" + "".join(f"<strong>{p}</strong>" if i % 2 else p for i, p in enumerate(pieces)) + "</p>"


def _table(grid: Sequence[Sequence[str]], marks: Sequence[str] | None = None) -> str:
    header, *body = grid
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    lines = []
    for cells, mark in zip(body, marks or [""] * len(body), strict=True):
        kind = f' class="{mark}"' if mark else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _image(path: Path, text: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">'
