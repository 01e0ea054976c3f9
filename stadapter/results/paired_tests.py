"""The statistics under every table: mean and spread of one arm, and the difference of two arms paired by seed.

scipy is imported inside the functions: it takes seconds to load, and `--help` must stay light.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
_NO_SPREAD = 1e-9


@dataclass(frozen=True)
class Summary:
    """A mean with its spread and interval, if at least two values give them."""

    n: int
    mean: float
    sd: float | None  # standard deviation with n - 1
    low: float | None  # t interval of the mean at CONFIDENCE
    high: float | None


@dataclass(frozen=True)
class Difference(Summary):
    """The mean over seeds of (arm - default arm); `p` is that of the two-sided paired t test, None if undefined."""

    p: float | None
    p_holm: float | None = None  # corrected for all comparisons of the table


def summarise(values: Sequence[float]) -> Summary | None:
    """Return mean, standard deviation and 95 % t interval, or None without a value.

    Equal values have a spread of 0 and no interval: one without width would claim certainty, where a few accuracies
    happen to round to the same number of clips.
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

    low, high = stats.t.interval(CONFIDENCE, n - 1, loc=mean, scale=sd / n**0.5)
    return Summary(n, mean, sd, float(low), float(high))


def compare(arm: Mapping[int, float], default: Mapping[int, float]) -> Difference | None:
    """Return the difference of two arms, {seed: value}, over the seeds that both have, or None if they share none.

    Differences that are equal in every seed have no p, as they have no interval.
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
    """Return the p-values after Holm's correction for that many comparisons; None stays None. (scipy has no Holm.)

    Comparisons without a p-value count too: an arm with equal differences must not make the others more significant.
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (comparisons - rank) * p))
        corrected[i] = largest
    return corrected
