"""The two conversions, tensor by tensor: what is read is written and dropped before more is read."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import math
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from loom_jax import __version__
from loom_jax.checkpoint import (
    CONCURRENT_BYTES,
    ModelFolder,
    ParamWriter,
    StoredParam,
    check_shapes,
    read_params,
    read_pieces,
    stored_params,
    write_record,
    write_shares,
)
from loom_jax.converters.release import AUTOENCODER, CONFIG_FILES, Release, config_files
from loom_jax.converters.tables import Entry, autoencoder_entries, model_entries
from loom_jax.converters.tensors import TensorFileWriter, TensorSource
from loom_jax.core import CheckpointError
from loom_jax.nn import sincos_2d_table
from loom_jax.parallel import gather, together

BATCH_BYTES = CONCURRENT_BYTES
"""Tensors that are written by one call: together at most this many bytes, or a single larger one."""

_FORGET_SECONDS = 0.05

Advance = Callable[[int], None]
"""Told the bytes of each batch when it is done."""


def write_converted(release: Release, folder: Path, dtype: np.dtype | None, advance: Advance) -> None:
    """Writes a converted model into an empty folder.

    Args:
      dtype: of the transformer's weights; None keeps each tensor's. The autoencoder is never cast.
      advance: gets the bytes that were read.

    Raises:
      CheckpointError: a file cannot be read.
    """
    stop = threading.Event()
    sources = [file.path for source in (release.model, release.vae) for file in source.files]
    # The last process hashes the first file, which is the largest: process 0 has more to do otherwise.
    own = sources[jax.process_count() - 1 - jax.process_index() :: jax.process_count()]
    with ThreadPoolExecutor(1) as pool:
        hashes = pool.map(lambda path: _sha256(path, stop), own)
        try:
            _write_component(folder / "model", release.model_entries, release.model, dtype, advance)
            _write_component(folder / "vae", release.vae_entries, release.vae, None, advance)
        except BaseException:
            stop.set()
            raise
        with together():
            digests = dict(zip((path.name for path in own), hashes, strict=True))
    digests = {name: digest for part in gather(digests) for name, digest in part.items()}
    with together():
        if jax.process_index() == 0:
            _write_files(release, folder, dtype, digests)


def _write_files(release: Release, folder: Path, dtype: np.dtype | None, digests: Mapping[str, str]) -> None:
    """Writes what lies beside the checkpoints."""
    for name in release.files:
        shutil.copyfile(release.path / name, folder / name)
    provenance = {
        "tool": f"loom_jax {__version__}",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "source": release.path.resolve().name,
        "source_files": [
            {"name": file.path.name, "bytes": file.path.stat().st_size, "sha256": digests[file.path.name]}
            for source in (release.model, release.vae)
            for file in source.files
        ],
        "weights": release.weights,
        "source_dtypes": {"model": _dtype_counts(release.model.dtypes), "vae": _dtype_counts(release.vae.dtypes)},
        "cast": None if dtype is None else dtype.name,
        "recomputed": list(release.recomputed),
    }
    write_record(folder, release.config, provenance, release.files)


def _dtype_counts(dtypes: Mapping[str, np.dtype]) -> dict[str, int]:
    """Dtype -> number of tensors."""
    names = [dtype.name for dtype in dtypes.values()]
    return {name: names.count(name) for name in sorted(set(names))}


def _sha256(path: Path, stop: threading.Event) -> str:
    """Hash of a file, or of a part of it once `stop` is set."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while not stop.is_set() and (block := file.read(2**22)):
            digest.update(block)
    return digest.hexdigest()


def _write_component(
    path: Path, entries: Sequence[Entry], source: TensorSource, dtype: np.dtype | None, advance: Advance
) -> None:
    """Writes one Orbax checkpoint from safetensors; in a job of several processes each writes its share."""
    dtypes = source.dtypes
    sizes = {key: math.prod(shape) * dtypes[key].itemsize for key, shape in source.shapes.items()}

    def read(entries: Sequence[Entry]) -> Iterator[dict[str, np.ndarray]]:
        for batch in _batches(entries, [sizes.get(entry.key, 0) for entry in entries]):
            yield {entry.path: _param(entry, source) for entry in batch}
            advance(sum(sizes.get(entry.key, 0) for entry in batch))

    with _forgetting(source):
        if jax.process_count() > 1:
            # A position table that is computed anew has no dtype in the file.
            kept = {entry: dtypes.get(entry.key) or _param(entry, source).dtype for entry in entries}
            leaves = {entry.path: StoredParam(entry.param_shape, stored) for entry, stored in kept.items()}
            write_shares(path, leaves, read(_share(entries, sizes)), dtype)
            return
        with ParamWriter(path) as writer:
            for batch in read(entries):
                writer.write(batch, dtype)


