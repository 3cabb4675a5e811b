"""The ratio of paired times: the median over pairs, with a bootstrap interval over pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.report.statistics import Interval

RESAMPLES = 4000


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Interval:
    """Median of numerator[i] / denominator[i]; the interval is that of the percentile bootstrap.

    A median over pairs, because a neighbour's burst of work can multiply a single time; pairs,
    because it hits both members of most pairs alike. One pair gives an interval without width.

    Raises:
        ValueError: no pair, or lengths that differ.
    """
    if not numerator or len(numerator) != len(denominator):
        raise ValueError(
            f"{len(numerator)} numerators and {len(denominator)} denominators are no pairs"
        )
    ratios = np.asarray(numerator, dtype=float) / np.asarray(denominator, dtype=float)
    generator = np.random.default_rng(0)
    drawn = ratios[generator.integers(0, len(ratios), (RESAMPLES, len(ratios)))]
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return Interval(float(np.median(ratios)), float(low), float(high))
