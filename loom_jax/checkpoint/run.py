"""The folder of a training run: what it trains, and its checkpoints.

run.json                   schema version, model and training configuration, where the weights came from
tokenizer.json, ...        the tokenizer's and the release's other files, as in a converted folder
vae/                       Orbax: the autoencoder, which training does not change
checkpoints/<step>/        one Orbax checkpoint: state (one leaf per layer), data, meta; it appears whole or not at all

What the loop needs:
  run = start_run(folder, model_config, train_mapping, files_from, vae_params)     again on every start
  checkpoints = RunCheckpoints(folder, every=2000, keep_last=3, keep_every=0)
  restored = checkpoints.restore(abstract_state, shardings)                       None where nothing is saved yet
  state, iterator_state = restored.state, restored.own_data()
  with PreemptionNotice() as notice:
      for step in ...:
          stop = notice.agreed() or step == total
          if stop or checkpoints.due(step):
              checkpoints.save(step, state, iterator.get_state(), meta)           returns when `state` may be donated
          checkpoints.check()                                                     raises what went wrong while writing
  checkpoints.wait()                                                              the last one is on disk
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import logging
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from loom_jax.checkpoint import arrays
from loom_jax.checkpoint.arrays import StoredParam, restore_leaves, stored_params
from loom_jax.checkpoint.compare import check_shapes, named
from loom_jax.core import CheckpointError, ConfigError, LoomError
from loom_jax.parallel import flatten_params, gather

CHECKPOINTS = "checkpoints"
"""Folder of a run's checkpoints, one folder a step."""

STEP_SCHEMA_VERSION = 1
"""Version of a step's form that this code writes."""

SAVE_SECONDS = 2 * 3600
"""How long a save may take before it counts as failed: 234 GB of a full 7 B state over a slow network disk."""

