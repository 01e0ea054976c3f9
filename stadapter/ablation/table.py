"""The table of a sweep: one row per arm, made from the records and nothing else.

A trial that failed or has not run leaves a marked hole: the row says how many seeds it stands on. A published value
appears only where the arm is exactly a published configuration (`paper.toml`, with its source); elsewhere a dash.
"""

from __future__ import annotations

import csv
import io
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stadapter.ablation.trial import Sweep
from stadapter.config import Recipe

PAPER = Path(__file__).parent.parent / "assets" / "paper.toml"
_BACKBONES = {
    "timm/vit_base_patch16_clip_224.openai": "clip_vit_b16",
    "open_clip/ViT-B-16/openai": "clip_vit_b16",
    "timm/vit_large_patch14_clip_224.openai": "clip_vit_l14",
    "open_clip/ViT-L-14/openai": "clip_vit_l14",
}
DASH = "-"
# Of opposite pairs, and of verb and noun heads, whose top-1 is that of the action.
_PARTS = {"direction_top1": "direction %", "verb_top1": "verb %", "noun_top1": "noun %"}


@dataclass(frozen=True)
class Row:
    """One arm over its seeds; values are in the order of the seeds that finished."""

    arm: str
    wanted: int  # seeds asked for
    top1: tuple[float, ...]
    parts: Mapping[str, tuple[float, ...]]  # the other accuracies that the data set has, by their names in _PARTS
    trainable_params: int | None
    gmacs: float | None  # all test views together, as papers print it
    seconds: tuple[float, ...]
    paper_top1: float | None
    paper_source: str

    @property
    def hole(self) -> str:
        """What a reader must know about missing trials; empty when there is nothing to say."""
        return "" if len(self.top1) == self.wanted else f"{self.wanted - len(self.top1)} of {self.wanted} missing"


def make_rows(sweep: Sweep, records: Sequence[dict[str, Any] | None]) -> list[Row]:
    """One row per arm, in the sweep's order. `records` are in the order of `sweep.trials`, None for a missing one."""
    rows = []
    for arm in sweep.arms:
        mine = [(t, r) for t, r in zip(sweep.trials, records, strict=True) if t.arm == arm.label]
        done = [r for _, r in mine if r is not None]
        paper_top1, source = published(mine[0][0].recipe)
        rows.append(
            Row(
                arm=arm.label,
                wanted=len(mine),
                top1=tuple(r["metrics"]["top1"] for r in done),
                parts={
                    name: values
                    for name in _PARTS
                    if (values := tuple(r["metrics"][name] for r in done if name in r["metrics"]))
                },
                trainable_params=done[0]["trainable_params"] if done else None,
                gmacs=done[0]["macs_per_view"] * done[0]["views"] / 1e9 if done else None,
                seconds=tuple(r["seconds"] for r in done),
                paper_top1=paper_top1,
                paper_source=source,
            )
        )
    return rows


def published(recipe: Recipe, paper: Path = PAPER) -> tuple[float | None, str]:
    """The published top-1 of exactly this configuration and its source, or (None, "")."""
    data, adapter = recipe.data, recipe.adapter
    backbone = _BACKBONES.get(recipe.backbone.name)
    known = tomllib.loads(paper.read_text())
    setting = known["recipe"].get(data.dataset, {})
    if (
        recipe.strategy != "st_adapter"
        or backbone is None
        or adapter.blocks is not None
        or adapter.activation != "none"
    ):
        return None, ""
    if (adapter.placement, list(adapter.kernel_size)) != (setting.get("placement"), setting.get("kernel")):
        return None, ""
    depth = {"clip_vit_b16": 12, "clip_vit_l14": 24}[backbone]
    adapters = f"{depth * (2 if adapter.placement == 'both' else 1)}x{adapter.bottleneck_width}"
    views = f"{data.test_temporal_views}x{data.test_spatial_views}"
    for entry in known["accuracy"]:
        same = (entry["dataset"], entry["backbone"], entry.get("adapters"), entry.get("frames"), entry.get("views"))
        if same == (data.dataset, backbone, adapters, data.num_frames, views) and entry["status"] == "verified":
            return entry["top1"], entry["source"]
    return None, ""


_HEADER = ("arm", "top-1 %", *_PARTS.values(), "trainable", "GMACs", "seconds", "paper top-1 %", "seeds")


