"""The content of a report, apart from its form: title, overview, findings in words, and the runs behind the numbers."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from stadapter.results import table
from stadapter.results.sources import Answer
from stadapter.results.table import Row

SIGNIFICANCE = 0.05
READING = (
    "Every arm of a question was trained with the same seeds, and arms with the same seed saw the same clips in the "
    "same order; so differences are paired by seed. ± is the standard deviation over seeds, the interval is the 95 % "
    "t interval of the mean, p comes from the paired t test with Holm's correction for the number of arms. With two "
    "seeds only a difference many times the spread can be significant: 'no significant difference' means 'not shown', "
    "not 'equal'. In the figures a point is the mean, a bar the standard deviation, a small ring one seed."
)


def title(answers: Sequence[Answer]) -> str:
    """Return the title of the report, with the names of its recipes."""
    return "ST-Adapter ablations: " + ", ".join(sorted({a.sweep.recipe.name for a in answers}))


def heading(answer: Answer) -> str:
    """Return the heading of one answer, such as `Kernel (embedded)`."""
    return f"{answer.sweep.name.replace('_', ' ').capitalize()} ({answer.sweep.recipe.name})"


def overview(answers: Sequence[Answer]) -> list[str]:
    """Return what the report stands on: how many trials, when, how long, on which machines, from which code."""
    wanted = {trial.id for answer in answers for trial in answer.sweep.trials}
    done = {r.trial_id: r for answer in answers for r in answer.records if r is not None}
    if not done:
        return [f"None of {len(wanted)} trials has finished."]
    last = datetime.datetime.fromtimestamp(max(r.finished for r in done.values()), datetime.UTC)
    hours = sum(r.seconds for r in done.values()) / 3600
    devices = ", ".join(sorted({r.device for r in done.values()}))
    commits = ", ".join(sorted({r.code for r in done.values()}))
    missing = len(wanted) - len(done)
    hole = f" **Missing: {missing} of {len(wanted)} trials**; the tables mark where." if missing else ""
    return [
        f"{len(answers)} questions, {len(done)} of {len(wanted)} trials finished, the last on "
        f"{last:%Y-%m-%d %H:%M} UTC; {hours:.1f} hours of training on {devices}; code {commits}.{hole}"
    ]


def glance(answers: Sequence[Answer]) -> list[list[str]]:
    """Return one line per question: the default arm, the best one, and how many arms differ."""
    lines = [["question", "default arm", "top-1 %", "best arm", "top-1 %", "differ from the default", "seeds"]]
    for answer in answers:
        default = next(row for row in answer.rows if row.is_default)
        best = best_row(answer)
        differ = [row for row in answer.rows if _significant(row)]
        compared = [row for row in answer.rows if row.difference is not None and row.difference.p is not None]
        lines.append(
            [
                heading(answer),
                default.arm,
                table.mean_and_spread(default.top1),
                best.arm if best else table.DASH,
                table.mean_and_spread(best.top1) if best else table.DASH,
                _count(len(differ), len(compared), sum(row.untestable for row in answer.rows)),
                str(len({trial.seed for trial in answer.sweep.trials})),
            ]
        )
    return lines


def _count(differ: int, tested: int, untestable: int) -> str:
    """Return how many arms differ, such as `3 of 5 arms; 1 not testable`."""
    if not tested:
        return "not testable"
    return f"{differ} of {tested} arms" + (f"; {untestable} not testable" if untestable else "")


def best_row(answer: Answer) -> Row | None:
    """Return the arm with the highest mean accuracy, or None if nothing has finished."""
    done = [row for row in answer.rows if row.top1]
    return max(done, key=lambda row: row.top1.mean if row.top1 else 0.0, default=None)


def finding(answer: Answer) -> str:
    """Return in words what the table says: the best arm, and which arms differ significantly from the default one."""
    best = best_row(answer)
    if best is None:
        return "no trial has finished."
    default = next(row for row in answer.rows if row.is_default)
    parts = [f"the highest mean is {table.mean_and_spread(best.top1)} % ({best.arm})"]
    if best is not default:
        parts.append(f"the default arm, {default.arm}, has {table.mean_and_spread(default.top1)} %")
    parts += [
        f"{row.arm} differs by {table.signed(row.difference.mean)} points in every seed, which no test covers"
        for row in answer.rows
        if row.untestable and row.difference
    ]
    return f"{'; '.join(parts)}. {_tests_in_words(answer.rows)}"


def _tests_in_words(rows: Sequence[Row]) -> str:
    tested = [row for row in rows if row.difference and row.difference.p is not None]
    if not tested:
        return "Differences cannot be tested: that needs at least two seeds per arm that do not all agree."
    differ = [_difference(row) for row in tested if _significant(row)]
    if not differ:
        return f"No arm differs significantly from the default one (p < {SIGNIFICANCE}, {len(tested)} compared)."
    rest = f"; the other {len(tested) - len(differ)} do not" if len(differ) < len(tested) else ""
    return f"Significantly different from the default arm: {', '.join(differ)}{rest}."


def _significant(row: Row) -> bool:
    p = row.difference.p_holm if row.difference else None
    return p is not None and p < SIGNIFICANCE


def _difference(row: Row) -> str:
    assert row.difference is not None
    p = table.p_text(row.difference.p_holm)
    return f"{row.arm} {table.signed(row.difference.mean)} points (p {p if p.startswith('<') else '= ' + p})"


def runs(answer: Answer) -> list[list[str]]:
    """Return one line per trial of the question: its run folder, its accuracy and its code."""
    lines = [["arm", "seed", "run folder", "top-1 %", "seconds", "code"]]
    for trial, result in zip(answer.sweep.trials, answer.records, strict=True):
        if result is None:
            lines.append([trial.arm, str(trial.seed), f"trials/{trial.id}", "no result", table.DASH, table.DASH])
        else:
            top1 = f"{result.metrics['top1']:.2f}" + (table.DIVERGED if result.diverged else "")
            where = f"trials/{trial.id}"
            lines.append([trial.arm, str(trial.seed), where, top1, f"{result.seconds:.0f}", result.code])
    return lines
