"""Where the tokens of an image stand in a square table of 2-D positions. Source: spec section 3."""

from __future__ import annotations

import numpy as np

from loom_jax.core import InputError


def grid_position_ids(grid: tuple[int, int], side: int) -> np.ndarray:
    """Returns int32 [rows * columns], row * side + column: the place of each cell in a table of side x side entries.

    Raises:
      InputError: the grid does not fit into the table.
    """
    rows, columns = grid
    if max(grid) > side:
        raise InputError(
            f"an image of {rows} x {columns} tokens (rows x columns) exceeds the position table of {side} x {side}: "
            "make the image smaller"
        )
    return (np.arange(rows)[:, None] * side + np.arange(columns)).astype(np.int32).ravel()


def interpolated_position_ids(grid: tuple[int, int], side: int) -> np.ndarray:
    """Returns int32 [rows * columns]: the grid stretched over the whole table (interpolate_pos; off in the release).

    The fraction i / n of row i of n falls into a bucket between k / side and (k + 1) / side. Where the two meet,
    rounding decides: as in torch.arange, both are multiples of a float64 step, rounded to float32.
    Beyond 15 cells a side, vectorised torch may round a multiple otherwise, depending on the processor; this does not.
    """
    inner = _steps(side)[1:]
    row, column = (np.searchsorted(inner, _steps(n), side="right") for n in grid)
    return (row[:, None] * side + column).astype(np.int32).ravel()


def _steps(n: int) -> np.ndarray:
    """Returns i / n for i < n as torch.arange makes it, float32 [n]."""
    return (np.arange(n) * (1 / n)).astype(np.float32)
