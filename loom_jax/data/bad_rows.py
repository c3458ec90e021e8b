"""Rows that cannot be used: counted by reason, logged once per reason, and too many of them stop the run."""

from __future__ import annotations

import collections
import logging
from collections.abc import Mapping
from typing import Any

from loom_jax.core import InputError, LoomError

LOGGER = logging.getLogger("loom_jax.data")


class BadRow(InputError):  # noqa: N818 - named after what it says
    """A row that cannot become a document.

    Attributes:
      reason: few words, the same for all rows with this fault: they are counted by it.
      detail: what is wrong with this one, with the file or row it is in where that is known.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> Any:
        return BadRow, (self.reason, self.detail)


class RowCounts:
    """How many rows were read, and how many of them were bad for which reason.

    Args:
      max_bad_share: above this share of bad rows reading stops.
      min_rows: but not before so many rows were read.
    """

    def __init__(self, max_bad_share: float, min_rows: int):
        self.rows = 0
        self.bad: collections.Counter[str] = collections.Counter()
        self._max_bad_share, self._min_rows = max_bad_share, min_rows

    @property
    def num_bad(self) -> int:
        """Number of bad rows, whatever the reason."""
        return self.bad.total()

    def add(self, fault: BadRow | None, where: str = "") -> None:
        """Counts one row: a good one, or one with a fault.

        Raises:
          LoomError: too large a share of the rows is bad; lists the reasons.
        """
        self.rows += 1
        if fault is None:
            return
        if fault.reason not in self.bad:
            why = " ".join(str(fault).split())  # libraries put line breaks into what they say
            LOGGER.warning("bad row (%s) %s; further rows like it are only counted", why, where)
        self.bad[fault.reason] += 1
        if self.rows >= self._min_rows and self.num_bad > self._max_bad_share * self.rows:
            raise LoomError(
                f"{self.num_bad} of {self.rows} rows are bad, allowed is a share of {self._max_bad_share:g}: "
                f"{self.summary()}; the last one: {fault} {where}; mend or leave out these rows, or raise max_bad_share"
            )

    def summary(self) -> str:
        """Returns the reasons with their counts, the most frequent first."""
        return ", ".join(f"{reason} ({count})" for reason, count in self.bad.most_common()) or "none"

    def get_state(self) -> dict[str, Any]:
        """Returns the counts as plain JSON values."""
        return {"rows": self.rows, "bad": dict(self.bad)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Takes over counts that `get_state` returned."""
        self.rows, self.bad = int(state["rows"]), collections.Counter(state["bad"])
