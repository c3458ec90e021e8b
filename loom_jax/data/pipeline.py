"""The input pipeline: from a configuration to training batches, with a state that resumes at the very next row."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import resource_tracker
from typing import Any

import numpy as np

from loom_jax.core import ConfigError, InputError
from loom_jax.data.bad_rows import RowCounts
from loom_jax.data.canvases import TrainBatch, check_canvases, fill_canvases, fill_moments
from loom_jax.data.config import DataConfig
from loom_jax.data.order import ENDLESS, Address, Order, fingerprint
from loom_jax.data.packer import Packer, Room, fill_of
from loom_jax.data.packing import Packable, Tables, pack
from loom_jax.data.reader import Element, Reader
from loom_jax.data.sources import Source, open_source
from loom_jax.document import Encoder

STATE_VERSION = 1
State = dict[str, Any]


def open_sources(config: DataConfig) -> list[Source]:
    """Opens every data set of the mixture. Data sets drawn or read without paths find their rows by the recipe."""
    return [
        open_source(entry.source, entry.paths, images=entry.images, recipe=entry.recipe) for entry in config.mixture
    ]


def make_pipeline(
    config: DataConfig,
    encoder: Encoder,
    tables: Tables,
    process_index: int = 0,
    process_count: int = 1,
    sources: Sequence[Source] | None = None,
) -> Pipeline:
    """Returns the batches of one process, without end.

    Args:
      config: of the data.
      encoder: of the model: tokenizer (with Loom's tokens where a recipe needs them) and transforms.
      tables: sizes of the model's position tables.
      process_index, process_count: which part of the rows of each batch this process makes. The batches of all
        processes one after the other are what a single process would make.
      sources: in place of those that the configuration names.

    Raises:
      ConfigError: numbers of the configuration do not go together.
      InputError: a data set is not there.
      TokenizerError: the tokenizer lacks a token that a recipe needs.
    """
    if config.shards % process_count or not 0 <= process_index < process_count:
        raise ConfigError(
            f"shards={config.shards} cannot be shared among {process_count} processes (this is {process_index}): "
            "set shards and rows to a multiple of the number of processes"
        )
    if config.latents == "moments" and not tables.latent_dim:
        raise ConfigError("latents='moments' needs Tables.latent_dim: values in one latent token of the model")
    if config.latents == "pixels":
        check_canvases(config.canvases, encoder.latent_stride)
    return Pipeline(config, encoder, tables, sources or open_sources(config), process_index, process_count)


class Pipeline:
    """Iterator of TrainBatch; made by `make_pipeline`. One batch is prepared while the last one is used.

    Attributes:
      stats: of the batch handed out last: share of each stream that is filled, documents; rows and bad rows so far.
    """

    def __init__(
        self,
        config: DataConfig,
        encoder: Encoder,
        tables: Tables,
        sources: Sequence[Source],
        process_index: int,
        process_count: int,
    ):
        self._config, self._tables, self._stride = config, tables, encoder.latent_stride
        self._order = fingerprint(config, sources)
        reader = Reader(config, sources, encoder)
        own = config.shards // process_count
        self._shards = [
            _Shard(config, sources, reader, tables, shard, -(-config.workers // own))
            for shard in range(process_index * own, (process_index + 1) * own)
        ]
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="loom-data", initializer=_shield_workers if config.workers else None
        )
        self._coming: Future[tuple[TrainBatch, State, dict[str, float]]] | None = None
        self.stats: dict[str, float] = {}
        self._state = self._snapshot()
        for entry, source in zip(config.mixture, sources, strict=True):
            for fault in source.bad_files:
                logging.getLogger("loom_jax.data").warning("data set %s: %s", entry.name, fault)
        self._bad_files = sum(len(source.bad_files) for source in sources)

    def __iter__(self) -> Iterator[TrainBatch]:
        return self

    def __next__(self) -> TrainBatch:
        """Returns the next batch.

        Raises:
          LoomError: too many rows are bad.
        """
        if self._coming is None:
            self._coming = self._thread.submit(self._make)
        batch, self._state, self.stats = self._coming.result()
        self._coming = self._thread.submit(self._make)
        return batch

    def get_state(self) -> State:
        """Returns where the batches handed out so far end, as plain JSON values: positions in the data, no pixels."""
        return self._state

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on where `get_state` was called; `merge_states` joins the states of several processes before.

        Raises:
          InputError: the state belongs to other data, another seed or another number of shards, or lacks a shard.
        """
        self._settle()
        if state.get("version") != STATE_VERSION:
            raise InputError(f"the data state has version {state.get('version')}, expected {STATE_VERSION}")
        if state["order"] != self._order:
            raise InputError(
                "the data state belongs to other data sets, weights, recipes, seed or number of shards: restore with "
                "the configuration it was saved with, or begin the data anew without a state"
            )
        missing = [str(shard.number) for shard in self._shards if str(shard.number) not in state["shards"]]
        if missing:
            raise InputError(
                f"the data state lacks shard {', '.join(missing)} of {self._config.shards}: it was saved by another "
                "number of processes, join their states with merge_states"
            )
        for shard in self._shards:
            shard.restart(state["shards"][str(shard.number)])
        self._state = self._snapshot()

    def addresses(self, position: int) -> list[Address]:
        """Returns the row that each shard of this process has at a position, to look at or to replay it."""
        return [shard.order[position] for shard in self._shards]

    def close(self) -> None:
        """Ends threads and worker processes."""
        self._settle()
        self._thread.shutdown()
        for shard in self._shards:
            shard.close()

    def _settle(self) -> None:
        """Waits for the batch being prepared and forgets it; its faults would come again with the same rows."""
        if self._coming is not None:
            self._coming.exception()
            self._coming = None

    def _make(self) -> tuple[TrainBatch, State, dict[str, float]]:
        rows = [row for shard in self._shards for row in shard.next_rows()]
        packed = pack(rows, self._config.budget, self._tables)
        if self._config.latents == "moments":
            batch = fill_moments(rows, packed, 2 * self._tables.latent_dim)
        else:
            batch = fill_canvases(rows, self._config.canvases, packed, self._stride)
        return batch, self._snapshot(), self._measure(batch, rows)

    def _measure(self, batch: TrainBatch, rows: list[list[Packable]]) -> dict[str, float]:
        counts = [shard.counts for shard in self._shards]
        bad: dict[str, float] = {}
        for count in counts:
            for reason, number in count.bad.items():
                bad[f"bad/{reason}"] = bad.get(f"bad/{reason}", 0.0) + number
        return {
            **fill_of(batch.batch, batch.canvases),
            "documents": float(sum(map(len, rows))),
            "rows": float(sum(count.rows for count in counts)),
            "bad_rows": sum(bad.values()),
            "bad_files": float(self._bad_files),
            **bad,
        }

    def _snapshot(self) -> State:
        shards = {str(shard.number): shard.get_state() for shard in self._shards}
        return {"version": STATE_VERSION, "order": self._order, "shards": shards}


def merge_states(states: Sequence[Mapping[str, Any]]) -> State:
    """Returns the states of several processes as one.

    Raises:
      InputError: they do not belong together.
    """
    if len({(state["version"], state["order"]) for state in states}) != 1:
        raise InputError("these data states come from different configurations or versions: give those of one step")
    shards = {number: shard for state in states for number, shard in state["shards"].items()}
    return {"version": states[0]["version"], "order": states[0]["order"], "shards": shards}


class _Shard:
    """One of the streams that the data is cut into: its order, its readers and its packer."""

    def __init__(
        self,
        config: DataConfig,
        sources: Sequence[Source],
        reader: Reader,
        tables: Tables,
        number: int,
        workers: int,
    ):
        self.number, self._workers = number, workers
        self._config, self._reader = config, reader
        self._room = Room(config.budget, tables, config.canvases if config.latents == "pixels" else None)
        self.order = Order(config, sources, number)
        self._iterator: Any = None
        self.restart({"waiting": [], "next": 0, "rows": 0, "bad": {}})

    def restart(self, state: Mapping[str, Any]) -> None:
        """Begins at a state: reads the documents that waited, then goes on."""
        self.close()
        config, waiting = self._config, [int(position) for position in state["waiting"]]
        self.counts = RowCounts(config.max_bad_share, config.min_rows)
        self.counts.set_state(state)
        self._remaining = Remaining(self.order, waiting, int(state["next"]))
        self._packer = Packer(
            self._elements(), self._room, config.rows // config.shards, config.look_ahead, self.counts, len(waiting)
        )
        self._packer.next_position = int(state["next"])
        self._started = dict(state)

    def get_state(self) -> State:
        """Returns the state after the rows made so far."""
        if self._iterator is None:
            return self._started
        return {"waiting": self._packer.positions(), "next": self._packer.next_position, **self.counts.get_state()}

    def next_rows(self) -> list[list[Packable]]:
        """Returns the documents of this shard's rows of the next batch."""
        return self._packer.next_rows()

    def close(self) -> None:
        """Ends the processes that read."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _elements(self) -> Iterator[Element]:
        # Begun when the first element is asked for: a pipeline that gets a state starts its workers only once.
        self._iterator = iter(_dataset(self._remaining, self._reader, self._config, self._workers))
        for element in self._iterator:
            yield pickle.loads(element) if self._workers else element


class Remaining:
    """The addresses still to be read: some positions from before, then all from `next_position` on."""

    def __init__(self, order: Order, waiting: Sequence[int], next_position: int):
        self._order, self._waiting, self._next = order, list(waiting), next_position

    def __len__(self) -> int:
        return ENDLESS - self._next

    def __getitem__(self, index: int) -> Address:
        waiting = len(self._waiting)
        return self._order[self._waiting[index] if index < waiting else self._next + index - waiting]


def _dataset(remaining: Remaining, reader: Reader, config: DataConfig, workers: int) -> Any:
    """Returns a grain dataset of elements, read by threads or by worker processes with threads each."""
    import grain

    read = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.threads * 2)
    elements = grain.MapDataset.source(remaining).map(reader)
    if not workers:
        return elements.to_iter_dataset(read)
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads absl flags, which only programs run by absl.app have parsed
    dataset = elements.map(_as_array).to_iter_dataset(read)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=config.buffer)
    return dataset.mp_prefetch(options, worker_init_fn=_end_with_parent)


_STOPS = (signal.SIGTERM, signal.SIGINT)


def _shield_workers() -> None:
    """Blocks signals to stop in this thread, for the worker processes that it begins have its mask.

    Who asks a whole group of processes to stop, as Ctrl-C and many launchers do, would otherwise take away the batches
    that training needs until its checkpoint.
    """
    resource_tracker.ensure_running()  # begun later, it would unblock them again
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)


def _end_with_parent(index: int, count: int) -> None:
    """Makes a worker last as long as the process that trains, however that ends: also if it is killed."""
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _as_array(element: Element) -> np.ndarray:
    """Returns a pickled element as one array: grain hands arrays over in shared memory, and other things through a pipe
    that stays full when reading ends, which keeps its workers from ending for 25 s."""
    return np.frombuffer(pickle.dumps(element, protocol=5), np.uint8)


def mean_need(config: DataConfig, encoder: Encoder, sources: Sequence[Source], count: int) -> np.ndarray:
    """Returns the und, gen and ViT tokens that a document of the mixture takes over `count` rows, on average."""
    reader, order = Reader(config, sources, encoder), Order(config, sources, 0)
    needs = [d.need for d in (reader(order[position]).document for position in range(count)) if d is not None]
    return np.asarray([[need.und, need.gen, need.vit] for need in needs]).mean(0)
