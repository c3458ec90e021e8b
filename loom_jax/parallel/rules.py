"""Parameter path -> logical axes -> mesh axes."""

from __future__ import annotations

import functools
import math
import re
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from loom_jax.core import ConfigError
from loom_jax.parallel.mesh import PRESETS

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed_tokens/embedding", ("vocab", "embed")),
    (r"lm_head/kernel", ("embed", "vocab")),
    (r".*/[qkv]_proj/lora_b", (None, "heads", "embed")),
    (r".*/[qkv]_proj/kernel", ("embed", "heads", None)),
    (r".*/[qkv]_proj/bias", ("heads", None)),
    (r".*/(o_proj|out_proj)/kernel", ("heads", None, "embed")),
    (r".*/(gate_proj|up_proj|fc1)/kernel", ("embed", "mlp")),
    (r".*/(down_proj|fc2)/kernel", ("mlp", "embed")),
    (r"(vit_pos_embed|latent_pos_embed)/table|vit/position_embedding/embedding", (None, "embed")),
    (r"vae2llm/kernel|vit/patch_embedding/kernel|.*/(?![qkv]_proj/)\w+/lora_b", (None, "embed")),
    (r"llm2vae/kernel|.*/lora_a", ("embed", None)),
    (r".*/(conv1|conv2|nin_shortcut|conv_in|conv_out|downsample|upsample)/kernel", (None, None, None, "channel")),
    (r".*/attn_1/(q|k|v|proj_out)/kernel", (None, "channel")),
    (r".*/scale|(?!.*/[qkv]_proj/).*/bias", (None,)),
)
"""Pattern of the whole parameter path -> logical axes of one layer's parameter. Each parameter fits exactly one."""

REPLICATED_LIMIT = 64 * 2**20
"""Bytes of parameters that may stay whole on every device of a mesh."""


class ParamShape(Protocol):
    """An array, or what `jax.eval_shape` gives for one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...


def flatten_params(tree: Any) -> tuple[dict[str, Any], Any]:
    """Returns parameter path -> leaf (`decoder/layers/und/q_proj/kernel`), in leaf order, and the tree's structure.

    Takes an nnx.State, or nested dicts: both give the same paths. Fields of a named tuple and places in a sequence are
    components too, so that the whole state of a training job has paths: `optimizer/1/mu/lm_head/kernel`.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(_names(path)): leaf for path, leaf in leaves}, structure


def _names(path: tuple[Any, ...]) -> list[str]:
    """Names along a key path; the level `value` that an nnx.Variable adds is left out."""
    names = [getattr(key, "key", getattr(key, "idx", getattr(key, "name", None))) for key in path]
    return [str(name) for name, key in zip(names, path, strict=True) if getattr(key, "name", None) != "value"]


def logical_axes(path: str, ndim: int) -> tuple[str | None, ...]:
    """Returns the logical axis of each dimension of a parameter; a stacked layer axis comes first and is never cut.

    Raises:
      ConfigError: no rule or more than one fits the path, or the rule has another number of axes.
    """
    found = [axes for pattern, axes in RULES if re.fullmatch(pattern, path)]
    if len(found) != 1:
        raise ConfigError(
            f"{len(found)} sharding rules fit parameter {path!r}, expected 1: mend RULES in parallel/rules.py"
        )
    axes = (None, *found[0]) if "layers" in path.split("/") else found[0]
    if len(axes) != ndim:
        raise ConfigError(f"parameter {path!r} has {ndim} dimensions, but its sharding rule names {len(axes)}: {axes}")
    return axes


def shardings_for(abstract_params: Any, mesh: Mesh | AbstractMesh, preset: str) -> Any:
    """Returns the NamedSharding of every parameter, in a tree of the same structure.

    A dimension that a mesh axis does not divide is cut over the largest part of that axis that does: the sharding then
    speaks of the same devices as a finer mesh, where the axis is split into itself and `<axis>_rest`.

    Args:
      abstract_params: arrays or shapes, as nnx.State or nested dicts; layers stacked.
      mesh: from `make_mesh`, or an AbstractMesh to plan for devices that are not there.
      preset: a key of PRESETS.

    Raises:
      ConfigError: a parameter has no rule or several; the preset is not known or needs an axis that the mesh lacks;
        or more than REPLICATED_LIMIT bytes would stay whole on every device.
    """
    if preset not in PRESETS:
        raise ConfigError(f"sharding preset {preset!r} is not one of {', '.join(PRESETS)}")
    rules = PRESETS[preset].rules
    lacking = sorted({axis for axes in rules.values() for axis in axes} - set(mesh.axis_names))
    if lacking:
        raise ConfigError(
            f"preset {preset!r} needs mesh axis {lacking[0]!r}, the mesh has {', '.join(mesh.axis_names)}"
        )
    params, structure = flatten_params(abstract_params)
    shardings = {path: _sharding(path, leaf, mesh, rules) for path, leaf in params.items()}
    if rules:
        _check_replicated(params, shardings, preset)
    return jax.tree_util.tree_unflatten(structure, shardings.values())


def _sharding(path: str, leaf: ParamShape, mesh: Mesh | AbstractMesh, rules: Any) -> NamedSharding:
    """The sharding of one parameter, on a finer mesh where an axis has to be split."""
    parts: dict[str, int] = {}
    spec: list[tuple[str, ...] | None] = []
    for logical, size in zip(logical_axes(path, len(leaf.shape)), leaf.shape, strict=True):
        names = []
        for axis in rules.get(logical, ()) if logical else ():
            part = math.gcd(size, mesh.shape[axis])
            size //= part
            if part > 1:
                names.append(axis)
            if 1 < part < mesh.shape[axis]:
                parts[axis] = part
        spec.append(tuple(names) or None)
    return NamedSharding(_split_axes(mesh, tuple(parts.items())), P(*spec))


@functools.lru_cache
def _split_axes(mesh: Mesh | AbstractMesh, parts: tuple[tuple[str, int], ...]) -> Mesh | AbstractMesh:
    """The same devices with each axis named in `parts` split in (part, rest)."""
    if not parts:
        return mesh
    sizes: dict[str, int] = {}
    for axis, size in mesh.shape.items():
        part = dict(parts).get(axis, size)
        sizes[axis] = part
        if part != size:
            sizes[f"{axis}_rest"] = size // part
    types = (mesh.axis_types[0],) * len(sizes)
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=types)
    return Mesh(mesh.devices.reshape(tuple(sizes.values())), tuple(sizes), axis_types=types)


def _check_replicated(params: dict[str, Any], shardings: dict[str, NamedSharding], preset: str) -> None:
    """Raises ConfigError where too many bytes stay whole on every device."""
    whole = {
        path: math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        for path, leaf in params.items()
        if not any(shardings[path].spec) and shardings[path].mesh.size > 1
    }
    if sum(whole.values()) > REPLICATED_LIMIT:
        path = max(whole, key=lambda path: whole[path])
        mesh = dict(shardings[path].mesh.shape)
        total = sum(whole.values()) / 2**20
        raise ConfigError(
            f"preset {preset!r} on mesh {mesh} leaves {total:.0f} MiB of parameters whole on every device, at most "
            f"{REPLICATED_LIMIT // 2**20} are allowed; the largest is {path} {tuple(params[path].shape)}: "
            "choose axis sizes that divide its dimensions"
        )
