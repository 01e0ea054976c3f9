"""The table of a sweep: one row per arm, made from the records and nothing else.

A trial without a result leaves a marked hole: the row says how many seeds it stands on. A published value appears only
if the arm is exactly a published configuration; otherwise there is a dash. The terminal, the files of a sweep and the
report all show these rows.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stadapter import config
from stadapter.config import Recipe
from stadapter.results import grids
from stadapter.results.paired_tests import Difference, Summary, compare, holm, summarise
from stadapter.results.paper import MARKS, Published, published
from stadapter.trials.record import Record, Unreadable
from stadapter.trials.sweep import Arm, Sweep, Trial

DASH = "-"
DIVERGED = "†"
# Accuracies that only some data sets have: of opposite pairs, and of verb and noun heads (top-1 is then the action's).
_PARTS = {"direction_top1": "direction %", "verb_top1": "verb %", "noun_top1": "noun %"}
Records = Sequence[Record | None]


@dataclass(frozen=True)
class Row:
    """One arm over its seeds."""

    arm: str
    recipe: Recipe  # of its first seed
    x: float | None  # on the sweep's axis; None without one
    series: tuple[str, ...]  # of the figure
    trials: tuple[str, ...]  # ids of all seeds asked for
    is_default: bool
    top1_by_seed: dict[int, float]  # per cent, of the seeds that finished
    top1: Summary | None
    parts: Mapping[str, Summary]  # the other accuracies that the data set has, by their names in _PARTS
    difference: Difference | None  # to the default arm; None for that arm itself
    trainable_params: int | None
    gmacs: float | None  # all test views together, as papers print it
    peak_memory_mib: float | None
    seconds: float | None  # mean per trial
    diverged: int  # finished seeds whose training was flagged as diverged
    published: Published | None

    @property
    def untestable(self) -> bool:
        """True if the difference to the default arm is the same in each of several seeds, which no test covers."""
        return self.difference is not None and self.difference.n > 1 and self.difference.p is None

    @property
    def hole(self) -> str:
        """How many of the trials finished, such as `1 of 2`; empty if all did."""
        wanted, there = len(self.trials), len(self.top1_by_seed)
        return "" if there == wanted else f"{there} of {wanted}"


def default_arm(sweep: Sweep) -> str:
    """Return the label of the arm compared with: the one equal to the sweep's recipe, or the first."""
    unchanged = config.identity(config.replace(sweep.recipe, seed=0))
    same = (t.arm for t in sweep.trials if config.identity(config.replace(t.recipe, seed=0)) == unchanged)
    return next(same, sweep.arms[0].label)


def usable(result: Record | None) -> bool:
    """Return True if the record has a finite accuracy. One that is not finite leaves a hole and joins no mean."""
    return result is not None and math.isfinite(result.metrics.get("top1", math.nan))


def make_rows(sweep: Sweep, records: Records) -> list[Row]:
    """Return one row per arm, in the sweep's order. `records` are in the order of `sweep.trials`, None if missing."""
    default = default_arm(sweep)
    mine: dict[str, list[tuple[Trial, Record | None]]] = {arm.label: [] for arm in sweep.arms}
    for trial, result in zip(sweep.trials, records, strict=True):
        mine[trial.arm].append((trial, result if usable(result) else None))
    rows = [_row(arm, mine[arm.label], arm.label == default) for arm in sweep.arms]
    reference = next(row for row in rows if row.is_default).top1_by_seed
    differences = [None if row.is_default else compare(row.top1_by_seed, reference) for row in rows]
    comparisons = sum(d is not None and d.n > 1 for d in differences)
    corrected = holm([d.p if d else None for d in differences], comparisons)
    return [
        dataclasses.replace(row, difference=d and dataclasses.replace(d, p_holm=p))
        for row, d, p in zip(rows, differences, corrected, strict=True)
    ]


