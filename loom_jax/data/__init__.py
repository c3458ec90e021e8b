"""From rows of data sets to packed batches: sources, recipes, mixing, packing. numpy only: nothing here imports jax."""

from loom_jax.data.bad_rows import BadRow, RowCounts
from loom_jax.data.canvases import Canvas, TrainBatch, abstract_batch
from loom_jax.data.config import CanvasConfig, DataConfig, DropoutConfig, MixtureEntry
from loom_jax.data.order import Address
from loom_jax.data.packer import Packer, Room
from loom_jax.data.packing import (
    Batch,
    Budget,
    LatentSource,
    Packable,
    Streams,
    Tables,
    Targets,
    pack,
    total_need,
)
from loom_jax.data.pictures import Pictures, PicturesConfig
from loom_jax.data.pipeline import Pipeline, make_pipeline, mean_need, merge_states, open_sources
from loom_jax.data.reader import Element, Reader
from loom_jax.data.recipes import RECIPES, Recipe, composition, edit, read_moments, t2i, tutorial, vlm, write_moments
from loom_jax.data.sources import Source, open_source
from loom_jax.data.stored import StoredRows, damaged_files, write_rows
from loom_jax.data.synthetic import SyntheticRows

__all__ = [
    "RECIPES",
    "Address",
    "BadRow",
    "Batch",
    "Budget",
    "Canvas",
    "CanvasConfig",
    "DataConfig",
    "DropoutConfig",
    "Element",
    "LatentSource",
    "MixtureEntry",
    "Packable",
    "Packer",
    "Pictures",
    "PicturesConfig",
    "Pipeline",
    "Reader",
    "Recipe",
    "Room",
    "RowCounts",
    "Source",
    "StoredRows",
    "Streams",
    "SyntheticRows",
    "Tables",
    "Targets",
    "TrainBatch",
    "abstract_batch",
    "composition",
    "damaged_files",
    "edit",
    "make_pipeline",
    "mean_need",
    "merge_states",
    "open_source",
    "open_sources",
    "pack",
    "read_moments",
    "t2i",
    "total_need",
    "tutorial",
    "vlm",
    "write_moments",
    "write_rows",
]
