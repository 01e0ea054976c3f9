"""Records as pandas DataFrames, for questions that no table answers."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from stadapter import config
from stadapter.results.sources import Answer
from stadapter.trials import record


def trials_frame(answer: Answer) -> pd.DataFrame:
    """Return one line per trial: its numbers, their origin, and every field of its recipe. Accuracies in per cent."""
    lines = []
    for trial, result in zip(answer.sweep.trials, answer.records, strict=True):
        line = {"sweep": answer.name, "arm": trial.arm, "seed": trial.seed, "trial_id": trial.id}
        if result is None:
            line["status"] = "missing"
        else:
            line["status"] = "diverged" if result.diverged else "finished"
            line |= result.metrics
            counted = ("trainable_params", "macs_per_view", "views", "seconds", "cpu_seconds", "peak_memory_mib")
            line |= {name: getattr(result, name) for name in (*counted, "device", "git_commit", "git_dirty")}
            line["test_data"] = result.data["test"].fingerprint
        fields = config.flatten(trial.recipe)
        lines.append(line | {f"recipe.{path}": value for path, value in fields.items()})
    return pd.DataFrame(lines)


def curves_frame(answer: Answer, output: Path) -> pd.DataFrame:
    """Return one line per epoch of each trial in the output folder: arm, seed, and the numbers of metrics.jsonl."""
    lines = [
        {"arm": trial.arm, "seed": trial.seed} | epoch
        for trial in answer.sweep.trials
        for epoch in record.read_metrics(trial.folder(output))
    ]
    return pd.DataFrame(lines)


def arms_frame(answer: Answer) -> pd.DataFrame:
    """Return one line per arm: the statistics behind the table, unrounded, in per cent and percentage points."""
    lines = []
    for row in answer.rows:
        top1, direction, difference = row.top1, row.parts.get("direction_top1"), row.difference
        lines.append(
            {
                "sweep": answer.name,
                "arm": row.arm,
                "default": row.is_default,
                "n": len(row.top1_by_seed),
                "missing": len(row.trials) - len(row.top1_by_seed),
                "diverged": row.diverged,
                "top1_mean": top1.mean if top1 else None,
                "top1_sd": top1.sd if top1 else None,
                "top1_low": top1.low if top1 else None,
                "top1_high": top1.high if top1 else None,
                "difference": difference.mean if difference else None,
                "difference_low": difference.low if difference else None,
                "difference_high": difference.high if difference else None,
                "p": difference.p if difference else None,
                "p_holm": difference.p_holm if difference else None,
                "direction_top1_mean": direction.mean if direction else None,
                "direction_top1_sd": direction.sd if direction else None,
                "trainable_params": row.trainable_params,
                "gmacs": row.gmacs,
                "peak_memory_mib": row.peak_memory_mib,
                "seconds": row.seconds,
                "paper_top1": row.published.top1 if row.published else None,
                "paper_status": row.published.status if row.published else None,
                "trial_ids": " ".join(row.trials),
            }
        )
    return pd.DataFrame(lines)
