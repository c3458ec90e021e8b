"""Which device holds which part of what: meshes, presets, one rule table by parameter path, and jobs of many hosts.

For a training loop:
  start_distributed()                                         before the first use of a device
  mesh = make_mesh(preset)                                    or make_mesh({"data": 2, "fsdp": -1})
  shardings = state_shardings(abstract_state, (trainable, frozen), mesh, preset)
  constrain = make_constrain(mesh)                            handed to the models
  begin, end = row_range(mesh, rows)                          rows of each batch that this process makes
  with PreemptionNotice() as notice: ... notice.agreed()      a signal to any process stops all after the same step
  batch = global_batch(local_batch, mesh)                     global arrays, for a jit with batch_sharding(mesh)
"""

from loom_jax.parallel.activations import (
    ACTIVATION_AXES,
    activation_spec,
    batch_sharding,
    global_batch,
    make_constrain,
    row_range,
    shard_attend,
)
from loom_jax.parallel.mesh import DATA_AXES, PRESETS, Preset, make_mesh
from loom_jax.parallel.multihost import ElsewhereError, PreemptionNotice, gather, start_distributed, together
from loom_jax.parallel.rules import REPLICATED_LIMIT, RULES, ParamShape, flatten_params, logical_axes, shardings_for
from loom_jax.parallel.schedulers import Place, find_place
from loom_jax.parallel.states import state_shardings

__all__ = [
    "ACTIVATION_AXES",
    "DATA_AXES",
    "PRESETS",
    "REPLICATED_LIMIT",
    "RULES",
    "ElsewhereError",
    "ParamShape",
    "Place",
    "PreemptionNotice",
    "Preset",
    "activation_spec",
    "batch_sharding",
    "find_place",
    "flatten_params",
    "gather",
    "global_batch",
    "logical_axes",
    "make_constrain",
    "make_mesh",
    "row_range",
    "shard_attend",
    "shardings_for",
    "start_distributed",
    "state_shardings",
    "together",
]
