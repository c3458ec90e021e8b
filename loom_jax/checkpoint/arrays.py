"""Parameters in Orbax: one leaf per layer on disk, layers stacked in memory.

In memory `decoder/layers/und/q_proj/kernel` has a leading layer axis L; on disk there is one leaf
`decoder/layers/<i>/und/q_proj/kernel` for each layer. Both directions go layer by layer, so neither a host nor a device
ever holds a second copy of the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from loom_jax.checkpoint.compare import check_shapes
from loom_jax.checkpoint.remote import reading, storage
from loom_jax.core import CheckpointError
from loom_jax.parallel import flatten_params, together

CHUNK_BYTES = 2 * 2**20
"""Size of a stored chunk: the least that a host reads, so not much more than one device's part of a 7 B kernel."""

CONCURRENT_BYTES = 2**28
"""Bytes that are given to Orbax at once, and that it may hold on top of them."""

FILE_BYTES = 2**28
"""Size of a data file. With the default of 2 GiB a conversion took twice as long, and more memory."""

PIECE_BYTES = 2**26
"""About what is written at once of a large numpy array."""

STATE = "state"
"""Folder of an Orbax checkpoint in which its leaves lie."""

COMMITTED = "commit_success.txt"
"""File that Orbax writes last."""

DAMAGED = "convert or save it again; of a run, remove it to go on from an older step"
"""The way out where a checkpoint is whole by its mark, but cannot be read."""

STACKED = "layers"
"""Path component below which parameters are stacked along a layer axis."""


@dataclasses.dataclass(frozen=True)
class StoredParam:
    """Shape and dtype of one leaf on disk."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


def context(reading: int = 0) -> ocp.Context:
    """Orbax options that keep memory low; `reading` is the size of the largest array to be read."""
    options = ocp.Context()
    options.array.saving.use_compression = False
    options.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    options.array.saving.ocdbt_target_data_file_size = FILE_BYTES
    options.memory.deepcopy_host_arrays = False
    options.memory.write_concurrent_bytes = CONCURRENT_BYTES
    options.memory.read_concurrent_bytes = CONCURRENT_BYTES + 2 * reading
    options.pytree.loading.partial_load = True
    return options


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from paths."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


class ParamWriter:
    """Writes one Orbax checkpoint in several parts; it appears at `path` when the `with` block ends without an error.

    In a job of several processes all of them make the same calls. numpy arrays of more than CONCURRENT_BYTES are
    written last, piece by piece, because Orbax copies whatever it is given: where there are such, let `path` lie in a
    `new_folder`, which makes the whole appear at once.

    Raises:
      CheckpointError: on entry, where there is something at `path`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._large: dict[str, tuple[np.ndarray, np.dtype]] = {}

    def __enter__(self) -> Self:
        if self.path.exists():
            raise CheckpointError(f"{self.path} is already there: choose another name, or remove it")
        if jax.process_index() == 0:  # what a killed save left behind
            shutil.rmtree(self.path.with_name(f"{self.path.name}.partial_save"), ignore_errors=True)
        return self

    def write(self, leaves: Mapping[str, np.ndarray | jax.Array], dtype: np.dtype | None = None) -> None:
        """Writes leaves by their path on disk.

        Args:
          leaves: stored on return, but for large numpy arrays: those must stay as they are until the block ends.
          dtype: what they are cast to; as they are by default.
        """
        written: dict[str, np.ndarray | jax.Array] = {}
        for name, leaf in leaves.items():
            stored = leaf.dtype if dtype is None else dtype
            if isinstance(leaf, np.ndarray) and leaf.nbytes > CONCURRENT_BYTES:
                self._large[name] = leaf, stored
                written[name] = np.zeros((1,) * leaf.ndim, stored)  # holds the place in Orbax's list of leaves
            else:
                written[name] = leaf if leaf.dtype == stored else leaf.astype(stored)
        with context():
            ocp.partial.save(self.path, nested(written))

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None:
            return
        with context():
            ocp.partial.finalize(self.path)
        if jax.process_index() == 0:
            # Orbax notes where the checkpoint was written: a folder that is passed on should not tell.
            (self.path / COMMITTED).write_text("Checkpoint commit was successful", encoding="utf-8")
            for name, (array, dtype) in self._large.items():
                _fill(self.path, name, array, dtype, self.path / STATE)


