"""Planning a training job on chips that are not there: the real step is compiled ahead of time, and read."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from loom_jax.core import ConfigError
from loom_jax.data import Tables, abstract_batch
from loom_jax.parallel import DATA_AXES, batch_sharding, make_mesh
from loom_jax.train.config import TrainConfig
from loom_jax.train.cross_entropy import TOKEN_BLOCKS
from loom_jax.train.flops import peak_tflops, training_flops
from loom_jax.train.hlo import Work, read_program
from loom_jax.train.job import Draft, draft_step

GIB = 2.0**30
SPARE = 0.1
"""Share of the memory that a plan leaves free."""

ALIGNED_ROWS = 16
"""Rows of a bfloat16 tile: a gather of shards that end within a tile becomes an all-reduce, of twice the bytes."""


TILE = 512
"""Streams of a multiple of so many tokens: of 4,864 tokens the compiler lays some products out across, and they take a
third longer than its share of those of 5,120."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip has, from the maker's data sheet: GiB that programs may use, GB/s of its links in all, clock."""

    name: str
    memory_gib: float
    link_gbs: float
    clock_ghz: float


CHIPS = (
    Chip("TPU v6 lite", 31.25, 448.0, 1.75),
    Chip("TPU v6e", 31.25, 448.0, 1.75),
    Chip("TPU v5p", 95.0, 600.0, 1.75),
    Chip("TPU v5 lite", 15.75, 200.0, 1.5),
    Chip("TPU v5e", 15.75, 200.0, 1.5),
    Chip("TPU v5", 95.0, 600.0, 1.75),
    Chip("TPU v4", 31.25, 300.0, 1.05),
)


def chip_of(device_kind: str) -> Chip:
    """Returns the chip of a device's own name; raises ConfigError for one that the table does not know."""
    found = [chip for chip in CHIPS if chip.name.lower() in device_kind.lower()]
    if not found:
        raise ConfigError(f"{device_kind!r} is not one of the planned chips: {', '.join(chip.name for chip in CHIPS)}")
    return max(found, key=lambda chip: len(chip.name))


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds on one chip: fused operations by the compiler's estimate, kernels at peak, bytes at full link speed."""

    compute: float
    kernels: float
    links: float

    @property
    def serial(self) -> float:
        """Nothing runs beside anything else."""
        return self.compute + self.kernels + self.links

    @property
    def overlapped(self) -> float:
        """Bytes move while the chip computes."""
        return max(self.compute + self.kernels, self.links)


def time_of(work: Work, chip: Chip, peak: float) -> Times:
    """Returns the estimated seconds of some work; `peak` in FLOP/s."""
    sent = sum(work.sent.values())
    return Times(work.cycles / (chip.clock_ghz * 1e9), work.kernel_flops / peak, sent / (chip.link_gbs * 1e9))


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A program compiled for a chip that is not there, as far as a plan asks.

    Attributes:
      work: what it does on one chip.
      temporary: bytes set aside besides arguments: activations, gradients, gathered weights.
      code: bytes of the program itself.
      optimal_seconds: the compiler's own total, which counts every loop body once; negative where it has no idea.
      seconds: that compiling took.
    """

    work: Work
    temporary: int
    code: int
    optimal_seconds: float
    seconds: float


def compile_for_plan(lowered: Any, loop_length: int = 1) -> CompiledProgram:
    """Compiles a lowered call; `loop_length` is that of a loop over a traced range.

    Raises:
      MemoryError: the compiler finds that the program cannot fit; its message says by how much.
    """
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(str(error).strip().splitlines()[0]) from error
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return CompiledProgram(
        work=read_program(compiled.as_text(), loop_length),
        temporary=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        optimal_seconds=cost.get("optimal_seconds", math.nan),
        seconds=time.perf_counter() - start,
    )


def bytes_per_chip(tree: Any, shardings: Any = None) -> int:
    """Returns the bytes of one chip's share of a tree of shapes, placed by `shardings` or by their own."""
    leaves = jax.tree.leaves(tree)
    places = [leaf.sharding for leaf in leaves] if shardings is None else jax.tree.leaves(shardings)
    shares = zip(leaves, places, strict=True)
    return sum(math.prod(place.shard_shape(a.shape)) * a.dtype.itemsize for a, place in shares)


