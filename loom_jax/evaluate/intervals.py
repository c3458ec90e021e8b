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


def wilson(mean: float, count: float, confidence: float = 0.95) -> tuple[float, float]:
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

    It is Wilson's, for as many independent values as these are worth: turns of one request succeed or fail together.

    Args:
      values: of each request, none of them without a value.
      confidence: that the interval is to have.
    """
    sums = np.asarray([sum(own) for own in values.values()], float)
    counts = np.asarray([len(own) for own in values.values()], float)
    mean, count = float(sums.sum() / counts.sum()), int(counts.sum())
    low, high = wilson(mean, count / _design_effect(sums, counts), confidence)
    return Interval(mean, low, high, count, len(sums))


def _design_effect(sums: np.ndarray, counts: np.ndarray) -> float:
    """Returns how many times the variance of the mean is that of as many independent yes-or-no values.

    Where nearly all values are alike, how they go together cannot be seen: so it is taken with one request more, which
    goes the other way as a whole. Then one frame that is wrong does not narrow the interval.

    Source: Kish, Survey Sampling, 1965.
    """
    other = 0.0 if sums.sum() > counts.sum() / 2 else 1.0
    counts = np.append(counts, counts.mean())
    sums = np.append(sums, other * counts[-1])
    mean = sums.sum() / counts.sum()
    return float(((sums - mean * counts) ** 2).sum() / (counts.sum() * mean * (1 - mean)))


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