def write_shares(
    path: Path,
    leaves: Mapping[str, StoredParam],
    own: Iterable[Mapping[str, np.ndarray]],
    dtype: np.dtype | None = None,
) -> None:
    """Writes one Orbax checkpoint by all processes of a job together, each its share; every process reads it back.

    What is at `path` is whole when the call returns: let it lie in a folder that nobody reads before.

    Args:
      leaves: path on disk -> shape and dtype of every leaf, the same in every process.
      own: the share of this process, in batches that memory can hold; every leaf stands in that of one process.
      dtype: what the leaves are cast to; as they are by default.

    Raises:
      CheckpointError: it cannot be written.
      ElsewhereError: another process could not write its share.
    """
    # Each process has a database of its own, as when Orbax saves the shards of several: none waits for another's lock.
    database = path / STATE if jax.process_index() == 0 else path / STATE / f"ocdbt.process_{jax.process_index()}"
    with ParamWriter(path) as writer:  # Orbax waits for all processes in it, and lets process 0 write
        writer.write({name: np.zeros((1,) * len(leaf.shape), leaf.dtype) for name, leaf in leaves.items()}, dtype)
    with together(), _writing(path):
        for batch in own:
            _fill_all(path, batch, dtype, database)
    with together(), _writing(path):
        if jax.process_index() == 0:
            _merge(path / STATE, jax.process_count())


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Says in one line what kept tensorstore from writing."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.parent} cannot be written to ({cause(error)}): choose another place") from error


def _fill_all(path: Path, leaves: Mapping[str, np.ndarray], dtype: np.dtype | None, state: Path) -> None:
    """Puts arrays where Orbax knows placeholders; see `_fill`."""
    # One commit for all that are small: each rewrites the index of the database.
    small = tensorstore.Transaction(atomic=True)
    for name, array in leaves.items():
        _fill(path, name, array, dtype or array.dtype, state, None if array.nbytes > PIECE_BYTES else small)
    small.commit_sync()


def _merge(state: Path, count: int) -> None:
    """Takes the leaves of all processes into the database of the checkpoint; their values stay where they are."""
    shared = tensorstore.Context()  # one for all, or tensorstore does not copy from one database to another
    transaction = tensorstore.Transaction(atomic=True)
    whole = tensorstore.KvStore.open(_database(state), context=shared).result().with_transaction(transaction)
    for number in range(1, count):
        share = state / f"ocdbt.process_{number}"
        if share.is_dir():  # a job may have more processes than the checkpoint has leaves
            source = tensorstore.KvStore.open(_database(share), context=shared).result()
            source.experimental_copy_range_to(whole).result()
    transaction.commit_sync()