STATE, DATA, META = "state", "data", "meta"
_UNFINISHED = "*.orbax-checkpoint-tmp*"
_DISCARDED = "*.discarded"


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read.

    Attributes:
      step: when it was saved.
      state: the tree that was asked for.
      data: what each process of the saving job gave as the state of its data iterator.
      meta: what the saving loop gave to be remembered.
    """

    step: int
    state: Any
    data: tuple[Any, ...]
    meta: Mapping[str, Any]

    def own_data(self) -> Any:
        """Returns the iterator state of this process.

        Raises:
          CheckpointError: another number of processes saved it.
        """
        if len(self.data) != jax.process_count():
            raise CheckpointError(
                f"step {self.step} holds data iterators of {len(self.data)} processes, this job has "
                f"{jax.process_count()}: go on with {len(self.data)} processes, or begin the data anew from the weights"
            )
        return self.data[jax.process_index()]


def saved_steps(folder: Path) -> list[int]:
    """Returns the steps whose checkpoints in a run folder are complete, in order."""
    checkpoints = folder / CHECKPOINTS
    return sorted(int(path.name) for path in checkpoints.glob("[0-9]*") if path.name.isdigit() and path.is_dir())


def step_path(folder: Path, step: int | None) -> Path:
    """Returns where a step's checkpoint lies; of the newest by default.

    Raises:
      CheckpointError: it is not there; those that are, are named.
    """
    steps = saved_steps(folder)
    if not steps:
        raise CheckpointError(f"{folder} holds no complete checkpoint: let the run reach its first save")
    if step is not None and step not in steps:
        raise CheckpointError(f"{folder} holds no checkpoint of step {step}: there are {', '.join(map(str, steps))}")
    return folder / CHECKPOINTS / str(steps[-1] if step is None else step)


class RunCheckpoints:
    """Saves and restores the checkpoints of a run. All processes of a job make the same calls.

    The folder must be seen by all of them. As a context manager it waits for the last save at the end.

    Args:
      folder: of the run.
      every: steps between saves, for `due`.
      keep_last: how many of the newest are kept.
      keep_every: steps whose number it divides are kept for good; 0 for none.

    Raises:
      ConfigError: `every` or `keep_last` is less than 1, or `keep_every` less than 0.
    """

    def __init__(self, folder: Path, every: int = 2000, keep_last: int = 3, keep_every: int = 0) -> None:
        if every < 1 or keep_last < 1 or keep_every < 0:
            raise ConfigError(
                f"save.every={every}, save.keep_last={keep_last}, save.keep_every={keep_every}: the first two must be "
                "at least 1, the last at least 0"
            )
        self.folder = folder.absolute()
        self.every, self.keep_last, self.keep_every = every, keep_last, keep_every
        self._pending: tuple[int, ocp.AsyncResponse[None]] | None = None
        self._saved: int | None = None
        self._cleaned = False
        for library in ("absl", "asyncio"):
            logging.getLogger(library).addFilter(_QUIET)
        if not isinstance(sys.unraisablehook, _TooLate):
            sys.unraisablehook = _TooLate(sys.unraisablehook)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or self._pending is not None:
            self.wait()

    @property
    def _checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS

    def latest(self) -> int | None:
        """Returns the newest step that is complete."""
        return max(saved_steps(self.folder), default=None)

    def due(self, step: int) -> bool:
        """Whether `step` is one of those to be saved."""
        return step > 0 and step % self.every == 0

    def save(self, step: int, state: Any, data: Any = None, meta: Mapping[str, Any] | None = None) -> None:
        """Copies a state to the host and writes it in the background; a save of the same state again does nothing.

        Host memory: one copy of what this process holds. Device memory: some 256 MiB.

        Args:
          state: a pytree of jax arrays; on return it may be donated or changed.
          data: state of this process's data iterator: bytes, or what JSON can hold.
          meta: to be remembered, such as configuration and mesh: what JSON can hold, the same in every process.

        Raises:
          LoomError: this save could not be begun, or the one before it could not be written, as on a full disk.
          CheckpointError: there are checkpoints of later steps, which a next start would take for the newest.
        """
        if self._saved == step:
            return
        self.wait()
        if (latest := self.latest()) is not None and latest > step:
            raise CheckpointError(
                f"{self._checkpoints} holds step {latest}, later than step {step}: remove what is later to go on from "
                "an older step"
            )
        if not self._cleaned:  # only by a job that saves: others may look into the folder while it does
            self._clean()
        content = {
            STATE: _on_host(state),
            DATA: {"processes": gather(_encode(data))},
            META: {"schema_version": STEP_SCHEMA_VERSION, "step": step, **(meta or {})},
        }
        path = self._checkpoints / str(step)
        try:
            if jax.process_index() == 0:
                self._checkpoints.mkdir(parents=True, exist_ok=True)
                _discard(path)  # left by a run that went on from an older step
            with _context():
                response = ocp.save_checkpointables_async(path, content)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failed(step, error) from error
        self._pending = step, response
        self._saved = step

    def check(self) -> None:
        """Ends a save that has been written; returns at once where it has not.

        Raises:
          LoomError: it could not be written.
        """
        self._finish(0)

    def wait(self) -> None:
        """Waits until the last save is on disk, and removes the checkpoints that need not be kept.

        Raises:
          LoomError: it could not be written.
        """
        self._finish(None)

    def _finish(self, timeout: float | None) -> None:
        if self._pending is None:
            return
        step, response = self._pending
        try:
            response.result(timeout)
        except TimeoutError as error:
            if timeout is None:
                raise self._failed(step, error) from error
            return
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failed(step, error) from error
        self._pending = None
        if jax.process_index() == 0:
            for old in self._superfluous():
                _discard(self._checkpoints / str(old))

    def _superfluous(self) -> list[int]:
        steps = saved_steps(self.folder)
        return [s for s in steps[: -self.keep_last] if not (self.keep_every and s % self.keep_every == 0)]

    def _failed(self, step: int, error: BaseException) -> LoomError:
        """The error for a save that failed; the space it took is given back."""
        self._pending = self._saved = None
        self._clean()
        last, why = self.latest(), arrays.cause(error)
        good = "there is no earlier one" if last is None else f"step {last} is the last good one"
        return LoomError(
            f"the checkpoint of step {step} could not be written to {self._checkpoints} ({why}); {good}: "
            "make room or mend the place, and start again"
        )

    def _clean(self) -> None:
        """Removes what killed saves and removals left behind."""
        self._cleaned = True
        if jax.process_index() == 0:
            for pattern in (_UNFINISHED, _DISCARDED):
                for path in self._checkpoints.glob(pattern):
                    _remove(path)

    def restore(self, abstract_state: Any, shardings: Any = None, step: int | None = None) -> Restored | None:
        """Restores a whole state onto any mesh; None where nothing is saved and no step is asked for.

        Args:
          abstract_state: shapes and dtypes in the tree that was saved, as from `jax.eval_shape`.
          shardings: a tree of the same structure, from `parallel.state_shardings`; the first device by default.
          step: which; the newest by default.

        Raises:
          CheckpointError: the step is not there, cannot be read, or holds another state; the first leaves are named.
        """
        if step is None and self.latest() is None:
            return None
        path = step_path(self.folder, step)
        meta = read_meta(path)
        leaves, structure = flatten_params(abstract_state)
        stored = stored_params(path)
        way_out = "the run was made with another model, optimizer or moving average: give its own configuration"
        found = {name: leaf.shape for name, leaf in stored.items()}
        check_shapes(str(path), found, arrays.shapes_on_disk(leaves), way_out)
        restored = restore_leaves(path, _target(leaves, shardings))
        state = structure.unflatten([restored[name] for name in leaves])
        self._saved = meta["step"]
        return Restored(meta["step"], state, _read_data(path), meta)

    def restore_params(
        self,
        abstract_params: Any,
        shardings: Any = None,
        step: int | None = None,
        *,
        weights: str = "ema",
        dtype: Any = None,
    ) -> Any:
        """Restores the parameters of the model alone; see `read_run_params`."""
        return read_run_params(self.folder, abstract_params, shardings, step, weights=weights, dtype=dtype)


def read_run_params(
    folder: Path,
    abstract_params: Any,
    shardings: Any = None,
    step: int | None = None,
    *,
    weights: str = "ema",
    dtype: Any = None,
) -> Any:
    """Restores parameters from a run folder, without optimizer state; those that are frozen come along.

    Args:
      abstract_params: arrays or shapes of all parameters of the model.
      shardings: a tree of the same structure, from `parallel.shardings_for`; the first device by default.
      step: which; the newest by default.
      weights: `ema`, the moving average of the trained ones, or `params`, the trained ones themselves.
      dtype: of the result; as saved by default.

    Raises:
      CheckpointError: the step, the moving average or a parameter is not there.
    """
    path = step_path(folder.absolute(), step)
    stored = stored_params(path)
    leaves, structure = flatten_params(abstract_params)
    places = {}
    for name, source in param_sources(path, stored, weights).items():
        places[_in_memory(name)] = _in_memory(source)
    missing = [name for name in leaves if name not in places]
    if missing:
        raise CheckpointError(f"{path}: {len(missing)} parameters missing: {named(missing)}; it is of another model")
    target = {
        places[name]: jax.ShapeDtypeStruct(leaf.shape, dtype or arrays.memory_dtype(places[name], leaf, stored))
        for name, leaf in leaves.items()
    }
    found = {name: stored[name].shape for name in arrays.shapes_on_disk(target) if name in stored}
    check_shapes(str(path), found, arrays.shapes_on_disk(target), "it is of another model")
    restored = restore_leaves(path, _target(target, shardings))
    return structure.unflatten([restored[places[name]] for name in leaves])


def param_sources(path: Path, stored: Mapping[str, StoredParam], weights: str = "ema") -> dict[str, str]:
    """Returns path of each parameter on disk -> path of the leaf of a step's checkpoint that holds it.

    Raises:
      CheckpointError: `weights` is not `ema` or `params`, or there is no moving average.
    """
    if weights not in ("ema", "params"):
        raise CheckpointError(f"weights {weights!r} are not one of ema, params")
    trained = {"ema": "ema", "params": "trainable"}[weights]
    by_part: dict[str, dict[str, str]] = {"frozen": {}, trained: {}}
    for name in stored:
        part, _, rest = name.partition("/")
        if part in by_part:
            by_part[part][rest] = name
    if not by_part[trained]:
        raise CheckpointError(f"{path} holds no moving average (the run had it off): ask for weights `params`")
    return by_part["frozen"] | by_part[trained]


def read_meta(path: Path) -> dict[str, Any]:
    """Reads what a step's checkpoint says about itself.

    Raises:
      CheckpointError: it cannot be read, or is of a version that this code does not know.
    """
    meta = _read_json(path, META)
    found = meta.get("schema_version")
    if found != STEP_SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema_version {found!r}, this loom_jax knows {STEP_SCHEMA_VERSION}: upgrade loom_jax"
        )
    return meta


def _read_data(path: Path) -> tuple[Any, ...]:
    return tuple(_decode(state) for state in _read_json(path, DATA)["processes"])


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        with _context():
            return ocp.load_checkpointables(path, {name: None})[name]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read ({arrays.cause(error)}): {arrays.DAMAGED}") from error


def _context() -> ocp.Context:
    """Orbax options: as for parameters, and JSON beside them."""
    context = arrays.context()
    registry = ocp.handlers.local_registry()
    for name in (DATA, META):
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
    context.checkpointables.registry = registry
    context.asynchronous.timeout_secs = SAVE_SECONDS
    return context


def _target(leaves: Mapping[str, Any], shardings: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes with the places where they go."""
    where = arrays.sharding_leaves(shardings, len(leaves))
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for (name, leaf), sharding in zip(leaves.items(), where, strict=True)
    }


