"""Comparing one value with its record, and the report of all."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from loom_jax.core import LoomError

FORWARD = 1e-4
"""Of the array's rms: a single forward pass."""

MANY_STEPS = 1e-3
"""Of the array's rms: gradients, and generations of many steps."""

PICTURE_SHARE = 1e-3
"""Share of the values of a picture that may differ, and then by 1 (DESIGN section 6)."""


class Difference(NamedTuple):
    """How far a value is from its record: largest absolute difference, that over the rms, the rms itself."""

    shape: list[int]
    max_abs: float
    max_rel: float
    ref_rms: float
    ok: bool


def compare(
    actual: Any, expected: Any, tolerance: float, mask: np.ndarray | None = None, scale: float | None = None
) -> Difference:
    """Compares by the kind of the record: pictures (uint8), floats, and everything else, which must be equal.

    `mask` and `scale` are for floats; see `measure`.
    """
    if not isinstance(expected, np.ndarray):
        equal = actual == expected
        return Difference(list(np.shape(expected)), float(not equal), float(not equal), 0.0, equal)
    actual = np.asarray(actual)
    if actual.shape != expected.shape:
        return Difference(list(expected.shape), np.inf, np.inf, 0.0, False)
    if expected.dtype == np.uint8:
        return _picture(actual, expected)
    if not np.issubdtype(expected.dtype, np.floating):
        wrong = float((actual != expected).any())
        return Difference(list(expected.shape), wrong, wrong, 0.0, not wrong)
    return measure(actual, expected, tolerance, mask, scale)


def measure(
    actual: np.ndarray,
    expected: np.ndarray,
    tolerance: float,
    mask: np.ndarray | None = None,
    scale: float | None = None,
) -> Difference:
    """Compares floats: the largest difference must stay within `tolerance` of the record's rms, or of `scale`.

    Infinite and missing (NaN) values of the record must be met exactly; where `mask` is False nothing is compared.
    """
    finite = np.isfinite(expected)
    same = np.array_equal(actual[~finite], expected[~finite], equal_nan=True)
    compared = finite if mask is None else finite & mask
    reference = expected[compared].astype(np.float64)
    if reference.size == 0:
        return Difference(list(expected.shape), 0.0, 0.0, 0.0, same)
    error = float(np.abs(actual[compared].astype(np.float64) - reference).max())
    rms = float(np.sqrt(np.mean(reference**2)))
    against = rms if scale is None else scale
    relative = error / against if against else (np.inf if error else 0.0)
    return Difference(list(expected.shape), error, relative, rms, bool(same and relative <= tolerance))


def _picture(actual: np.ndarray, expected: np.ndarray) -> Difference:
    difference = np.abs(actual.astype(np.int64) - expected.astype(np.int64))
    rms = float(np.sqrt(np.mean(expected.astype(np.float64) ** 2)))
    largest = float(difference.max(initial=0))
    ok = bool(largest <= 1 and (difference > 0).mean() <= PICTURE_SHARE)
    return Difference(list(expected.shape), largest, largest / rms if rms else largest, rms, ok)


def write_report(report: dict[str, Any], path: Path) -> None:
    """Writes the report as JSON, whole or not at all.

    Raises:
      LoomError: the folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
            json.dump(report, file, indent=1, allow_nan=True)
        Path(file.name).replace(path)
    except OSError as error:
        raise LoomError(f"cannot write the report {path}: {error.strerror}") from error
