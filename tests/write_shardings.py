"""Writes the golden sharding files: how the parameters of bagel_7b lie on 64 devices under every preset.

    python tests/write_shardings.py

Run it after a change of the rules or the presets that is meant, and read the diff of tests/assets/shardings.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "assets" / "shardings"
DEVICES = 64


def shardings_of(preset: str) -> dict[str, Any]:
    """Returns the mesh of a preset, and for each parameter its shape, its cut and the shape of one device's part.

    A cut names the mesh axes of each dimension; `fsdp:8` is an axis of which only 8 parts are used.
    """
    from flax import nnx
    from jax.sharding import AbstractMesh, AxisType

    from loom_jax.configs import bagel_7b
    from loom_jax.core import LoomConfig, from_mapping
    from loom_jax.models import Autoencoder, LoomModel
    from loom_jax.parallel import PRESETS, flatten_params, shardings_for

    config = from_mapping(LoomConfig, bagel_7b.get_config().model.to_dict())
    sizes = dict(PRESETS[preset].axes)
    fixed = 1
    for size in sizes.values():
        fixed *= max(size, 1)
    sizes = {axis: DEVICES // fixed if size == -1 else size for axis, size in sizes.items()}
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    out: dict[str, Any] = {"mesh": sizes}
    for name, build in {
        "model": lambda: LoomModel(config, rngs=nnx.Rngs(0)),
        "vae": lambda: Autoencoder(config.vae, rngs=nnx.Rngs(0)),
    }.items():
        params = nnx.state(nnx.eval_shape(build), nnx.Param)
        shardings, _ = flatten_params(shardings_for(params, mesh, preset))
        out[name] = {
            path: {
                "shape": str(leaf.shape),
                "cut": _cut(shardings[path], sizes),
                "part": str(shardings[path].shard_shape(leaf.shape)),
            }
            for path, leaf in flatten_params(params)[0].items()
        }
    return out


def _cut(sharding: Any, sizes: dict[str, int]) -> str:
    parts = sharding.mesh.shape
    spec = [(axes,) if isinstance(axes, str) else axes or () for axes in sharding.spec]
    named = [
        "*".join(axis if parts[axis] == sizes[axis] else f"{axis}:{parts[axis]}" for axis in axes) or "-"
        for axes in spec
    ]
    return f"({', '.join(named)})"


def as_text(shardings: dict[str, Any]) -> str:
    """JSON with one line for each parameter."""
    parts = [f'"mesh": {json.dumps(shardings["mesh"])}']
    for name in ("model", "vae"):
        lines = (f"  {json.dumps(path)}: {json.dumps(leaf)}" for path, leaf in shardings[name].items())
        parts.append(f'"{name}": {{\n' + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def golden_file(preset: str) -> Path:
    """Where a preset's golden file lies."""
    return GOLDEN / f"{preset}.json"


def main() -> int:
    """Writes all of them."""
    from loom_jax.parallel import PRESETS

    GOLDEN.mkdir(parents=True, exist_ok=True)
    for preset in PRESETS:
        golden_file(preset).write_text(as_text(shardings_of(preset)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
