"""Configuration dataclasses, errors, and how a command reports them. Imports no jax and nothing else of the package."""

from loom_jax.core.command import ArgumentParser, run_command
from loom_jax.core.config import (
    AutoencoderConfig,
    DecoderConfig,
    LoomConfig,
    SiglipConfig,
    apply_overrides,
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
    "ArgumentParser",
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
    "apply_overrides",
    "from_mapping",
    "run_command",
    "to_mapping",
]
