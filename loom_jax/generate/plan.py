"""Planning sampling on chips that are not there: the real denoising loop, compiled ahead of time and read."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from loom_jax.core import LoomConfig
from loom_jax.data import Budget, Tables, pack
from loom_jax.document import SpecialIds
from loom_jax.generate.buckets import bucket
from loom_jax.generate.context import Context, empty_context
from loom_jax.generate.engine import Denoising, Engine
from loom_jax.generate.guidance import Guidance
from loom_jax.models import Autoencoder, Backend, LoomModel
from loom_jax.nn import choose_attention
from loom_jax.parallel import batch_sharding, make_constrain, shard_attend, shardings_for
from loom_jax.train import peak_tflops
from loom_jax.train.plan import (
    GIB,
    bytes_per_chip,
    chip_of,
    compile_for_plan,
    count_that_fits,
    free_memory,
    speed_of,
)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What is sampled: pictures of a size each, after contexts of a length, in steps with guidance branches."""

    pictures: int = 1
    side: int = 1024
    context: int = 512
    steps: int = 49
    branches: int = 2


def plan_sampling(config: LoomConfig, mesh: Mesh, preset: str, attention: str, sampling: Sampling) -> dict[str, Any]:
    """Compiles the denoising loop for the devices of a mesh, and returns what it needs and does on one chip.

    Weights are bfloat16. All steps count as guided: those outside the guidance interval cost half.

    Returns:
      Plain values for JSON, as `plan_training` gives them; `activations` are all that the compiler sets aside, and
      MFU and floor are of the matrix FLOPs as compiled.

    Raises:
      ConfigError: the model does not fit the mesh, or the chip is unknown.
    """
    kind = mesh.devices.flat[0].device_kind
    chip, peak = chip_of(kind), (peak_tflops(kind) or math.nan) * 1e12
    model = nnx.eval_shape(lambda: LoomModel(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))
    graphdef, params = nnx.split(model, nnx.Param)
    shardings = shardings_for(params, mesh, preset)
    params = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), params, shardings)
    vae = nnx.eval_shape(lambda: Autoencoder(config.vae, rngs=nnx.Rngs(0)))
    backend = Backend(
        shard_attend(choose_attention(attention, mesh.devices.flat[0].platform), mesh), make_constrain(mesh)
    )
    engine = Engine(nnx.merge(graphdef, params), vae, SpecialIds(0, 1, 2, 3), config.decoder.vocab_size, backend)
    work, x = _shapes(config, mesh, sampling)
    memory = {"weights": bytes_per_chip(params), "contexts": bytes_per_chip(work.contexts.kv)}
    report: dict[str, Any] = {
        **dataclasses.asdict(sampling),
        "chips": mesh.size,
        "chip": kind,
        "mesh": dict(mesh.shape),
        "memory": memory,
        "memory_limit": round(chip.memory_gib * GIB),
    }
    try:
        compiled = compile_for_plan(engine.lower_denoising(work, x, sampling.branches), sampling.steps)
    except MemoryError as error:
        return report | {"fits": False, "refused": str(error), "advice": advice(mesh, sampling.pictures // 2)}
    memory |= {"activations": compiled.temporary, "code": compiled.code}
    total = sum(memory.values())
    fits = total <= free_memory(chip)
    # Contexts and whatever is set aside grow with the pictures at most in proportion.
    most = count_that_fits(chip, total, memory["contexts"] + memory["activations"], sampling.pictures)
    return report | {
        **speed_of(compiled.work, compiled.work.flops, chip, peak),
        "memory_total": total,
        "fits": fits,
        "pictures_that_fit": most,
        "compile_seconds": compiled.seconds,
        "advice": [] if fits else advice(mesh, most),
    }


def advice(mesh: Mesh, fewer: int) -> list[str]:
    """Returns what to change where pictures do not fit; `fewer` of them may, 0 where not even one does."""
    out = [f"fewer pictures at once: --pictures {fewer}"] if fewer else []
    if mesh.shape.get("data", 1) > 1:
        out.append("cut the weights over more chips: --preset fsdp")
    if mesh.size > 1 and mesh.shape.get("tensor", 1) == 1:
        out.append("cut heads, mlp and vocabulary too, so that less is gathered at once: --preset fsdp+tensor")
    out.append("halve the decoder's weights, which this plan counts as bfloat16: loom generate --quantize int8")
    return out


def _shapes(config: LoomConfig, mesh: Mesh, sampling: Sampling) -> tuple[Denoising, Any]:
    """The shapes that the denoising loop takes, rows cut over the mesh where they divide."""
    rows = sampling.pictures * sampling.branches
    cells = (sampling.side // config.latent_stride) ** 2
    row = pack([[]], Budget(2, bucket(cells), 0), Tables.of(config)).streams
    context = jax.eval_shape(lambda: empty_context(config.decoder, rows, bucket(sampling.context), jnp.bfloat16))
    whole = jax.NamedSharding(mesh, jax.P())
    by_rows = batch_sharding(mesh)

    def place(a: Any, axis: int = 0) -> Any:
        cut = by_rows.spec[0] if by_rows.spec else None
        names = (cut,) if isinstance(cut, str) else cut or ()
        parts = math.prod(mesh.shape[name] for name in names)
        fits = len(a.shape) > axis and a.shape[axis] % parts == 0
        sharding = jax.NamedSharding(mesh, jax.P(*(None,) * axis, cut)) if fits else whole
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

    streams = jax.tree.map(lambda a: place(np.broadcast_to(a, (rows, *a.shape[1:]))), row)
    kv = jax.tree.map(lambda a: place(a, 1), context.kv)
    contexts = Context(kv, *jax.tree.map(place, context[1:]))
    scalar: Any = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    scale = place(jax.ShapeDtypeStruct((sampling.pictures,), jnp.float32))
    guidance = Guidance(scale, scale, scalar, scalar, scalar)
    schedule: Any = jax.ShapeDtypeStruct((sampling.steps + 1,), jnp.float32, sharding=whole)
    x = place(jax.ShapeDtypeStruct((sampling.pictures, bucket(cells), config.latent_dim), jnp.float32))
    return Denoising(contexts, streams, guidance, schedule), x
