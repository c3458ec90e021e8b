"""The recorded outputs of the PyTorch original, found beside the checkout, and how closely a port must meet them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"
SET = REFERENCE / "bagel_tiny"
ASSETS = Path(__file__).resolve().parent / "assets"
CKPT = ASSETS / "bagel_tiny"
"""The tiny checkpoint in the release layout: a copy inside the project, so it is always there."""


def golden(name: str) -> Mapping[str, np.ndarray]:
    """Returns golden/NAME.npz; skips the test, saying so, where the records do not lie beside the checkout."""
    return np.load(_recorded(SET / "golden" / f"{name}.npz"))


def golden_json(name: str) -> Any:
    """Returns golden/NAME.json; skips like `golden`."""
    return json.loads(_recorded(SET / "golden" / f"{name}.json").read_text())


def manifest(name: str) -> Any:
    """Returns manifest_NAME.json (`7b` or `ae`): every key, shape and dtype of the real release."""
    return json.loads(_recorded(REFERENCE / f"manifest_{name}.json").read_text())


def _recorded(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path.name} is not there: records of the original belong in ../shared beside the checkout")
    return path


def assert_close(actual: Any, expected: np.ndarray, tol: float = 1e-4) -> None:
    """Asserts max|actual - expected| <= tol * rms(expected), and equal shapes."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"shape {actual.shape}, recorded {expected.shape}"
    error, rms = np.abs(actual - expected).max(), np.sqrt(np.mean(expected**2))
    assert error <= tol * rms, f"max difference {error:.3g} is {error / rms:.3g} of rms {rms:.3g}, allowed {tol:g}"
