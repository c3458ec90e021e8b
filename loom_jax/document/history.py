"""Which earlier frames a frame is conditioned on: one registry of policies, for training and for generation."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import numpy as np

from loom_jax.core import ConfigError

Choose = Callable[[int, int, np.random.Generator], list[int]]


def _none(count: int, size: int, rng: np.random.Generator) -> list[int]:
    return []


def _all(count: int, size: int, rng: np.random.Generator) -> list[int]:
    return list(range(count))


def _last(count: int, size: int, rng: np.random.Generator) -> list[int]:
    return list(range(max(0, count - size), count))


def _uniform(count: int, size: int, rng: np.random.Generator) -> list[int]:
    if size == 1:
        return _last(count, size, rng)
    return sorted({round(place) for place in np.linspace(0, count - 1, min(size, count))}) if count and size else []


def _random(count: int, size: int, rng: np.random.Generator) -> list[int]:
    drawn = int(rng.integers(0, min(size, count) + 1))
    return sorted(int(i) for i in rng.choice(count, drawn, replace=False)) if drawn else []


POLICIES: dict[str, tuple[Choose, bool]] = {
    "none": (_none, False),
    "all": (_all, False),
    "last": (_last, True),
    "uniform": (_uniform, True),
    "random": (_random, True),
}
"""Name -> how it chooses, and whether it takes a number k."""


@dataclasses.dataclass(frozen=True)
class HistoryPolicy:
    """Chooses among the frames before one.

    `none`; `all`; `last(k)`; `uniform(k)`: evenly spread, the first and the last among them; `random(k)`: of a size
    drawn from 0 to k, without replacement. Source: spec of Loom, the method, 3.

    Raises:
      ConfigError: the name is not known, or k is below 0.
    """

    name: str = "uniform"
    k: int = 2

    def __post_init__(self) -> None:
        if self.name not in POLICIES:
            raise ConfigError(f"history policy {self.name!r} is not one of {', '.join(POLICIES)}")
        if self.k < 0:
            raise ConfigError(f"history policy {self}: k must be at least 0 (0 frames of history)")

    def __str__(self) -> str:
        return f"{self.name}({self.k})" if POLICIES[self.name][1] else self.name

    @classmethod
    def parse(cls, text: str) -> HistoryPolicy:
        """Reads `uniform(2)`, `all` and the like."""
        match = re.fullmatch(r"\s*([a-z]+)\s*(?:\(\s*(-?\d{1,9})\s*\))?\s*", text)
        if not match:
            raise ConfigError(
                f"history policy {text[:40]!r}: expected a name such as all, or one with a number: uniform(2)"
            )
        name, number = match[1], match[2]
        if name in POLICIES and (number is not None) != POLICIES[name][1]:
            form = f"{name}(k)" if POLICIES[name][1] else name
            raise ConfigError(f"history policy {text!r}: expected {form}")
        return cls(name, 0 if number is None else int(number))

    def choose(self, count: int, rng: np.random.Generator) -> list[int]:
        """Returns the chosen ones of `count` earlier frames, as rising indices."""
        return POLICIES[self.name][0](count, self.k, rng)

    def choose_subset(self, count: int, rng: np.random.Generator) -> list[int]:
        """Returns the frames of one training document out of `count`: a last one, and the history chosen for it.

        A frame of the subset sees those before it, so one document trains frames with histories of every size.
        """
        last = int(rng.integers(count))
        return [*self.choose(last, rng), last]