def state_memory(draft: Draft, batch: Any) -> dict[str, int]:
    """Returns the bytes on one chip of all that a step takes, by kind."""
    state, places = draft.state, draft.shardings
    return {
        "weights": bytes_per_chip((state.trainable, state.frozen), (places.trainable, places.frozen)),
        "ema": bytes_per_chip(state.ema, places.ema),
        "moments": bytes_per_chip(state.optimizer, places.optimizer),
        "autoencoder": bytes_per_chip(draft.vae),
        "batch": bytes_per_chip(batch),
    }


def gradient_memory(draft: Draft) -> int:
    """Returns the bytes of one chip's share of the gradients, by arithmetic: as many values as are trained.

    They are of the parameters' dtype, but float32 where those of micro-batches are added up.
    """
    trainable, summed = draft.state.trainable, draft.parts.config.microbatches > 1
    gradients = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32 if summed else a.dtype), trainable)
    return bytes_per_chip(gradients, draft.shardings.trainable)


def fit_config(config: TrainConfig, mesh: Mesh, rows: int | None, tokens: int | None) -> TrainConfig:
    """Returns a job's configuration for planned chips: so many rows on each part of the mesh, so many tokens in a row.

    Args:
      rows: of each data shard, by default 1; all tokens of the row's two streams are `tokens`, by default unchanged.
    """
    data = config.data
    shards = math.prod(mesh.shape.get(axis, 1) for axis in DATA_AXES)
    budget = data.budget
    if tokens is not None:
        tile = TILE if tokens >= 8 * TILE else 128
        gen = round(tokens * budget.gen / (budget.und + budget.gen) / tile) * tile
        vit = budget.vit * tokens // (budget.und + budget.gen) // 128 * 128
        budget = dataclasses.replace(budget, und=tokens - gen, gen=gen, vit=vit)
    data = dataclasses.replace(data, rows=shards * (rows or 1), shards=1, budget=budget)
    dtype: Any = "bfloat16" if config.compute_dtype == "auto" else config.compute_dtype
    return dataclasses.replace(config, data=data, compute_dtype=dtype)


def plan_mesh(config: TrainConfig, devices: Any) -> Mesh:
    """Returns the mesh of a job on devices that need not be there."""
    return make_mesh(dict(zip(config.mesh.axes, config.mesh.sizes, strict=True)) or config.mesh.preset, devices)


def plan_training(config: TrainConfig, mesh: Mesh) -> dict[str, Any]:
    """Compiles the training step of a job for the devices of a mesh, and returns what it needs and does on one chip.

    Args:
      config: from `fit_config`.

    Returns:
      Plain values for JSON; bytes, FLOPs and seconds on one chip. `fits` means with SPARE of the memory left. What
      the compiler sets aside is `gradients`, by arithmetic (see `gradient_memory`), and the rest, `activations`, with
      gathered weights among them. Where the compiler refuses, `refused` says why, and what it did not say is missing.

    Raises:
      ConfigError: the configuration does not fit the mesh, or the chip is unknown.
    """
    kind = mesh.devices.flat[0].device_kind
    chip, peak = chip_of(kind), (peak_tflops(kind) or math.nan) * 1e12
    draft = draft_step(config, mesh)
    tables = Tables.of(config.model)
    shapes = abstract_batch(config.data, tables, config.model.latent_stride)
    place = batch_sharding(mesh)
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), shapes)
    state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), draft.state, draft.shardings)
    memory = state_memory(draft, batch) | {"gradients": gradient_memory(draft)}
    rows = config.data.rows // math.prod(mesh.shape.get(axis, 1) for axis in DATA_AXES)
    report: dict[str, Any] = {
        "chips": mesh.size,
        "chip": kind,
        "mesh": dict(mesh.shape),
        "rows_per_shard": rows,
        "tokens_per_row": config.data.budget.und + config.data.budget.gen,
        "memory": memory,
        "memory_limit": round(chip.memory_gib * GIB),
    }
    try:
        # On TPUs all loops of a step over traced ranges are those over blocks of tokens with labels: all, at worst.
        compiled = compile_for_plan(draft.step.lower(state, draft.vae, batch), TOKEN_BLOCKS)
    except MemoryError as error:
        return report | {"fits": False, "refused": str(error), "advice": advice(config, mesh, None)}
    gradients = min(memory["gradients"], compiled.temporary)
    memory |= {"gradients": gradients, "activations": compiled.temporary - gradients, "code": compiled.code}
    report |= _speed(config, mesh, compiled.work, chip, peak, rows)
    total = sum(memory.values())
    fits = total <= free_memory(chip)
    return report | {
        "memory_total": total,
        "fits": fits,
        # Whatever is set aside grows with the rows at most in proportion.
        "rows_that_fit": count_that_fits(chip, total, compiled.temporary, rows),
        "optimal_seconds": compiled.optimal_seconds,
        "compile_seconds": compiled.seconds,
        "advice": advice(config, mesh, fits),
    }


