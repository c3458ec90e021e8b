"""Configuration dataclasses, errors, and how a command reports them. Imports no jax and nothing else of the package."""

from loom_jax.core.command import STOPPED, ArgumentParser, run_command
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
from loom_jax.core.heartbeat import HEARTBEATS, Heartbeat, HeartbeatFile, read_heartbeats, silent_processes

__all__ = [
    "HEARTBEATS",
    "STOPPED",
    "ArgumentParser",
    "AutoencoderConfig",
    "CheckpointError",
    "ConfigError",
    "DecoderConfig",
    "Heartbeat",
    "HeartbeatFile",
    "ImageError",
    "InputError",
    "LoomConfig",
    "LoomError",
    "SiglipConfig",
    "TokenizerError",
    "apply_overrides",
    "from_mapping",
    "read_heartbeats",
    "run_command",
    "silent_processes",
    "to_mapping",
]