def _in_memory(path: str) -> str:
    """Path in memory of a path on disk: without the number of the layer."""
    names = path.split("/")
    if arrays.STACKED in names:
        del names[names.index(arrays.STACKED) + 1]
    return "/".join(names)


def _on_host(state: Any) -> dict[str, Any]:
    """Copies a state to the host, one leaf per layer, some 256 MiB at a time; nested dicts."""
    leaves, _ = flatten_params(state)
    copies: dict[str, Any] = {}
    for batch in arrays.batches(leaves):
        pending: list[tuple[str, jax.Array]] = []
        for part in batch:
            whole = tuple(leaves[name] for name in part.paths)
            where = tuple(_layer_sharding(leaf, part.layer) for leaf in whole)
            taken = _taker(where, part.layer is not None)(whole, part.layer or 0)
            pending += zip((part.on_disk(name) for name in part.paths), taken, strict=True)
        copies |= _fetch(pending)
    return arrays.nested(copies)


def _fetch(pending: list[tuple[str, jax.Array]]) -> dict[str, Any]:
    """Copies arrays from their devices.

    One process gives numpy arrays, without a second copy of what is replicated. Of several processes each can copy only
    its own shards: those stay jax arrays, in host memory.
    """
    if jax.process_count() > 1:
        moved = [jax.device_put(array, array.sharding.with_memory_kind("pinned_host")) for _, array in pending]
        jax.block_until_ready(moved)
        return {name: array for (name, _), array in zip(pending, moved, strict=True)}
    for _, array in pending:
        array.copy_to_host_async()
    return {name: np.asarray(array) for name, array in pending}


