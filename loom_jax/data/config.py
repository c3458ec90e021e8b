"""What a recipe in `configs/` says about data, as frozen dataclasses (read with `loom_jax.core.from_mapping`)."""

from __future__ import annotations

import dataclasses
from typing import Literal

from loom_jax.core import ConfigError
from loom_jax.data.packing import Budget
from loom_jax.document import HistoryPolicy, ImageTransform, Method, Weighting

SourceKind = Literal["parquet", "jsonl", "folders", "array_record", "synthetic", "world"]


@dataclasses.dataclass(frozen=True)
class DropoutConfig:
    """Probabilities of dropping a condition, so that guidance has something to leave out.

    Attributes:
      text, clean, vit: of each droppable segment by its kind. Source: the original's training script.
      together: one draw for all texts (`text`) and one for all images (`clean`; `vit` is not read) of a document.
    """

    text: float = 0.1
    clean: float = 0.3
    vit: float = 0.3
    together: bool = False


@dataclasses.dataclass(frozen=True)
class MixtureEntry:
    """One data set in the mixture.

    Attributes:
      name: how logs call it.
      source: how its rows are stored.
      recipe: how a row becomes a document (a name in `RECIPES`).
      paths: files, folders or patterns such as `data/*.parquet`; what they mean depends on `source`. For `world` the
        split: none is `train`.
      images: the folder that the file names in a jsonl are relative to.
      weight: share of the rows that come from here, relative to the other weights.
      shuffle: visit rows in another order each epoch; else in the order of the files.
      dropout: in place of the recipe's own.
      noisy_copies: how often a picture to be generated stands in its document, each time with noise and a timestep of
        its own. Copies do not see each other: more of them make more of one reading of what is given.
      max_frames: frames of an interleaved document after the first so many are neither shown nor learned; its plan
        stays whole.
      vae_transform, vit_transform: in place of the encoder's.
    """

    name: str
    source: SourceKind
    recipe: str
    paths: tuple[str, ...] = ()
    images: str | None = None
    weight: float = 1.0
    shuffle: bool = True
    dropout: DropoutConfig | None = None
    noisy_copies: int = 1
    max_frames: int | None = None
    vae_transform: ImageTransform | None = None
    vit_transform: ImageTransform | None = None

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ConfigError(
                f"mixture entry {self.name!r} has weight {self.weight}: weights are positive, leave it out"
            )
        if self.noisy_copies < 1:
            raise ConfigError(f"mixture entry {self.name!r} has noisy_copies={self.noisy_copies}: must be at least 1")
        if self.max_frames is not None and self.max_frames < 1:
            raise ConfigError(f"mixture entry {self.name!r} has max_frames={self.max_frames}: must be at least 1")


@dataclasses.dataclass(frozen=True)
class CanvasConfig:
    """`count` places a packed row for VAE images of up to height x width pixels."""

    height: int
    width: int
    count: int


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The whole input pipeline.

    Attributes:
      mixture: the data sets.
      rows: packed rows of a batch, over all processes.
      budget: lengths of the und stream, the gen stream and the pool of ViT patches of one packed row.
      canvases: places for VAE images in one packed row; not read where `latents` is "moments".
      seed: of every random choice here.
      shards: into how many independent streams the data is cut. Batches depend on it and not on the number of
        processes, which must divide it; it must divide `rows`.
      look_ahead: documents for so many packed rows wait for a place where they fit best, in each shard.
      workers: processes that read and decode, 0 for threads only.
      threads: that read and decode, of each worker.
      buffer: documents that each worker holds ready.
      max_bad_share, min_rows: more than this share of bad rows, after so many rows, stops the run.
      latents: encode VAE images on the fly ("pixels"), or read what `loom data encode` stored ("moments").
      method: parts of Loom's method that interleaved documents are made with.
      history: policy by which their earlier frames are chosen, such as `last(1)`; by default each recipe's own.
      weighting: weights of the labels of a text by its length, for losses that are reweighted.
    """

    mixture: tuple[MixtureEntry, ...]
    rows: int
    budget: Budget
    canvases: tuple[CanvasConfig, ...] = ()
    seed: int = 42
    shards: int = 1
    look_ahead: float = 2.0
    workers: int = 0
    threads: int = 2
    buffer: int = 4
    max_bad_share: float = 0.05
    min_rows: int = 200
    latents: Literal["pixels", "moments"] = "pixels"
    method: Method = Method()
    history: str | None = None
    weighting: Weighting = "square"

    def __post_init__(self) -> None:
        if self.history is not None:
            HistoryPolicy.parse(self.history)
        if not self.mixture:
            raise ConfigError("the mixture is empty: name at least one data set")
        names = [entry.name for entry in self.mixture]
        if len(set(names)) < len(names):
            raise ConfigError(f"names in the mixture are not distinct: {', '.join(names)}")
        if self.shards < 1 or self.rows % self.shards:
            raise ConfigError(
                f"rows={self.rows} cannot be shared among shards={self.shards}: make rows a multiple of it"
            )
        if self.threads < 1 or self.buffer < 1:
            raise ConfigError(f"threads={self.threads} and buffer={self.buffer} must be at least 1")
