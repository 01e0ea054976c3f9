"""The statistics under every table: mean and spread of one arm, and the difference of two arms paired by seed.

scipy loads with the first call, so that `--help` stays light.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
_NO_SPREAD = 1e-9


@dataclass(frozen=True)
class Summary:
    """What is known of a mean; spread and interval only where at least two values give them."""

    n: int
    mean: float
    sd: float | None  # standard deviation with n - 1
    low: float | None  # t interval of the mean at CONFIDENCE
    high: float | None


@dataclass(frozen=True)
class Difference(Summary):
    """Mean over seeds of (arm - default arm); `p` from the two-sided paired t test, None where it is not defined."""

    p: float | None
    p_holm: float | None = None  # corrected for all comparisons of the table


def summarise(values: Sequence[float]) -> Summary | None:
    """Mean, standard deviation and 95 % t interval; None without a value.

    Equal values have a spread of 0 and no interval: a handful of accuracies that round to the same number of clips is
    no certainty, which an interval without width would claim.
    """
    if not values:
        return None
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return Summary(n, mean, None, None, None)
    sd = statistics.stdev(values)
    if sd < _NO_SPREAD:
        return Summary(n, mean, 0.0, None, None)
    from scipy import stats

    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * sd / n**0.5
    return Summary(n, mean, sd, mean - half, mean + half)


def compare(arm: Mapping[int, float], default: Mapping[int, float]) -> Difference | None:
    """Difference of two arms over the seeds that both have, {seed: value}; None where they share none.

    Differences that are equal in every seed leave p undefined, as `summarise` leaves their interval.
    """
    seeds = sorted(arm.keys() & default.keys())
    differences = [arm[seed] - default[seed] for seed in seeds]
    summary = summarise(differences)
    if summary is None:
        return None
    p = None
    if summary.low is not None:
        from scipy import stats

        p = float(stats.ttest_rel([arm[s] for s in seeds], [default[s] for s in seeds]).pvalue)
    return Difference(summary.n, summary.mean, summary.sd, summary.low, summary.high, p)


def holm(p_values: Sequence[float | None], comparisons: int) -> list[float | None]:
    """Holm's correction for that many comparisons, of which those without a p-value (None stays None) count as well:
    an arm whose differences happen to be equal does not make the others more significant."""
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (comparisons - rank) * p))
        corrected[i] = largest
    return corrected