def _layer_sharding(leaf: jax.Array, layer: int | None) -> Sharding:
    sharding = leaf.sharding
    if layer is not None and isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, P(*sharding.spec[1:]))
    return sharding


@functools.lru_cache
def _taker(where: tuple[Sharding, ...], stacked: bool) -> Any:
    """A compiled function that copies arrays, or one layer of each, into new buffers."""

    def take(leaves: tuple[jax.Array, ...], layer: jax.Array) -> tuple[jax.Array, ...]:
        if stacked:
            return tuple(jax.lax.dynamic_index_in_dim(leaf, layer, 0, keepdims=False) for leaf in leaves)
        return tuple(jnp.copy(leaf) for leaf in leaves)

    return jax.jit(take, out_shardings=where)


def _encode(data: Any) -> dict[str, Any]:
    return {"base64": base64.b64encode(data).decode()} if isinstance(data, bytes) else {"json": data}


def _decode(stored: Mapping[str, Any]) -> Any:
    return base64.b64decode(stored["base64"]) if "base64" in stored else stored["json"]


def _remove(path: Path) -> None:
    """Removes a folder into which the writers of a failed save may still write for a moment."""
    for _ in range(20):
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return
        time.sleep(0.1)


def _discard(path: Path) -> None:
    """Removes a checkpoint; its name goes first, so that none is ever half there."""
    if path.exists():
        aside = path.with_name(f"{path.name}.discarded")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


class _Said(logging.Filter):
    """Keeps back the traces of a failed save, which the error says in one line: Orbax logs each several times, and
    asyncio those of the arrays that failed after the first, when Orbax no longer waits for them."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        forgotten = "exception was never retrieved" in message and "orbax" in message
        return not forgotten and "_SignalingThread.run() raised an exception" not in message


_QUIET = _Said()


class _TooLate:
    """Keeps back what the other arrays of a failed save say, hundreds of traces: Orbax ends its event loop at the first
    array that cannot be written, and theirs call into it later, where nothing can catch it."""

    def __init__(self, before: Callable[[Any], object]) -> None:
        self._before = before

    def __call__(self, unraised: Any) -> None:
        if str(unraised.exc_value) != "Event loop is closed":
            self._before(unraised)
