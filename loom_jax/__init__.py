"""Interleaved text-image generation with one diffusion transformer. A Python user imports `loom_jax.api`."""

__version__ = "0.1.0"

__all__ = ["__version__"]
