"""The tables of one answer as files: terminal text, Markdown, LaTeX and CSV, all from the same rows."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from stadapter.results import table
from stadapter.results.frames import arms_frame, trials_frame
from stadapter.results.sources import Answer

# Characters with a meaning in LaTeX, and the few beyond ASCII that a table or a note contains.
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "±": r"$\pm$", "×": r"$\times$",
    "Δ": r"$\Delta$", "†": r"$^\dagger$", "✓": r"$^{\mathrm{v}}$", "·": r"$\cdot$", "|": r"$|$", "−": r"$-$",
}  # fmt: skip


def latex_escape(text: str) -> str:
    """Return the text as LaTeX prints it, with no package but booktabs."""
    return "".join(_LATEX.get(character, character) for character in text)


def _cell(text: str) -> str:
    """Return a cell with a true minus sign, or an en dash if it is empty."""
    if text == table.DASH:
        return "--"
    return f"$-${latex_escape(text[1:])}" if text.startswith("-") else latex_escape(text)


def to_latex(answer: Answer) -> str:
    """Return a table environment for a paper, no wider than its column. It needs the packages booktabs and graphicx."""
    header, *body = table.grid(answer.rows)
    frame = pd.DataFrame([[_cell(cell) for cell in line] for line in body])
    frame.columns = pd.Index([latex_escape(name) for name in header])
    text = frame.to_latex(
        index=False,
        escape=False,
        column_format="l" + "r" * (len(header) - 1),
        caption=latex_escape(answer.sweep.question),
        label=f"tab:{answer.name}",
        position="t",
    )
    notes = "\n".join(f"\\par {latex_escape(note)}" for note in answer.notes)
    under = f"\\par\\medskip\\footnotesize\\raggedright\n{notes}\n\\end{{table}}"
    shrink = "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{"
    start = f"\\centering\\small\\setlength{{\\tabcolsep}}{{4pt}}\n{shrink}\\begin{{tabular}}"
    return (
        text.replace("\\begin{tabular}", start)
        .replace("\\end{tabular}", "\\end{tabular}}")
        .replace("\\end{table}", under)
    )


def write_tables(answer: Answer, folder: Path) -> None:
    """Write `<name>.txt`, `.md`, `.tex`, `-arms.csv` (statistics) and `-trials.csv` (the trials behind them)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{answer.name}.txt").write_text(table.to_text(answer.sweep, answer.records))
    (folder / f"{answer.name}.md").write_text(table.to_markdown(answer.sweep, answer.records))
    (folder / f"{answer.name}.tex").write_text(to_latex(answer))
    arms_frame(answer).to_csv(folder / f"{answer.name}-arms.csv", index=False)
    trials_frame(answer).to_csv(folder / f"{answer.name}-trials.csv", index=False)
