"""Published rows in parquet files: read a row group at a time, the last few of them kept."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from loom_jax.data.bad_rows import BadRow

KEPT_GROUPS = 2
"""Row groups held in memory by each process that reads."""


class ParquetRows:
    """Rows of parquet files in order. Only the row counts of their row groups are held, and KEPT_GROUPS groups.

    A file whose footer cannot be read is left out; rows of a group that cannot be read are bad rows.
    """

    def __init__(self, files: Sequence[Path]):
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(_group_sizes, files))
        self.bad_files = [fault for _, fault in found if fault is not None]
        groups = [(path, g, n) for path, (sizes, _) in zip(files, found, strict=True) for g, n in enumerate(sizes) if n]
        self.blocks = [n for _, _, n in groups]
        self._groups = [(path, g) for path, g, _ in groups]
        self._ends = np.cumsum(self.blocks, dtype=np.int64)
        self._kept: collections.OrderedDict[int, Any] = collections.OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        group = int(np.searchsorted(self._ends, index, side="right"))
        offset = index - int(self._ends[group]) + self.blocks[group]
        return self._table(group).slice(offset, 1).to_pylist()[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": collections.OrderedDict()}

    def _table(self, group: int) -> Any:
        # Threads may race here: the worst is that one group is read twice.
        table = self._kept.get(group)
        if table is None:
            table = self._kept[group] = _read_group(*self._groups[group])
            while len(self._kept) > KEPT_GROUPS:
                self._kept.popitem(last=False)
        return table


def _group_sizes(path: Path) -> tuple[list[int], BadRow | None]:
    """Returns the row counts of a file's row groups, or the fault of a file that is damaged or missing."""
    import pyarrow
    from pyarrow import parquet

    try:
        metadata = parquet.read_metadata(path)
    except (OSError, pyarrow.ArrowException) as error:
        return [], BadRow("corrupt file", f"{path}: {error}")
    return [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)], None


def _read_group(path: Path, group: int) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            return file.read_row_group(group, use_threads=False)
    except (OSError, pyarrow.ArrowException) as error:
        raise BadRow("corrupt file", f"{path} row group {group}: {error}") from error