def free_memory(chip: Chip) -> float:
    """Returns the bytes of a chip that a plan may fill."""
    return (1 - SPARE) * round(chip.memory_gib * GIB)


def count_that_fits(chip: Chip, total: int, growing: int, count: int) -> int:
    """Returns how many fit where `count` of them take `total` bytes, of which `growing` grow in proportion to them."""
    return max(0, math.floor((free_memory(chip) - (total - growing)) / max(1, growing) * count))


def speed_of(work: Work, flops: float, chip: Chip, peak: float) -> dict[str, Any]:
    """Returns what a report says of speed; `flops` are those that its floor and MFU count, `peak` is in FLOP/s."""
    times = time_of(work, chip, peak)
    floor = flops / peak
    return {
        "flops_compiled": work.flops,
        "floor_seconds": floor,
        "collectives": {k: {"calls": work.calls[k], "bytes": work.sent[k]} for k in sorted(work.sent)},
        "seconds": {**dataclasses.asdict(times), "serial": times.serial, "overlapped": times.overlapped},
        "mfu": {"serial": floor / times.serial, "overlapped": floor / times.overlapped},
    }


def _speed(config: TrainConfig, mesh: Mesh, work: Work, chip: Chip, peak: float, rows: int) -> dict[str, Any]:
    """What the compiled step does, and how long it should take."""
    budget, decoder = config.data.budget, config.model.decoder
    tokens = budget.und + budget.gen
    shards = math.prod(mesh.shape.get(axis, 1) for axis in DATA_AXES)
    # A document that fills the row: the mask lets about half of all pairs through.
    formula = training_flops(decoder, tokens * rows, rows * tokens**2 / 2) * shards / mesh.size
    layers = Work()
    for length, loop in work.loops:
        if length == decoder.num_layers:
            layers.add(loop, 1)
    layer_times = time_of(layers, chip, peak)
    return {
        **speed_of(work, formula, chip, peak),
        "flops_formula": formula,
        "layers": {
            "seconds": layer_times.compute + layer_times.kernels,
            "matrix_seconds": layers.flops / peak,
            "ratio": (layer_times.compute + layer_times.kernels) / max(layers.flops / peak, 1e-12),
            "links_seconds": layer_times.links,
        },
    }


def advice(config: TrainConfig, mesh: Mesh, fits: bool | None) -> list[str]:
    """Returns what to change: for memory where the job does not fit, and where shards lie badly."""
    out = []
    cut = mesh.shape.get("fsdp", 1)
    width = config.model.decoder.hidden_size
    if cut > 1 and (width % cut or width // cut % ALIGNED_ROWS):
        good = max(n for n in range(1, cut + 1) if mesh.size % n == 0 and width % (n * ALIGNED_ROWS) == 0)
        out.append(
            f"width {width} over fsdp={cut} ends within a tile of {ALIGNED_ROWS} rows, so gathers become all-reduces "
            f"of twice the bytes: --preset hsdp --mesh data={mesh.size // good},fsdp={good}"
        )
    if fits:
        return out
    if config.remat != "full":
        out.append(f"recompute whole layers: --config.remat=full (now {config.remat})")
    if config.data.latents == "pixels" and config.data.canvases:
        out.append("encode pictures beforehand: loom data encode, and --config.data.latents=moments")
    if config.ema.decay and config.ema.dtype == "float32":
        out.append("halve the average: --config.ema.dtype=bfloat16")
    if config.optimizer.name == "adamw" and config.optimizer.moment_dtype == "float32":
        out.append("halve the moments: --config.optimizer.moment_dtype=bfloat16, or --config.optimizer.name=adafactor")
    if mesh.shape.get("data", 1) > 1:
        out.append("cut the state over more chips: --preset fsdp")
    out.append("fewer tokens in a row (--tokens), or the length cut over two chips: --preset fsdp+context")
    return out
