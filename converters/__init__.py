"""PyTorch releases into Orbax folders and back, and parity against recorded references."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loom_jax.converters.bagel import from_orbax, from_parts, from_run, inspect, to_orbax

__all__ = ["from_orbax", "from_parts", "from_run", "inspect", "to_orbax"]


def __getattr__(name: str) -> Any:
    """Imports on first use: `python -m loom_jax.converters.bagel` must not find its own module imported already."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from loom_jax.converters import bagel

    return getattr(bagel, name)