def _fill(
    path: Path,
    name: str,
    array: np.ndarray,
    dtype: np.dtype,
    state: Path,
    transaction: tensorstore.Transaction | None = None,
) -> None:
    """Puts an array where Orbax knows a placeholder, a few chunks at a time; the format is the placeholder's.

    Args:
      state: folder of the database that takes it.
      transaction: keeps what is written in memory until it is committed; by default every piece goes to disk.
    """
    form = tensorstore.open(_leaf_spec(path / STATE, name), open=True).result()
    metadata = form.spec().to_json()["metadata"]
    chunk = _chunk_shape(array.shape, dtype.itemsize)
    metadata["shape"] = list(array.shape)
    metadata["chunk_grid"]["configuration"]["chunk_shape"] = chunk
    for codec in metadata["codecs"]:
        if codec["name"] == "sharding_indexed":
            codec["configuration"]["chunk_shape"] = chunk
    spec = {
        **_leaf_spec(state, name),
        "metadata": metadata,
        "store_data_equal_to_fill_value": True,  # Orbax takes a chunk that is not there for a loss
    }
    store = tensorstore.open(
        spec, create=True, delete_existing=True, transaction=transaction, context=_filling()
    ).result()
    steps = [*chunk[:-1], chunk[-1] * max(1, PIECE_BYTES // (math.prod(chunk) * dtype.itemsize))]
    for corner in itertools.product(*(range(0, size, step) for size, step in zip(array.shape, steps, strict=True))):
        piece = tuple(
            slice(at, min(at + step, size)) for at, step, size in zip(corner, steps, array.shape, strict=True)
        )
        store[piece].write(array[piece].astype(dtype, copy=False)).result()


@functools.cache
def _filling() -> tensorstore.Context:
    """Options for `_fill`: one object, or leaves would not share a transaction."""
    return tensorstore.Context({"file_io_sync": False})


def _state(path: Path | str) -> Path | str:
    """Where the leaves of a checkpoint lie."""
    return f"{path}/{STATE}" if isinstance(path, str) else path / STATE


def _database(state: Path | str) -> dict[str, Any]:
    """Where Orbax keeps leaves: a key-value database in a folder, here or in a bucket."""
    base = storage(state) if isinstance(state, str) else {"driver": "file", "path": f"{state.absolute()}/"}
    return {"driver": "ocdbt", "base": base}


def _leaf_spec(state: Path | str, name: str) -> dict[str, Any]:
    """One leaf of a database: a zarr array."""
    return {"driver": "zarr3", "kvstore": {**_database(state), "path": f"{name.replace('/', '.')}/"}}


def _chunk_shape(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """Halves the longest even side until a chunk is small enough."""
    chunk = list(shape)
    while math.prod(chunk) * itemsize > CHUNK_BYTES and any(size % 2 == 0 for size in chunk):
        longest = max((axis for axis, size in enumerate(chunk) if size % 2 == 0), key=lambda axis: chunk[axis])
        chunk[longest] //= 2
    return chunk


def stored_params(path: Path | str) -> dict[str, StoredParam]:
    """Returns path -> shape and dtype of every leaf of an Orbax checkpoint, on this machine or at an address.

    Raises:
      CheckpointError: there is no readable checkpoint.
    """
    try:
        if isinstance(path, str):
            return _stored_at(path)
        tree = ocp.metadata(path.absolute()).metadata
        if tree is None:  # Orbax only logs why
            raise ValueError("its leaves cannot be listed")
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} holds no readable Orbax checkpoint ({_first_line(error)}): {DAMAGED}") from error
    leaves, _ = flatten_params(tree)
    return {name: StoredParam(tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in leaves.items()}


def _stored_at(address: str) -> dict[str, StoredParam]:
    """Leaves of a checkpoint in a bucket, from the database itself: Orbax cannot list what is at s3://."""
    database = tensorstore.KvStore.open(_database(_state(address)), context=reading()).result()
    keys = [key for key in database.list().result() if key.endswith(b"/zarr.json")]
    found = [database.read(key) for key in keys]
    stored = {}
    for key, content in zip(keys, found, strict=True):
        form = json.loads(content.result().value)
        name = key.decode().removesuffix("/zarr.json").replace(".", "/")
        stored[name] = StoredParam(tuple(form["shape"]), jnp.dtype(form["data_type"]))
    if not stored:
        raise ValueError("it is empty, or not there")
    return stored


def read_params(path: Path | str, stored: Mapping[str, StoredParam]) -> dict[str, np.ndarray]:
    """Returns some leaves as numpy arrays on this host.

    Args:
      stored: those to be read, from `stored_params`.

    Raises:
      CheckpointError: they cannot be read.
    """
    # An array of one value seen many times: Orbax only asks for its type, shape and dtype.
    abstract = {name: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape) for name, leaf in stored.items()}
    leaves, _ = flatten_params(_load(path, abstract, max(leaf.nbytes for leaf in stored.values())))
    return leaves


def read_pieces(path: Path | str, name: str, axis: int) -> Iterator[np.ndarray]:
    """Yields one leaf as numpy arrays of about PIECE_BYTES that follow each other along `axis`.

    Raises:
      CheckpointError: it cannot be read.
    """
    try:
        options: dict[str, Any] = {"context": reading()} if isinstance(path, str) else {}
        store: Any = tensorstore.open(_leaf_spec(_state(path), name), open=True, **options).result()
        rows = store.chunk_layout.read_chunk.shape[axis]
        step = rows * max(1, PIECE_BYTES * store.shape[axis] // (rows * store.size * store.dtype.numpy_dtype.itemsize))
        for begin in range(0, store.shape[axis], step):
            piece = (*(slice(None),) * axis, slice(begin, min(begin + step, store.shape[axis])))
            yield store[piece].read().result()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read near {name} ({_first_line(error)}): {DAMAGED}") from error


def _load(path: Path | str, abstract: Mapping[str, Any], largest: int) -> Any:
    """Reads some leaves; nested dicts of arrays."""
    try:
        if isinstance(path, str):
            return _load_from(path, abstract)
        with context(largest):
            return ocp.load(path.absolute(), nested(abstract))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read near {next(iter(abstract))} ({_first_line(error)}): {DAMAGED}"
        ) from error


def _load_from(address: str, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Reads some leaves from a bucket; of a leaf that is sharded, what the devices of this process hold."""
    options: dict[str, Any] = {"open": True, "context": reading(), "recheck_cached_data": "open"}
    stores = {name: tensorstore.open(_leaf_spec(_state(address), name), **options) for name in abstract}

    def read(name: str, leaf: Any) -> Any:
        store = stores[name].result()

        def piece(index: Any) -> np.ndarray:
            return store[index].read().result().astype(leaf.dtype, copy=False)

        if isinstance(leaf, np.ndarray):
            return piece(...)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, piece)

    return nested({name: read(name, leaf) for name, leaf in abstract.items()})


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _layer_path(path: str, layer: int) -> str:
    """Path on disk of one layer of a stacked parameter."""
    head, tail = path.split(f"{STACKED}/", 1)
    return f"{head}{STACKED}/{layer}/{tail}"


def _is_stacked(path: str) -> bool:
    return STACKED in path.split("/")


def shapes_on_disk(params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Path on disk -> shape, for parameters as they are in memory."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, leaf in params.items():
        if _is_stacked(path):
            shapes |= {_layer_path(path, layer): tuple(leaf.shape[1:]) for layer in range(leaf.shape[0])}
        else:
            shapes[path] = tuple(leaf.shape)
    return shapes


@dataclasses.dataclass(frozen=True)
class Part:
    """Parameters that are read or written together: one layer of a stack, or a parameter without layers."""

    layer: int | None
    paths: tuple[str, ...]

    def on_disk(self, path: str) -> str:
        """Path on disk of one of its parameters."""
        return path if self.layer is None else _layer_path(path, self.layer)


def batches(params: Mapping[str, Any]) -> Iterator[list[Part]]:
    """Yields parts, several at a time where they are small: every call into Orbax costs some 50 ms."""
    batch: list[Part] = []
    total = 0
    for paths in _groups(params):
        stacked = _is_stacked(paths[0])
        layers = range(params[paths[0]].shape[0]) if stacked else [None]
        size = sum(_layer_bytes(path, params[path]) for path in paths)
        for layer in layers:
            if batch and total + size > CONCURRENT_BYTES:
                yield batch
                batch, total = [], 0
            batch.append(Part(layer, paths))
            total += size
    yield batch


def _groups(params: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yields paths whose layers go together: of one stack, at most CONCURRENT_BYTES or a single larger one a layer."""
    stacks: dict[str, list[str]] = {}
    for path, leaf in params.items():
        # Factored moments have layers where they are kept, and one entry as a placeholder where they are not.
        stack = f"{path.split(f'{STACKED}/')[0]}{leaf.shape[0]}" if _is_stacked(path) else path
        stacks.setdefault(stack, []).append(path)
    for paths in stacks.values():
        group: list[str] = []
        for path in paths:
            if group and sum(_layer_bytes(p, params[p]) for p in (*group, path)) > CONCURRENT_BYTES:
                yield tuple(group)
                group = []
            group.append(path)
        yield tuple(group)


def _layer_bytes(path: str, leaf: Any) -> int:
    return math.prod(leaf.shape[_is_stacked(path) :]) * np.dtype(leaf.dtype).itemsize


def cause(error: BaseException) -> str:
    """What went wrong, in a few words: of a failed write what the system said, else the first line."""
    said = re.search(r"([^:]+) \[os_error_code", str(error))
    return said[1].strip() if said else (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def save_params(path: Path, params: Any) -> None:
    """Saves parameters as one Orbax checkpoint, one leaf per layer; each process writes its own shards.

    Args:
      params: jax arrays in an nnx.State or nested dicts; below a component `layers` they are stacked [L, ...].

    Raises:
      CheckpointError: there is something at `path`.
    """
    leaves, _ = flatten_params(params)
    with ParamWriter(path) as writer:
        for batch in batches(leaves):
            writer.write(
                {
                    part.on_disk(name): leaves[name] if part.layer is None else leaves[name][part.layer]
                    for part in batch
                    for name in part.paths
                }
            )


def restore_params(path: Path | str, abstract: Any, shardings: Any = None, *, dtype: Any = None) -> Any:
    """Restores parameters straight onto their devices, where the layers are stacked one by one.

    Each process reads the chunks that its own shards touch. Device memory: the parameters and one layer.

    Args:
      abstract: arrays or shapes, as nnx.State or nested dicts; every leaf must be stored, and nothing else.
      shardings: a tree of the same structure, from `parallel.shardings_for`; all on the first device by default.
      dtype: of the result; as stored by default (the widest where layers of one parameter differ).

    Returns:
      A tree like `abstract` of jax arrays.

    Raises:
      CheckpointError: leaves are missing, unknown or of another shape (the first few are named), or unreadable.
    """
    leaves, structure = flatten_params(abstract)
    where = dict(zip(leaves, sharding_leaves(shardings, len(leaves)), strict=True))
    stored = stored_params(path)
    way_out = "its configuration and its weights belong to different models, or it was not written to its end"
    check_shapes(str(path), {name: leaf.shape for name, leaf in stored.items()}, shapes_on_disk(leaves), way_out)
    target = {
        name: jax.ShapeDtypeStruct(leaf.shape, dtype or memory_dtype(name, leaf, stored), sharding=where[name])
        for name, leaf in leaves.items()
    }
    restored = restore_leaves(path, target)
    return jax.tree_util.tree_unflatten(structure, [restored[name] for name in leaves])


def restore_leaves(path: Path | str, target: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Restores parameters by their paths in memory, each onto its sharding; see `restore_params`.

    Args:
      target: path -> shape, dtype and sharding; of what lies below `path`, a part.

    Raises:
      CheckpointError: they cannot be read.
    """
    restored: dict[str, jax.Array] = {}
    for batch in batches(target):
        wanted = {part.on_disk(name): _of_layer(target[name], part.layer) for part in batch for name in part.paths}
        largest = max(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in wanted.values())
        read, _ = flatten_params(_load(path, wanted, largest))
        for part in batch:
            arrays = tuple(read.pop(part.on_disk(name)) for name in part.paths)
            if part.layer is not None:
                if part.layer == 0:
                    restored |= zip(part.paths, _allocate(tuple(target[name] for name in part.paths)), strict=True)
                buffers = tuple(restored[name] for name in part.paths)
                arrays = _inserter(tuple(target[name].sharding for name in part.paths))(buffers, arrays, part.layer)
            restored |= zip(part.paths, arrays, strict=True)
    return restored


def sharding_leaves(shardings: Any, count: int) -> Iterable[Sharding]:
    if shardings is None:
        return [jax.sharding.SingleDeviceSharding(jax.devices()[0])] * count
    return jax.tree_util.tree_leaves(shardings)


def memory_dtype(path: str, leaf: Any, stored: Mapping[str, StoredParam]) -> np.dtype:
    """The dtype that holds every stored layer of a parameter; what JAX makes of float64."""
    names = [_layer_path(path, layer) for layer in range(leaf.shape[0])] if _is_stacked(path) else [path]
    return jax.dtypes.canonicalize_dtype(functools.reduce(jnp.promote_types, (stored[name].dtype for name in names)))


def _of_layer(leaf: jax.ShapeDtypeStruct, layer: int | None) -> jax.ShapeDtypeStruct:
    """One layer of a stacked parameter; `leaf` itself where there are no layers."""
    if layer is None:
        return leaf
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, P(*sharding.spec[1:]))
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)


def _allocate(leaves: tuple[jax.ShapeDtypeStruct, ...]) -> tuple[jax.Array, ...]:
    """Stacked buffers on their devices."""
    make = jax.jit(
        lambda: tuple(jnp.zeros(leaf.shape, leaf.dtype) for leaf in leaves),
        out_shardings=tuple(leaf.sharding for leaf in leaves),
    )
    return make()


@functools.lru_cache
def _inserter(where: tuple[Sharding, ...]) -> Any:
    """A compiled function that writes one layer into stacked buffers in place."""

    def insert(buffers: tuple[jax.Array, ...], layers: tuple[jax.Array, ...], at: jax.Array) -> tuple[jax.Array, ...]:
        pairs = zip(buffers, layers, strict=True)
        return tuple(jax.lax.dynamic_update_index_in_dim(buffer, layer, at, 0) for buffer, layer in pairs)

    return jax.jit(insert, donate_argnums=0, out_shardings=where)