def _cells(row: Row) -> tuple[str, ...]:
    seeds = str(len(row.top1)) if not row.hole else f"{len(row.top1)} ({row.hole})"
    return (
        row.arm,
        mean_and_spread(row.top1),
        *(mean_and_spread(row.parts.get(name, ())) for name in _PARTS),
        DASH if row.trainable_params is None else f"{row.trainable_params:,}",
        DASH if row.gmacs is None else f"{row.gmacs:.4g}",
        DASH if not row.seconds else f"{statistics.mean(row.seconds):.0f}",
        DASH if row.paper_top1 is None else f"{row.paper_top1:.1f}",
        seeds,
    )


def mean_and_spread(values: Sequence[float]) -> str:
    """`97.1 ± 0.4`: mean and standard deviation over seeds; a single value has no spread to show."""
    if not values:
        return DASH
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def _columns(rows: Sequence[Row]) -> list[int]:
    """Columns to show: direction, verb and noun only where they were measured."""
    measured = {_PARTS[name] for row in rows for name in row.parts}
    return [i for i, name in enumerate(_HEADER) if name not in _PARTS.values() or name in measured]


def notes(sweep: Sweep, rows: Sequence[Row], records: Sequence[dict[str, Any] | None]) -> list[str]:
    """What a reader needs to judge the table: spread, source of published values, data, code and machine."""
    done = [r for r in records if r is not None]
    lines = ["± is the standard deviation over seeds; GMACs count all test views of a clip; seconds are per trial."]
    sources = sorted({row.paper_source for row in rows if row.paper_source})
    lines.append(
        f"Paper values: {'; '.join(sources)}." if sources else "No published value is known for these arms (-)."
    )
    if done:
        test = sorted({f"{r['data']['test']['clips']} clips, {r['data']['test']['fingerprint']}" for r in done})
        commits = sorted({r["git_commit"][:10] + ("+changes" if r["git_dirty"] else "") for r in done})
        devices = sorted({f"{r['device']}, {r['precision']}" for r in done})
        lines.append(f"Test data {sweep.recipe.data.dataset}: {' | '.join(test)}. Code {' | '.join(commits)}.")
        lines.append(f"Measured on {' | '.join(devices)}.")
        for split, fate in (("train", "replaced by their neighbours"), ("test", "counted as wrong")):
            bad = [r["bad_clips"][split] for r in done if r.get("bad_clips", {}).get(split, {}).get("clips")]
            if bad:
                most = max(bad, key=lambda found: found["clips"])
                lines.append(f"Unreadable {split} clips, {fate}: up to {most['clips']}; first {most['first'][0]}.")
    return lines


def to_text(sweep: Sweep, records: Sequence[dict[str, Any] | None]) -> str:
    """The table for a terminal."""
    rows = make_rows(sweep, records)
    shown = _columns(rows)
    grid = [[cells[i] for i in shown] for cells in [_HEADER, *map(_cells, rows)]]
    widths = [max(len(line[i]) for line in grid) for i in range(len(shown))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join([first, *rest]).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([line(grid[0]), rule, *map(line, grid[1:]), rule, *notes(sweep, rows, records)]) + "\n"


def to_markdown(sweep: Sweep, records: Sequence[dict[str, Any] | None]) -> str:
    """The table for a document."""
    rows = make_rows(sweep, records)
    shown = _columns(rows)
    lines = ["| " + " | ".join(cells[i] for i in shown) + " |" for cells in [_HEADER, *map(_cells, rows)]]
    rule = "|" + "|".join("---" if i == 0 else "---:" for i in range(len(shown))) + "|"
    return "\n".join([lines[0], rule, *lines[1:], "", *notes(sweep, rows, records)]) + "\n"


def to_csv(sweep: Sweep, records: Sequence[dict[str, Any] | None]) -> str:
    """One line per trial, unrounded: what the rows are made from."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        [
            "arm",
            "seed",
            "trial_id",
            "status",
            "top1",
            *_PARTS,
            "trainable_params",
            "macs_per_view",
            "views",
            "seconds",
        ]
    )
    for trial, result in zip(sweep.trials, records, strict=True):
        if result is None:
            writer.writerow([trial.arm, trial.seed, trial.id, "missing", *[""] * (5 + len(_PARTS))])
        else:
            metrics = result["metrics"]
            measured = [metrics["top1"], *(metrics.get(name, "") for name in _PARTS)]
            counted = [result[name] for name in ("trainable_params", "macs_per_view", "views", "seconds")]
            writer.writerow([trial.arm, trial.seed, trial.id, "finished", *measured, *counted])
    return buffer.getvalue()
