"""What `inspect` prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from loom_jax.checkpoint import COMPONENTS, RECORD, address_of, check_shapes, read_folder, stored_params
from loom_jax.converters.release import open_release
from loom_jax.converters.tables import Entry, autoencoder_entries, model_entries
from loom_jax.core import LoomConfig, to_mapping

PARTS = {
    "embed_tokens": "embedding and head",
    "lm_head": "embedding and head",
    "vit": "ViT",
    "decoder": "decoder",
}
"""First component of a parameter's path -> part of the model; everything else joins parts."""


class _Part(NamedTuple):
    tensors: int
    parameters: int
    nbytes: int
    dtypes: frozenset[str]


def print_report(path: Path) -> None:
    """Prints a release folder or a converted one to stdout.

    Raises:
      CheckpointError, TokenizerError: the folder is neither, or is broken.
    """
    console = Console(highlight=False)
    if (path / RECORD).is_file() or address_of(path) is not None:
        folder = read_folder(path)
        entries = {"model": model_entries(folder.config), "vae": autoencoder_entries(folder.config.vae)}
        dtypes: dict[str, np.dtype] = {}
        for component in COMPONENTS:
            stored = stored_params(folder.component(component))
            expected = {entry.path: entry.param_shape for entry in entries[component]}
            shapes = {name: leaf.shape for name, leaf in stored.items()}
            check_shapes(str(folder.component(component)), shapes, expected, "convert it again")
            dtypes |= {entry.key: stored[entry.path].dtype for entry in entries[component]}
        console.print(f"converted model, {_origin(folder.provenance)}")
        _print_parts(console, folder.config, dtypes)
        _print_config(console, folder.config)
        return
    release = open_release(path)
    source = f"release, {release.weights} weights in {len(release.model.files)} file(s)"
    lacks = f"; to be computed: {', '.join(release.recomputed)}" if release.recomputed else ""
    console.print(source + lacks, soft_wrap=True)
    _print_parts(console, release.config, release.model.dtypes | release.vae.dtypes)
    _print_config(console, release.config)


def _origin(provenance: Mapping[str, Any]) -> str:
    """One line about where weights came from."""
    files = ", ".join(f"{file['name']} {file['sha256'][:12]}" for file in provenance.get("source_files", ()))
    return f"{provenance.get('tool')}, {provenance.get('created')}, from {provenance.get('source')} ({files})"


def _part_of(entry: Entry, component: str) -> str:
    if component == "vae":
        return "autoencoder"
    names = entry.path.split("/")
    part = PARTS.get(names[0], "connectors and positions")
    return f"{part}, {'gen' if 'gen' in names else 'und'}" if part == "decoder" else part


def _print_parts(console: Console, config: LoomConfig, dtypes: Mapping[str, np.dtype]) -> None:
    """One line per part, and the sum."""
    parts: dict[str, _Part] = {}
    entries = [("model", entry) for entry in model_entries(config)]
    entries += [("vae", entry) for entry in autoencoder_entries(config.vae)]
    for component, entry in entries:
        if entry.key not in dtypes:
            continue
        dtype, nothing = dtypes[entry.key], _Part(0, 0, 0, frozenset())
        for name in (_part_of(entry, component), "all"):
            part = parts.pop(name, nothing) if name == "all" else parts.get(name, nothing)
            size = entry.size
            parts[name] = _Part(
                part.tensors + 1,
                part.parameters + size,
                part.nbytes + size * dtype.itemsize,
                part.dtypes | {dtype.name},
            )
    table = Table("part")
    for heading in ("tensors", "parameters", "MiB"):
        table.add_column(heading, justify="right")
    table.add_column("dtypes")
    for name, part in parts.items():
        sizes = (f"{part.tensors:,}", f"{part.parameters:,}", f"{part.nbytes / 2**20:,.1f}")
        table.add_row(name, *sizes, ", ".join(sorted(part.dtypes)))
    console.print(table)


def _print_config(console: Console, config: LoomConfig) -> None:
    """Every field of the configuration."""
    table = Table("configuration", "value", show_header=True)
    for name, value in to_mapping(config).items():
        for key, inner in value.items() if isinstance(value, dict) else [("", value)]:
            table.add_row(f"{name}.{key}" if key else name, str(inner))
    console.print(table)