def _row(arm: Arm, pairs: Sequence[tuple[Trial, Record | None]], is_default: bool) -> Row:
    done = [result for _, result in pairs if result is not None]
    top1 = {trial.seed: result.metrics["top1"] for trial, result in pairs if result is not None}
    memory = [r.peak_memory_mib for r in done if r.peak_memory_mib is not None]
    params = done[0].trainable_params if done else None
    return Row(
        arm=arm.label,
        recipe=pairs[0][0].recipe,
        x=arm.x,
        series=arm.series_names,
        trials=tuple(trial.id for trial, _ in pairs),
        is_default=is_default,
        top1_by_seed=top1,
        top1=summarise(list(top1.values())),
        parts={
            name: found
            for name in _PARTS
            if (found := summarise([r.metrics[name] for r in done if name in r.metrics])) is not None
        },
        difference=None,
        trainable_params=params,
        gmacs=done[0].macs_per_view * done[0].views / 1e9 if done else None,
        peak_memory_mib=max(memory, default=None),
        seconds=statistics.fmean(r.seconds for r in done) if done else None,
        diverged=sum(bool(r.diverged) for r in done),
        published=published(pairs[0][0].recipe, params),
    )


def mean_and_spread(summary: Summary | None) -> str:
    """Return mean and standard deviation over seeds as `97.1 ± 0.4`; a single value has no spread to show."""
    if summary is None:
        return DASH
    return f"{summary.mean:.1f}" if summary.sd is None else f"{summary.mean:.1f} ± {summary.sd:.1f}"


def p_text(p: float | None) -> str:
    """Return a p-value as `0.031`, `<0.001`, or a dash."""
    if p is None:
        return DASH
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def signed(value: float | None) -> str:
    """Return a difference as `+1.2`, `-0.4`, or a dash; a difference that rounds to 0 has no minus."""
    return DASH if value is None else f"{round(value, 1) + 0.0:+.1f}"


def _interval(summary: Summary | None) -> str:
    if summary is None or summary.low is None or summary.high is None:
        return DASH
    return f"{max(0.0, summary.low):.1f} to {min(100.0, summary.high):.1f}"


def _number(value: float | None, form: str) -> str:
    return DASH if value is None else format(value, form)


def _cells(row: Row) -> dict[str, str]:
    difference = row.difference
    return {
        "arm": row.arm,
        "top-1 %": mean_and_spread(row.top1) + (DIVERGED if row.diverged else ""),
        "95 % interval": _interval(row.top1),
        "Δ": "default" if row.is_default else signed(difference.mean if difference else None),
        "p (Holm)": p_text(difference.p_holm if difference else None),
        **{heading: mean_and_spread(row.parts.get(name)) for name, heading in _PARTS.items()},
        "trainable": _number(row.trainable_params, ","),
        "GMACs": _number(row.gmacs, ".4g"),
        "MiB": _number(row.peak_memory_mib, ".0f"),
        "seconds": _number(row.seconds, ".0f"),
        "paper %": str(row.published) if row.published else DASH,
        "seeds": row.hole or str(len(row.top1_by_seed)),
    }


def grid(rows: Sequence[Row]) -> list[list[str]]:
    """Return a header and one line of text per row, without the columns that nothing was measured for."""
    lines = [_cells(row) for row in rows]
    optional = ("95 % interval", "p (Holm)", *_PARTS.values(), "MiB")
    shown = [name for name in lines[0] if name not in optional or any(line[name] != DASH for line in lines)]
    return [shown, *([line[name] for name in shown] for line in lines)]


def notes(sweep: Sweep, rows: Sequence[Row], records: Records) -> list[str]:
    """Return what a reader needs to judge the table: spread, holes, costs, published values, data, code and machine."""
    done = [record for record in records if record is not None]
    return [*_spread(sweep, rows), *_holes(rows), *_costs(done), _published(rows), *_origin(sweep, done)]


def _spread(sweep: Sweep, rows: Sequence[Row]) -> list[str]:
    """Return what the error bars, intervals and p-values are, and why some are not there."""
    several = [row.top1 for row in rows if row.top1 and row.top1.n > 1]
    lines = []
    if several:
        lines = [
            "± is the standard deviation over seeds; the interval of the mean is Student's t, cut at 0 and 100.",
            f"Δ: mean difference to '{default_arm(sweep)}', paired by seed; p: paired t test, Holm-corrected.",
        ]
    if any(summary.low is None for summary in several):
        lines.append("Accuracies that are equal in all seeds have no interval: that would claim certainty.")
    if untested := [row.arm for row in rows if row.untestable]:
        lines.append(
            f"No p-value: {', '.join(untested)}; the differences are equal in all seeds, which leaves no spread "
            "to test against; --seeds adds some."
        )
    if len({trial.seed for trial in sweep.trials}) == 1:
        lines.append("One seed per arm: no error bar, interval or p-value can be given; --seeds 3 adds seeds.")
    elif any(row.top1 and row.top1.n == 1 for row in rows):
        lines.append("An arm with one finished seed has no error bar.")
    return lines


