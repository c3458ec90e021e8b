"""Frozen dataclasses that describe the networks, and their strict translation from and to plain mappings.

Every size that a network needs stands here: the converters read it from a checkpoint, recipes spell it out.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from loom_jax.core.errors import ConfigError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The mixture-of-transformers decoder: a Qwen2 decoder with two parameter sets a layer (und, gen)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}: "
                "every key head must serve the same number of query heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} is odd: rotary positions turn pairs of channels")
        if self.hidden_size % 4:
            raise ConfigError(f"hidden_size={self.hidden_size} is not a multiple of 4, as 2-D position tables need it")


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
    """The SigLIP NaViT encoder. `num_layers` counts existing layers, `num_positions` rows of its learned table."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int
    num_positions: int
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"the ViT's hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}"
            )

    @property
    def patch_dim(self) -> int:
        """Values in one patch, in the order (row, column, channel)."""
        return 3 * self.patch_size**2


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """The FLUX autoencoder. Latents are `scale_factor * (sample - shift_factor)`; norms have `num_groups` groups."""

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    scale_factor: float
    shift_factor: float
    in_channels: int = 3
    out_ch: int = 3
    num_groups: int = 32

    @property
    def downsample(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** (len(self.ch_mult) - 1)


@dataclasses.dataclass(frozen=True)
class LoomConfig:
    """The whole model: decoder, ViT, autoencoder, and how they join."""

    decoder: DecoderConfig
    vit: SiglipConfig
    vae: AutoencoderConfig
    max_latent_size: int
    vit_max_num_patch_per_side: int
    latent_patch_size: int = 2
    timestep_shift: float = 1.0
    interpolate_pos: bool = False

    def __post_init__(self) -> None:
        if self.vit.num_positions != self.vit_max_num_patch_per_side**2:
            raise ConfigError(
                f"the ViT has {self.vit.num_positions} learned positions, but vit_max_num_patch_per_side="
                f"{self.vit_max_num_patch_per_side} needs {self.vit_max_num_patch_per_side**2}: both are of one grid"
            )

    @property
    def latent_dim(self) -> int:
        """Values in one latent token, in the order (row, column, channel)."""
        return self.latent_patch_size**2 * self.vae.z_channels

    @property
    def latent_stride(self) -> int:
        """Pixels per latent token along one side; image sides must be multiples of it."""
        return self.vae.downsample * self.latent_patch_size


def to_mapping(config: Any) -> dict[str, Any]:
    """Returns a dataclass as nested plain dicts, lists and scalars that JSON can hold."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_mapping(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def from_mapping(cls: type[T], mapping: Mapping[str, Any], where: str = "") -> T:
    """Builds dataclass `cls` from a nested mapping (a dict or an ml_collections.ConfigDict).

    Raises:
      ConfigError: a key is unknown or missing, or a value has the wrong type; the dotted path names it.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(mapping) - set(fields))
    if unknown:
        raise ConfigError(f"unknown key {where + unknown[0]!r}: {cls.__name__} knows {', '.join(fields)}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in mapping:
            values[name] = _convert(hints[name], mapping[name], where + name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"key {where + name!r} is missing: {cls.__name__} needs it")
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Returns `value` as the type that `hint` asks for, or raises ConfigError."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        return _convert(next(option for option in options if option is not type(None)), value, where)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise ConfigError(f"{where}={value!r} is not one of {', '.join(map(repr, typing.get_args(hint)))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}={value!r} is a {type(value).__name__}, expected a list")
        inner = typing.get_args(hint)[0]
        return tuple(_convert(inner, item, f"{where}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}={value!r} is a {type(value).__name__}, expected a mapping for {hint}")
        return from_mapping(typing.cast(type[Any], hint), value, where + ".")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where}={value!r} is a {type(value).__name__}, expected {hint.__name__}")
    return value


def apply_overrides(mapping: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Returns a nested mapping with values replaced by overrides such as `optimizer.learning_rate=1e-4`.

    Values are read as Python literals, and as text where they are none. Parts of a list are named by their number:
    `data.mixture.0.weight=2`. Keys need not be there before: whether they may be is for `from_mapping` to say.

    Raises:
      ConfigError: an override has no `=`, or leads through something that holds no keys.
    """
    out = copy.deepcopy(dict(mapping))
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ConfigError(f"override {override!r}: expected KEY=VALUE, such as optimizer.learning_rate=1e-4")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = {"true": True, "false": False}.get(text.lower(), text)
        _set(out, path.split("."), value, override)
    return out


def _set(node: Any, names: Sequence[str], value: Any, override: str) -> None:
    """Puts `value` at the place that `names` lead to."""
    for place, name in enumerate(names):
        last = place == len(names) - 1
        if isinstance(node, list):
            if not name.isdigit() or int(name) >= len(node):
                raise ConfigError(f"override {override!r}: {name!r} is not the number of one of {len(node)} entries")
            key: Any = int(name)
        elif isinstance(node, dict):
            key = name
            if not last and node.get(key) is None:
                node[key] = {}
            elif not last and isinstance(node[key], tuple):
                node[key] = list(node[key])
        else:
            raise ConfigError(f"override {override!r}: {'.'.join(names[:place])} holds a value, not keys")
        if last:
            node[key] = value
        node = node[key]
