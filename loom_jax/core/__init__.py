"""Configuration dataclasses and errors. Imports neither jax nor anything else of the package."""

from loom_jax.core.config import (
    AutoencoderConfig,
    DecoderConfig,
    LoomConfig,
    SiglipConfig,
    from_mapping,
    to_mapping,
)
from loom_jax.core.errors import (
    CheckpointError,
    ConfigError,
    ImageError,
    InputError,
    LoomError,
    TokenizerError,
)

__all__ = [
    "AutoencoderConfig",
    "CheckpointError",
    "ConfigError",
    "DecoderConfig",
    "ImageError",
    "InputError",
    "LoomConfig",
    "LoomError",
    "SiglipConfig",
    "TokenizerError",
    "from_mapping",
    "to_mapping",
]
