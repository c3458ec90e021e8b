"""Which row comes when: mixing by weight and shuffling, both computed from a position, so reading can begin anywhere.

A shard has positions 0, 1, 2, ...; position -> (data set, epoch, row) depends on the seed and on nothing read before.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from loom_jax.core import to_mapping
from loom_jax.data.config import DataConfig
from loom_jax.data.sources import Source

ENDLESS = 1 << 40
"""Positions that a shard may have: more than anybody reads."""


class Address(NamedTuple):
    """One visit to a row.

    Attributes:
      position: within the shard.
      entry: number of the data set in the mixture.
      epoch: how often all rows of that data set have been visited before.
      row: its number in the data set.
    """

    position: int
    entry: int
    epoch: int
    row: int


class Order:
    """The rows of one shard in order: `order[position]` is an Address. A sequence that grain can read.

    Data set k gives its rows to the shards in turn, so in each epoch every row is visited once by one shard.
    """

    def __init__(self, config: DataConfig, sources: Sequence[Source], shard: int):
        self._lengths = [len(source) for source in sources]
        self._blocks = [tuple(source.blocks) for source in sources]
        self._shuffle = [entry.shuffle for entry in config.mixture]
        self._weights = [entry.weight for entry in config.mixture]
        self._seed, self._shard, self._shards = config.seed, shard, config.shards
        self._mix = _mix(self._weights)

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, position: int) -> Address:
        entry, turn = self._mix[position]
        epoch, place = divmod(turn * self._shards + self._shard, self._lengths[entry])
        index = self._shuffled(entry, epoch, place) if self._shuffle[entry] else place
        return Address(position, entry, epoch, index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mix": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _mix=_mix(state["_weights"]))

    def _shuffled(self, entry: int, epoch: int, place: int) -> int:
        """Returns the row at a place of an epoch: blocks in another order, and the rows of each in another order."""
        seed, blocks = (self._seed, entry, epoch), self._blocks[entry]
        if not blocks:
            return _permuted(place, self._lengths[entry], seed)
        order, ends, starts = _shuffled_blocks(blocks, seed)
        number = int(np.searchsorted(ends, place, side="right"))
        block = int(order[number])
        offset = place - int(ends[number]) + blocks[block]
        return int(starts[block]) + _permuted(offset, blocks[block], (*seed, block))


def fingerprint(config: DataConfig, sources: Sequence[Source]) -> str:
    """Returns a digest of all that decides which row comes when: a state is only good for the same."""
    facts: dict[str, Any] = {
        "seed": config.seed,
        "shards": config.shards,
        "mixture": [
            {**to_mapping(entry), "length": len(source)} for entry, source in zip(config.mixture, sources, strict=True)
        ],
    }
    for entry in facts["mixture"]:
        del entry["paths"], entry["images"]  # the same data may lie elsewhere on the next machine
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _mix(weights: Sequence[float]) -> Any:
    """Returns position -> (data set, how often it was chosen before), in the proportion of the weights."""
    import grain

    return grain.MapDataset.mix(
        [grain.MapDataset.range(ENDLESS).map(functools.partial(_tag, number)) for number in range(len(weights))],
        weights=list(weights),
    )


def _tag(number: int, turn: int) -> tuple[int, int]:
    return number, turn


def _permuted(place: int, length: int, seed: tuple[int, ...]) -> int:
    """Returns where a seeded permutation of range(length) takes `place`."""
    from grain.experimental import index_shuffle

    if length == 1:
        return 0
    word = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return int(index_shuffle(place, max_index=length - 1, seed=word, rounds=4))


@functools.lru_cache(maxsize=8)
def _shuffled_blocks(blocks: tuple[int, ...], seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the order of the blocks, where each ends in that order, and where each begins in the files."""
    order = np.random.default_rng(seed).permutation(len(blocks))
    sizes = np.asarray(blocks, np.int64)
    return order, np.cumsum(sizes[order]), np.cumsum(sizes) - sizes