def _holes(rows: Sequence[Row]) -> list[str]:
    """Return which trials are missing or diverged."""
    lines = []
    if holes := [f"{row.arm} ({row.hole} seeds finished)" for row in rows if row.hole]:
        lines.append(f"INCOMPLETE: {', '.join(holes)}; means and differences stand on the seeds that finished.")
    if any(row.diverged for row in rows):
        lines.append(f"{DIVERGED} the training of at least one seed diverged; its number is in the mean.")
    return lines


def _costs(done: Sequence[Record]) -> list[str]:
    """Return what the columns of cost mean."""
    lines = ["GMACs count all test views of a clip; seconds are per trial; MiB: peak memory (CPU: of the process)."]
    if kept := sum(record.prefix_cache is not None for record in done):
        lines.append(f"{kept} trials read the tokens of their frozen blocks from a cache: their seconds depend on it.")
    return lines


def _published(rows: Sequence[Row]) -> str:
    """Return where the published values were read, and how sure they are."""
    values = dict.fromkeys(row.published for row in rows if row.published)
    if not values:
        return "No published value is known for these arms (-)."
    sources = "; ".join(f"{value} {value.source} ({value.status})" for value in values)
    return f"Paper values, {MARKS['verified']} verified, {MARKS['unverified']} unverified: {sources}."


def _origin(sweep: Sweep, done: Sequence[Record]) -> list[str]:
    """Return data, code and machine, and a warning if the trials do not share their data."""
    if not done:
        return []
    test = sorted({f"{r.data['test'].clips} clips, {r.data['test'].fingerprint}" for r in done})
    commits = sorted({r.code for r in done})
    devices = sorted({f"{r.device}, {r.precision}" for r in done})
    lines = [
        f"Test data {sweep.recipe.data.dataset}: {' | '.join(test)}. Code {' | '.join(commits)}.",
        f"Measured on {' | '.join(devices)}.",
    ]
    for split, fate in (("train", "replaced by their neighbours"), ("test", "counted as wrong")):
        bad = [found for r in done if (found := r.bad_clips.get(split, Unreadable())).clips]
        if bad:
            most = max(bad, key=lambda found: found.clips)
            lines.append(f"Unreadable {split} clips, {fate}: up to {most.clips}; first {most.first[0]}.")
    if len(test) > 1:
        lines.insert(0, "WARNING: the trials were not tested on the same clips; their differences mean nothing.")
    return lines


def to_text(sweep: Sweep, records: Records) -> str:
    """Return the table for a terminal."""
    rows = make_rows(sweep, records)
    return "\n".join([*grids.padded(grid(rows), ruled=True), *notes(sweep, rows, records)]) + "\n"


def to_markdown(sweep: Sweep, records: Records) -> str:
    """Return the table for a document, its notes as a list."""
    rows = make_rows(sweep, records)
    return "\n".join([grids.to_markdown(grid(rows)), "", *(f"- {note}" for note in notes(sweep, rows, records))]) + "\n"


_COUNTED = ("trainable_params", "macs_per_view", "views", "seconds", "peak_memory_mib", "git_commit")


def to_csv(sweep: Sweep, records: Records) -> str:
    """Return one line per trial, unrounded: the numbers that the rows are made from."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["arm", "seed", "trial_id", "status", "top1", *_PARTS, *_COUNTED])
    for trial, result in zip(sweep.trials, records, strict=True):
        if result is None:
            writer.writerow([trial.arm, trial.seed, trial.id, "missing", *[""] * (1 + len(_PARTS) + len(_COUNTED))])
        else:
            metrics = result.metrics
            measured = [metrics["top1"], *(metrics.get(name, "") for name in _PARTS)]
            counted = ["" if (value := getattr(result, name)) is None else value for name in _COUNTED]
            status = "diverged" if result.diverged else "finished"
            writer.writerow([trial.arm, trial.seed, trial.id, status, *measured, *counted])
    return buffer.getvalue()
