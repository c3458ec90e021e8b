"""How far bfloat16, int8 weights and TaylorSeer lead a denoised picture away from float32.

    python -m benchmarks precision --checkpoint world_model --prompt "a red circle" --out precision.json

Denoises one picture for each prompt in float32 and in each variant, from the same noise, and prints how far its latents
are from those of float32, over all pictures: root mean square and largest difference, both over the rms of the float32
latents; the same for the velocity of the first step; and the bytes of the transformer's weights. Matrix products of the
float32 reference run at the highest precision of the device. Without a checkpoint a small random model is made, whose
figures say nothing of a trained one.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.report import parser_of, report
from loom_jax import api
from loom_jax.converters.synthetic import write_synthetic_release
from loom_jax.core import AutoencoderConfig, DecoderConfig, LoomConfig, SiglipConfig

TOKENIZER = Path(__file__).resolve().parents[1] / "tests" / "assets" / "bagel_tiny"
CONFIG = LoomConfig(
    decoder=DecoderConfig(640, 128, 256, 4, 8, 2, 16),
    vit=SiglipConfig(64, 128, 2, 4, 16, 64),
    vae=AutoencoderConfig(32, (1, 2), 1, 4, 1.0, 0.0),
    max_latent_size=8,
    vit_max_num_patch_per_side=8,
    latent_patch_size=2,
)
VARIANTS: dict[str, tuple[dict[str, Any], bool]] = {
    "float32": ({"dtype": "float32"}, False),
    "float32, int8 weights": ({"dtype": "float32", "quantize": "int8"}, False),
    "bfloat16": ({"dtype": "bfloat16"}, False),
    "bfloat16, int8 weights": ({"dtype": "bfloat16", "quantize": "int8"}, False),
    "float32, TaylorSeer": ({"dtype": "float32"}, True),
}
"""What the model is loaded with, and whether steps are predicted; the first is what the others are held against."""


@contextmanager
def converted(checkpoint: Path | None) -> Iterator[Path]:
    """Yields the folder to load; a small random model where none is given."""
    if checkpoint is not None:
        yield checkpoint
        return
    with tempfile.TemporaryDirectory() as folder:
        release, path = Path(folder) / "release", Path(folder) / "converted"
        write_synthetic_release(release, CONFIG, seed=0, tokenizer=TOKENIZER)
        api.convert(release, path)
        yield path


def measure(path: Path, prompts: Sequence[str], settings: api.ImageSettings, side: int | None) -> list[dict[str, Any]]:
    """Returns one row of figures for each variant."""
    size = None if side is None else (side, side)
    requests = [api.Request((prompt,), size=size, seed=seed) for seed, prompt in enumerate(prompts)]
    rows: list[dict[str, Any]] = []
    exact: dict[str, np.ndarray] = {}
    for name, (options, taylorseer) in VARIANTS.items():
        generator = api.load(path, **options)
        chosen = dataclasses.replace(settings, taylorseer=taylorseer)
        latents = [r.latents for r in generator.generate(requests, chosen)]
        first = [api.observe(generator, request, api.Capture()).velocity for request in requests]
        found = {"latents": np.concatenate(latents), "velocity": np.concatenate(first, axis=1)}
        exact = exact or found
        state = nnx.state(generator.engine.model(), nnx.Param)
        rows.append(
            {"variant": name, "weights_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state))}
            | {f"{key}_{kind}": v for key in found for kind, v in errors(found[key], exact[key]).items()}
        )
    return rows


def errors(found: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Root mean square and largest difference, over the rms of what is exact."""
    difference, rms = (found - exact).astype(np.float64), np.sqrt(np.mean(exact.astype(np.float64) ** 2))
    return {"rms": float(np.sqrt(np.mean(difference**2)) / rms), "largest": float(np.abs(difference).max() / rms)}


def main(argv: list[str]) -> int:
    """Runs the benchmark."""
    parser = parser_of("precision", __doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="DIR", help="a converted folder")
    add("--prompt", action="append", metavar="TEXT", help="what to draw; may be repeated")
    add("--side", type=int, help="of the pictures, in pixels [the largest that the model draws]")
    add("--steps", type=int, default=50, help="points of the schedule [50]")
    args = parser.parse_args(argv)
    jax.config.update("jax_default_matmul_precision", "highest")
    settings = api.ImageSettings(num_timesteps=8 if args.smoke else args.steps)
    with converted(args.checkpoint) as path:
        rows = measure(path, args.prompt or ["a small boat", "two houses by a lake"], settings, args.side)
    title = f"against float32, {settings.num_timesteps} points, {jax.devices()[0].device_kind}"
    report(args.out, title, rows, settings=dataclasses.asdict(settings))
    return 0
