"""A slice of the 7 B model on one accelerator, in bfloat16: a training step, a guided picture, written text.

    python -m benchmarks accelerator --out accelerator.json

Weights are drawn on the device. Training: --train-layers of the 28 layers at full width, all but the ViT trained by
AdamW with bfloat16 parameters and float32 moments, --rows of a text to image, an edit and a question with pictures of
--side pixels, latents given; MFU is the FLOPs of spec section 9, those of the vocabulary for labels alone, over the
data sheet's peak. Sampling: all layers, one picture in 50 points, shift 3, guidance 4 on (0.4, 1], after a prompt read
before: its FLOPs over the highest rate that a product of large matrices reached in this process. Text: tokens a second,
greedy, one row and eight. --smoke takes a small model and runs anywhere.
accelerator_peer.py does the picture and the step with the PyTorch original.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.cpu_step import CONFIG, documents, smaller, with_moments
from benchmarks.report import GIB, best_and_median, parser_of, report
from loom_jax import api
from loom_jax.configs import bagel_7b
from loom_jax.core import LoomConfig, from_mapping, to_mapping
from loom_jax.data import Tables, pack, total_need
from loom_jax.document import NO_TOKEN, TextTokens, Tokenizer, make_encoder
from loom_jax.generate import Engine, Generator, Query, text_room
from loom_jax.generate.text import TextControls
from loom_jax.models import Autoencoder, Backend, LoomModel
from loom_jax.nn import choose_attention, denoising_schedule
from loom_jax.parallel import global_batch, make_constrain, make_mesh, shard_attend
from loom_jax.train import TrainConfig, build_job, peak_tflops
from loom_jax.train.flops import flop_coefficients, training_flops

PROMPT, TEXT_TOKENS = 60, 128
SETTINGS = api.ImageSettings(num_timesteps=50, timestep_shift=3.0, cfg_text_scale=4.0, cfg_interval=(0.4, 1.0))


def matrix_rate(size: int) -> float:
    """Returns the highest rate, FLOP/s, of bfloat16 products of square matrices in this process."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    multiply = jax.jit(lambda a, b: a @ b)
    return 2 * size**3 / _seconds(lambda: multiply(a, b), 10)[0]


def _seconds(call: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Returns the least and the median seconds of a call."""
    return best_and_median({"": call}, repeats)[""]


def _peak_gib() -> float | None:
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] / GIB if stats else None


def train(config: LoomConfig, layers: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measures a step of some layers."""
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, num_layers=layers))
    encoder = make_encoder(config, Tokenizer.of_bytes())
    row = documents(config, encoder.special, args.side)
    need = total_need(row)
    recipe = {
        "model": to_mapping(config),
        "data": {
            "mixture": [{"name": "t2i", "source": "synthetic", "recipe": "t2i"}],
            "rows": args.rows,
            "budget": dataclasses.asdict(need),
            "canvases": [{"height": args.side, "width": args.side, "count": 1}],
        },
        "total_steps": 1000,
        "frozen": ["vit/*"],
        "attention": args.attention,
        "remat": args.remat,
        "compute_dtype": "bfloat16",
        "param_dtype": "bfloat16",
        "ema": {"decay": 0.0},
    }
    job = build_job(from_mapping(TrainConfig, recipe))
    batch = global_batch(with_moments(pack([row] * args.rows, need, Tables.of(config)), config.latent_dim), job.mesh)
    state, metrics = job.step(job.new_state(), job.vae_params, batch)

    def step() -> Any:
        nonlocal state, metrics
        state, metrics = job.step(state, job.vae_params, batch)
        return metrics

    found = _seconds(step, args.repeats)
    tokens = float(metrics.und_tokens + metrics.gen_tokens)
    flops = training_flops(config.decoder, tokens, float(metrics.squared_lengths))
    # The formula counts an embedding and logits for every token, which would make much of a slice of few layers.
    vocabulary = 6.0 * config.decoder.vocab_size * config.decoder.hidden_size
    flops += vocabulary * (float(metrics.ce_count) - 2 * tokens)
    return _row(f"training step, {layers} layers, {tokens:.0f} tokens, remat {args.remat}", found, flops)


def _row(work: str, found: tuple[float, float], flops: float | None = None) -> dict[str, Any]:
    (best, median), peak = found, peak_tflops(jax.devices()[0].device_kind)
    rate = None if flops is None else flops / best / 1e12
    print(f"{work}: {best:.4g} s", flush=True)  # so that a run that is cut short has told what it found
    return {
        "work": work,
        "seconds": best,
        "seconds_median": median,
        "tflop": None if flops is None else flops / 1e12,
        "tflop_per_second": rate,
        "of_data_sheet": rate / peak if rate and peak else None,
        "peak_gib": _peak_gib(),
    }


