"""Orbax checkpoints with one leaf per layer, restored onto any mesh, and the folder that holds a whole model."""

from loom_jax.checkpoint.arrays import ParamWriter, StoredParam, read_params, restore_params, save_params, stored_params
from loom_jax.checkpoint.compare import check_shapes, named
from loom_jax.checkpoint.folder import (
    COMPONENTS,
    RECORD,
    SCHEMA_VERSION,
    ModelFolder,
    load_module,
    migrate,
    new_folder,
    read_folder,
    restore_component,
    write_record,
)

__all__ = [
    "COMPONENTS",
    "RECORD",
    "SCHEMA_VERSION",
    "ModelFolder",
    "ParamWriter",
    "StoredParam",
    "check_shapes",
    "load_module",
    "migrate",
    "named",
    "new_folder",
    "read_folder",
    "read_params",
    "restore_component",
    "restore_params",
    "save_params",
    "stored_params",
    "write_record",
]
