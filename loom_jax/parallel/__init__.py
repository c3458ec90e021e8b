"""Which device holds which part of which parameter: meshes, presets, and one rule table by parameter path."""

from loom_jax.parallel.mesh import PRESETS, Preset, make_mesh
from loom_jax.parallel.rules import REPLICATED_LIMIT, RULES, ParamShape, flatten_params, logical_axes, shardings_for

__all__ = [
    "PRESETS",
    "REPLICATED_LIMIT",
    "RULES",
    "ParamShape",
    "Preset",
    "flatten_params",
    "logical_axes",
    "make_mesh",
    "shardings_for",
]
