"""Orbax checkpoints with one leaf per layer, restored onto any mesh, and the folder that holds a whole model."""

from loom_jax.checkpoint.arrays import (
    CONCURRENT_BYTES,
    ParamWriter,
    StoredParam,
    read_params,
    read_pieces,
    restore_params,
    save_params,
    stored_params,
    write_shares,
)
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
    shared_folder,
    write_record,
)
from loom_jax.checkpoint.remote import address_of, refuse_address
from loom_jax.checkpoint.run import Restored, RunCheckpoints, param_sources, read_run_params, saved_steps, step_path
from loom_jax.checkpoint.run_folder import RUN_RECORD, RUN_SCHEMA_VERSION, RunFolder, read_run, start_run

__all__ = [
    "COMPONENTS",
    "CONCURRENT_BYTES",
    "RECORD",
    "RUN_RECORD",
    "RUN_SCHEMA_VERSION",
    "SCHEMA_VERSION",
    "ModelFolder",
    "ParamWriter",
    "Restored",
    "RunCheckpoints",
    "RunFolder",
    "StoredParam",
    "address_of",
    "check_shapes",
    "load_module",
    "migrate",
    "named",
    "new_folder",
    "param_sources",
    "read_folder",
    "read_params",
    "read_pieces",
    "read_run",
    "read_run_params",
    "refuse_address",
    "restore_component",
    "restore_params",
    "save_params",
    "saved_steps",
    "shared_folder",
    "start_run",
    "step_path",
    "stored_params",
    "write_record",
    "write_shares",
]
