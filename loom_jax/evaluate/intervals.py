"""Confidence intervals of means of values between 0 and 1, where the values of one request go together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from statistics import NormalDist

import numpy as np

RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and where it lies with the confidence that was asked for.

    Attributes:
      count: values.
      requests: that they come from.
    """

    mean: float
    low: float
    high: float
    count: int
    requests: int


def wilson(mean: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Returns the Wilson score interval of a share of `count` independent yes-or-no values.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    scale = 1 + z * z / count
    middle = (mean + z * z / (2 * count)) / scale
    half = z * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count)) / scale
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return min(low, mean), max(high, mean)  # at 0 and 1 rounding would leave the mean outside


def estimate(values: Mapping[Hashable, Sequence[float]], confidence: float = 0.95) -> Interval:
    """Returns the mean over all values of all requests, with its interval.

    One yes or no for each request: Wilson's interval. Otherwise requests are drawn with replacement (bootstrap), since
    the turns of one request succeed or fail together; where all values are alike, Wilson's with one value a request.

    Args:
      values: of each request, none of them without a value.
      confidence: that the interval is to have.
    """
    sums = np.asarray([sum(own) for own in values.values()], float)
    counts = np.asarray([len(own) for own in values.values()], float)
    mean, number = float(sums.sum() / counts.sum()), len(sums)
    single = bool((counts == 1).all() and np.isin(sums, (0, 1)).all())
    if single or mean in (0.0, 1.0):
        low, high = wilson(mean, number, confidence)
    else:
        drawn = np.random.default_rng(0).integers(number, size=(RESAMPLES, number))
        means = sums[drawn].sum(1) / counts[drawn].sum(1)
        low, high = (float(q) for q in np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2]))
    return Interval(mean, min(low, mean), max(high, mean), int(counts.sum()), number)


def paired_difference(
    first: Mapping[Hashable, Sequence[float]], second: Mapping[Hashable, Sequence[float]], confidence: float = 0.95
) -> Interval:
    """Returns by how much the second mean is above the first one, on the requests that both have (paired bootstrap)."""
    shared = [key for key in first if key in second]
    sums = np.asarray([(sum(first[key]), sum(second[key])) for key in shared], float)
    counts = np.asarray([(len(first[key]), len(second[key])) for key in shared], float)
    drawn = np.random.default_rng(0).integers(len(shared), size=(RESAMPLES, len(shared)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = (float(q) for q in np.quantile(means[:, 1] - means[:, 0], [0.5 - confidence / 2, 0.5 + confidence / 2]))
    before, after = sums.sum(0) / counts.sum(0)
    return Interval(float(after - before), low, high, int(counts[:, 1].sum()), len(shared))
