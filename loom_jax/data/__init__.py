"""From documents to packed batches. numpy only: nothing here imports jax."""

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

__all__ = ["Batch", "Budget", "LatentSource", "Packable", "Streams", "Tables", "Targets", "pack", "total_need"]
