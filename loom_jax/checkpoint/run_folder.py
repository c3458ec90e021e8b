"""What a training run is, in its folder: run.json, the tokenizer's files, the autoencoder."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from loom_jax.checkpoint.arrays import cause, save_params
from loom_jax.checkpoint.folder import migrate
from loom_jax.checkpoint.remote import refuse_address
from loom_jax.core import CheckpointError, LoomConfig, from_mapping, to_mapping

RUN_RECORD = "run.json"
"""Name of the file that makes a folder a training run."""

RUN_SCHEMA_VERSION = 1
"""Version of the run folder's form that this code writes."""

VAE = "vae"


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A training run on disk.

    Attributes:
      path: the folder; the tokenizer's files lie in it under their own names.
      config: of the networks.
      train: the whole training configuration, as a mapping.
      files: names of the files that were taken along.
      created_by: name and version of the tool.
      origin: by what it was begun, and with what weights, as `run_origin` and `began_with` tell it; empty in old runs.
    """

    path: Path
    config: LoomConfig
    train: Mapping[str, Any]
    files: tuple[str, ...]
    created_by: str
    origin: Mapping[str, Any]


def start_run(
    path: Path,
    config: LoomConfig,
    train: Mapping[str, Any],
    files_from: Path,
    files: tuple[str, ...],
    vae_params: Any,
    created_by: str,
    origin: Mapping[str, Any] | None = None,
) -> RunFolder:
    """Makes a run folder, or goes on with one: what is there already stays as it is. All processes make the same call.

    Args:
      train: the training configuration as JSON can hold it.
      files_from, files: where the tokenizer's and other files lie, and their names.
      vae_params: parameters of the autoencoder, as nnx.State or nested dicts of jax arrays.
      origin: by what it is begun, as JSON can hold it.

    Raises:
      CheckpointError: the folder belongs to a run of another model, or cannot be written to.
    """
    refuse_address(path, "the folder of a run")
    begun, has_vae = (path / RUN_RECORD).is_file(), (path / VAE).exists()
    _meet("start_run: looked")  # no process may write before all have looked
    if begun:
        run = read_run(path)
        if run.config != config:
            raise CheckpointError(
                f"{path} is a run of another model ({_difference(run.config, config)}): choose another folder, or give "
                "the configuration that it was begun with"
            )
        return run
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not has_vae:
            save_params(path / VAE, vae_params)
        if jax.process_index() == 0:
            for name in files:
                shutil.copyfile(files_from / name, path / name)
            record = {
                "schema_version": RUN_SCHEMA_VERSION,
                "created_by": created_by,
                "origin": dict(origin or {}),
                "config": to_mapping(config),
                "train": dict(train),
                "files": list(files),
            }
            unfinished = path / f".{RUN_RECORD}"
            unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            unfinished.rename(path / RUN_RECORD)  # last: a folder with a record is complete
    except (OSError, ValueError, RuntimeError) as error:  # Orbax raises the last two where it cannot write
        raise CheckpointError(f"{path} cannot be made a run folder ({cause(error)}): choose another place") from error
    _meet("start_run: written")
    return read_run(path)


def _meet(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def read_run(path: Path) -> RunFolder:
    """Reads run.json.

    Raises:
      CheckpointError: it is not there, not readable, or of a version that cannot be used.
      ConfigError: its model configuration has unknown or missing keys.
    """
    refuse_address(path, "the folder of a run")
    file = path / RUN_RECORD
    if not file.is_file():
        raise CheckpointError(f"{path} is not a training run: it holds no {RUN_RECORD}; give the --workdir of a run")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): begin a new run") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{file} holds a {type(record).__name__}, expected an object: begin a new run")
    record = migrate(record, file, {}, RUN_SCHEMA_VERSION)
    lacking = [key for key in ("config", "train", "files", "created_by") if key not in record]
    if lacking:
        raise CheckpointError(f"{file} lacks key {lacking[0]!r}: begin a new run")
    config = from_mapping(LoomConfig, record["config"], "config.")
    files = tuple(record["files"])
    return RunFolder(path, config, record["train"], files, record["created_by"], record.get("origin", {}))


def _difference(found: LoomConfig, expected: LoomConfig) -> str:
    """The first key in which two configurations differ."""
    pairs = zip(_flat(to_mapping(found)), _flat(to_mapping(expected)), strict=False)
    (key, old), (_, new) = next(pair for pair in pairs if pair[0] != pair[1])
    return f"{key} is {old!r}, given {new!r}"


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for key, value in mapping.items():
        out += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(prefix + key, value)]
    return out