def _share(entries: Sequence[Entry], sizes: Mapping[str, int]) -> list[Entry]:
    """What this process of a job converts: the largest first, each to the process that has least so far."""
    loads = [0] * jax.process_count()
    own = []
    for entry in sorted(entries, key=lambda entry: -sizes.get(entry.key, 0)):
        least = loads.index(min(loads))
        loads[least] += sizes.get(entry.key, 0)
        if least == jax.process_index():
            own.append(entry)
    return own


@contextlib.contextmanager
def _forgetting(source: TensorSource) -> Iterator[None]:
    """Gives mapped pages back while a large tensor is being written: its copies in the writer are enough in memory."""
    done = threading.Event()

    def forget() -> None:
        while not done.wait(_FORGET_SECONDS):
            source.forget()

    thread = threading.Thread(target=forget)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _param(entry: Entry, source: TensorSource) -> np.ndarray:
    """One parameter: a view of the file, unless it is recomputed."""
    if entry.key in source.shapes:
        return entry.from_torch(source[entry.key])
    rows, width = entry.shape
    return sincos_2d_table(width, math.isqrt(rows))


def _batches(entries: Iterable[Entry], sizes: Iterable[int]) -> Iterator[list[Entry]]:
    """Cuts a list into runs of at most BATCH_BYTES."""
    batch: list[Entry] = []
    total = 0
    for entry, size in zip(entries, sizes, strict=True):
        if batch and total + size > BATCH_BYTES:
            yield batch
            batch, total = [], 0
        batch.append(entry)
        total += size
    yield batch


def stored_bytes(folder: ModelFolder) -> int:
    """Bytes of all weights of a converted folder."""
    return sum(leaf.nbytes for name in ("model", "vae") for leaf in stored_params(folder.component(name)).values())


def write_release(folder: ModelFolder, path: Path, advance: Advance) -> None:
    """Writes a converted model in the layout of the release, into an empty folder.

    Position tables that the source of the conversion lacked are left out again.

    Raises:
      CheckpointError: the folder's checkpoints do not fit its configuration, or cannot be read.
    """
    left_out = set(folder.provenance.get("recomputed", ()))
    components = (
        ("model", "ema.safetensors", model_entries(folder.config)),
        ("vae", AUTOENCODER, autoencoder_entries(folder.config.vae)),
    )
    for component, name, entries in components:
        source = folder.component(component)
        stored = stored_params(source)
        shapes = {key: leaf.shape for key, leaf in stored.items()}
        check_shapes(str(source), shapes, {entry.path: entry.param_shape for entry in entries}, "convert it again")
        kept = [entry for entry in entries if entry.key not in left_out]
        _write_tensors(path / name, source, kept, stored, advance)
    for name in folder.files:
        if not (folder.path / name).is_file():
            raise CheckpointError(f"{folder.path} lacks {name}, which its record lists: convert it again")
        shutil.copyfile(folder.path / name, path / name)
    if not set(CONFIG_FILES[:3]) & set(folder.files):
        for name, content in config_files(folder.config).items():
            (path / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_tensors(
    path: Path, source: Path | str, entries: Sequence[Entry], stored: Mapping[str, StoredParam], advance: Advance
) -> None:
    """Writes one safetensors file from an Orbax checkpoint."""
    tensors = {entry.key: (entry.shape, stored[entry.path].dtype) for entry in entries}
    with TensorFileWriter(path, tensors) as writer:
        for batch in _batches(entries, [stored[entry.path].nbytes for entry in entries]):
            large = [entry for entry in batch if stored[entry.path].nbytes > CONCURRENT_BYTES and entry.is_matrix]
            for entry in large:
                pieces = read_pieces(source, entry.path, entry.first_axis)
                writer.write_blocks(entry.key, (piece.T if entry.first_axis else piece for piece in pieces))
            whole = [entry for entry in batch if entry not in large]
            arrays = read_params(source, {entry.path: stored[entry.path] for entry in whole}) if whole else {}
            for entry in whole:
                writer.write(entry.key, entry.to_torch(arrays.pop(entry.path)))
            advance(sum(stored[entry.path].nbytes for entry in batch))
