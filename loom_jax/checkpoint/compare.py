"""Whether two sets of named arrays are the same, and one line that says how they are not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from loom_jax.core import CheckpointError

_SHOWN = 3


def named(names: Iterable[str]) -> str:
    """Returns the first few names and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def check_shapes(
    where: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], way_out: str
) -> None:
    """Checks that `found` has exactly the names and shapes of `expected`.

    Raises:
      CheckpointError: it has not; one line names the first of the missing, the unknown and the wrongly shaped.
    """
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    wrong = [
        f"{name} has shape {tuple(found[name])}, expected {tuple(expected[name])}"
        for name in expected
        if name in found and tuple(found[name]) != tuple(expected[name])
    ]
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing: {named(missing)}")
    if unknown:
        parts.append(f"{len(unknown)} unknown: {named(unknown)}")
    if wrong:
        parts.append(named(wrong))
    if parts:
        raise CheckpointError(f"{where}: {'; '.join(parts)}; {way_out}")