def build(config: LoomConfig, attention: str) -> Generator:
    """Returns a generator whose weights are drawn on the device, layer after layer compiled as one."""
    mesh = make_mesh("single")

    def draw(make: Callable[[], Any]) -> Any:
        graphdef = nnx.graphdef(nnx.eval_shape(make))
        return nnx.merge(graphdef, jax.jit(lambda: nnx.state(make()))())

    model = draw(lambda: LoomModel(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))
    vae = draw(lambda: Autoencoder(config.vae, rngs=nnx.Rngs(1)))
    attend = shard_attend(choose_attention(attention, jax.default_backend()), mesh)
    encoder = make_encoder(config, Tokenizer.of_bytes())
    engine = Engine(model, vae, encoder.special, config.decoder.vocab_size, Backend(attend, make_constrain(mesh)))
    return Generator(config, engine, encoder)


def sample(generator: Generator, args: argparse.Namespace) -> dict[str, Any]:
    """Measures the denoising of one guided picture."""
    prompt, query = TextTokens((1,) * (PROMPT - 2)), Query((args.side, args.side), seed=0, after_pictures=False)
    read = generator.read([[prompt], []], [(), ()])

    def make() -> Any:
        *_, (_, made) = generator.denoise(read, [query], SETTINGS, branches=2)
        return made

    cells = (args.side // generator.config.latent_stride) ** 2
    evaluations = _evaluations()
    per_token, per_pair = (c / 3 for c in flop_coefficients(generator.config.decoder))  # the forward pass alone
    # The logits of text, which the coefficients count, are not formed here.
    per_token -= 4.0 * generator.config.decoder.vocab_size * generator.config.decoder.hidden_size
    one = per_token * (cells + 2) + per_pair * (cells + 2) * (cells + 2 + PROMPT)
    work = f"picture of {args.side} x {args.side}, {evaluations} evaluations"
    return _row(work, _seconds(make, args.repeats), evaluations * one)


def _evaluations() -> int:
    """Forward passes of a row: two for each step within the guidance interval, one for the others."""
    times = denoising_schedule(SETTINGS.num_timesteps, SETTINGS.timestep_shift)[:-1]
    low, high = SETTINGS.cfg_interval
    return sum(2 if low < t <= high else 1 for t in times)


def write(generator: Generator, rows: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measures greedy text after a prompt."""
    room = text_room(api.TextSettings(max_new_tokens=TEXT_TOKENS))
    read = generator.read([[TextTokens((1,) * (PROMPT - 2))]] * rows, [()] * rows, room)
    keys, controls = jax.random.split(jax.random.key(0), rows), TextControls(jnp.float32(0), jnp.float32(1))

    def decode() -> Any:
        return generator.engine.decode_text(read.context, keys, controls, TEXT_TOKENS, TEXT_TOKENS).tokens

    written = int((np.asarray(decode()) != NO_TOKEN).sum())
    found = _seconds(decode, args.repeats)
    return _row(f"text, {rows} rows, {written} tokens", found) | {"tokens_per_second": written / found[0]}


def main(argv: list[str]) -> int:
    """Runs the benchmark."""
    parser = parser_of("accelerator", __doc__)
    add = parser.add_argument
    add("--side", type=int, default=1024, metavar="PIXELS", help="of the pictures [1024]")
    add("--layers", type=int, default=28, metavar="N", help="layers that sample; 0: none [28]")
    add("--train-layers", type=int, default=8, metavar="N", help="layers that are trained; 0: none [8]")
    add("--attention", default="auto", help="backend [auto]")
    add("--rows", type=int, default=2, metavar="N", help="rows of a training step [2]")
    add("--remat", default="dots", help="what the backward pass keeps [dots]")
    add("--repeats", type=int, default=5, metavar="N", help="measurements, of which the best counts [5]")
    args = parser.parse_args(argv)
    config = from_mapping(LoomConfig, bagel_7b.get_config().model.to_dict())
    if args.smoke:
        config, args.side, args.layers, args.train_layers, args.repeats = smaller(), CONFIG.latent_stride * 4, 2, 1, 1
    rate = matrix_rate(1024 if args.smoke else 8192)
    rows = [train(config, args.train_layers, args)] if args.train_layers else []
    if args.layers:
        decoder = dataclasses.replace(config.decoder, num_layers=args.layers)
        generator = build(dataclasses.replace(config, decoder=decoder), args.attention)
        rows += [sample(generator, args), *(write(generator, count, args) for count in (1, 8))]
    for row in rows:
        row["of_matrix_rate"] = row["tflop_per_second"] and row["tflop_per_second"] * 1e12 / rate
    device = jax.devices()[0].device_kind
    columns = ["work", "seconds", "seconds_median", "tflop", "tflop_per_second", "of_data_sheet", "of_matrix_rate"]
    columns += ["tokens_per_second", "peak_gib"]
    report(args.out, f"{device}, {rate / 1e12:.0f} TFLOP/s in matrix products", rows, columns, matrix_rate=rate)
    return 0
