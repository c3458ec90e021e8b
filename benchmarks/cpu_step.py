"""A training step and a guided picture on this CPU in float32, beside the PyTorch original doing the same work.

    python -m benchmarks cpu_step --peer BAGEL_CHECKOUT --peer-python VENV/bin/python --out cpu_step.json

Training: one row of 1,488 tokens: a 256 x 256 picture from a text, an edit (clean, ViT 224 and noisy picture), and a
question about a picture; latents are given; forward, backward, clipping, AdamW, moving average. Sampling: one picture
of 256 x 256, 7 evaluations of 2 guidance branches after a prompt that was read before. 12.1 million parameters.

Prints for each the best and the median time, the floor (the floating point operations of all matrix products, over the
rate of such products in this process), and with `--peer` what the original takes in a process of its own, on the same
weights, documents and draws: losses and latents of both must agree. Its steps alternate with ours, so that whatever
else runs on the machine hits both. It is run as published but for float32 and flash attention, which a CPU lacks.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import parser_of, report
from loom_jax import api
from loom_jax.converters.synthetic import write_synthetic_release
from loom_jax.core import AutoencoderConfig, DecoderConfig, LoomConfig, SiglipConfig, from_mapping, to_mapping
from loom_jax.data import Batch, Budget, Packable, Tables, TrainBatch, pack, total_need
from loom_jax.document import NO_TOKEN, EncodedSegment, ImageTokens, SpecialIds, TextTokens, lay_out, may_attend
from loom_jax.generate import Query, Reader
from loom_jax.train import TrainConfig, build_job, draw

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "tests" / "assets" / "bagel_tiny"
PEER = Path(__file__).with_name("cpu_step_peer.py")
CONFIG = LoomConfig(
    decoder=DecoderConfig(2048, 256, 704, 6, 8, 4, 32),
    vit=SiglipConfig(192, 768, 4, 6, 14, 256),
    vae=AutoencoderConfig(32, (1, 2, 4, 4), 1, 16, 1.0, 0.0),
    max_latent_size=16,
    vit_max_num_patch_per_side=16,
    latent_patch_size=2,
)
SIDE, TEXTS = 256, (40, 48, 30, 80)
"""Side of the pictures in pixels; tokens of the four texts, marks included."""
SETTINGS = api.ImageSettings(num_timesteps=8, cfg_interval=(0.0, 1.0), cfg_img_scale=1.0)
PAUSE = 0.5
"""Seconds before each measurement: threads that have just finished still spin, and take a core from the other."""
AGREE = 2e-4
"""How far losses and latents of the original may be from ours, over the rms of ours."""


def smaller() -> LoomConfig:
    """The model of a smoke run: two layers, narrow."""
    decoder = dataclasses.replace(CONFIG.decoder, hidden_size=64, intermediate_size=96, num_layers=2, head_dim=8)
    vit = dataclasses.replace(CONFIG.vit, hidden_size=48, intermediate_size=64, num_layers=2)
    return dataclasses.replace(CONFIG, decoder=decoder, vit=vit)


def documents(config: LoomConfig, special: SpecialIds, pixels: int = SIDE) -> list[Packable]:
    """The three documents of the training step, with pictures of some pixels a side."""
    rng = np.random.default_rng(0)
    side = pixels // config.latent_stride

    def text(length: int, loss: bool = False) -> TextTokens:
        return TextTokens(tuple(rng.integers(0, 250, length - 2).tolist()), loss)

    def vit() -> ImageTokens:
        shape = side * config.vit.patch_size, side * config.vit.patch_size, 3
        return ImageTokens("vit", (side, side), rng.standard_normal(shape).astype(np.float32))

    clean, noisy = (ImageTokens(role, (side, side)) for role in ("clean", "noisy"))
    lengths = iter(TEXTS)
    lists: list[list[EncodedSegment]] = [
        [text(next(lengths)), noisy],
        [clean, vit(), text(next(lengths)), noisy],
        [vit(), text(next(lengths)), text(next(lengths), loss=True)],
    ]
    return [Packable(segments, lay_out(segments, special)) for segments in lists]


def with_moments(batch: Batch, latent_dim: int) -> TrainBatch:
    """Returns a batch whose latents are drawn, so that no autoencoder has to run."""
    shape = batch.latents.cell.shape
    moments = np.random.default_rng(1).standard_normal((*shape, 2 * latent_dim)).astype(np.float32)
    moments[..., latent_dim:] -= 4.0
    return TrainBatch(batch, (), np.zeros(shape, np.int32), moments)


def training_config(config: LoomConfig, folder: Path, budget: Budget) -> TrainConfig:
    """The training job; its own data are never opened."""
    return from_mapping(
        TrainConfig,
        {
            "model": to_mapping(config),
            "data": {
                "mixture": [{"name": "t2i", "source": "synthetic", "recipe": "t2i"}],
                "rows": 1,
                "budget": dataclasses.asdict(budget),
                "canvases": [{"height": SIDE, "width": SIDE, "count": 1}],
            },
            "total_steps": 1000,
            "optimizer": {"learning_rate": 1e-5, "warmup_steps": 0},
            "frozen": [],
            "remat": "dots",
            "init_from": str(folder),
        },
    )


class Ours:
    """What is measured, with this framework. Writes into `exchange` what the original needs to do the same."""

    def __init__(self, folder: Path, exchange: Path):
        generator = api.load(folder)
        config, special = generator.config, generator.encoder.special
        row = documents(config, special)
        need = total_need(row)
        batch = pack([row], need, Tables.of(config))
        job = build_job(training_config(config, folder, need))
        self._job, self._state = job, job.new_state()
        self._batch = jax.device_put(with_moments(batch, config.latent_dim))
        draws = jax.jit(lambda vae, batch: draw(job.parts, vae, batch, jnp.int32(0)))(job.vae_params, self._batch)
        write_documents(exchange / "train.npz", row, jax.tree.map(lambda a: np.asarray(a)[0], draws._asdict()))
        self._sampler = Sampler(generator, exchange / "sample.npz")
        self.flops = matrix_flops(config, row, self._sampler.lengths)

    def train(self) -> float:
        """Takes a step; returns its loss."""
        self._state, metrics = self._job.step(self._state, self._job.vae_params, self._batch)
        return float(metrics.loss)

    def sample(self) -> np.ndarray:
        """Returns the latent tokens of a picture."""
        return self._sampler.sample()


class Sampler:
    """Guided pictures after a prompt that was read beforehand."""

    def __init__(self, reader: Reader, file: Path):
        rng = np.random.default_rng(2)
        prompt = TextTokens(tuple(rng.integers(0, 250, TEXTS[0] - 2).tolist()))
        self._reader, self._query = reader, Query((SIDE, SIDE), seed=0, after_pictures=False)
        self._read = reader.read([[prompt], []], [(), ()])
        side, special = SIDE // reader.config.latent_stride, reader.encoder.special
        self.lengths = TEXTS[0], side * side + 2
        np.savez(
            file,
            prompt=[special.bos, *prompt.ids, special.eos],
            marks=[special.start_of_image, special.end_of_image],
            noise=reader.noise.initial(0, 0, side * side, reader.config.latent_dim),
            **{k: getattr(SETTINGS, k) for k in ("num_timesteps", "timestep_shift", "cfg_text_scale")},
        )

    def sample(self) -> np.ndarray:
        """Denoises once."""
        ((_, [latents]),) = self._reader.denoise(self._read, [self._query], SETTINGS, branches=2)
        return latents


def write_documents(file: Path, row: list[Packable], draws: dict[str, np.ndarray]) -> None:
    """Writes documents as the original wants them: one packed sequence, its order that of the documents."""
    layouts = [document.layout for document in row]
    vit = [image.pixels for document in row for image in document.images("vit")]
    joined = {
        name: np.concatenate([getattr(layout, name) for layout in layouts])
        for name in ("token_ids", "is_gen", "labels", "cell", "split_lengths", "split_modes")
    }
    np.savez(
        file,
        **joined,
        **draws,
        position=np.concatenate([layout.tokens.position for layout in layouts]),
        document_lengths=[len(layout) for layout in layouts],
        splits=[len(layout.split_lengths) for layout in layouts],
        pixels=np.stack(vit),
        no_token=NO_TOKEN,
    )


def matrix_flops(config: LoomConfig, row: list[Packable], sampled: tuple[int, int]) -> dict[str, float]:
    """Floating point operations of the matrix products: of attention, those of pairs that may attend to each other.

    The backward pass of a product takes two products; that of attention forms its logits once more.
    """
    decoder, vit = config.decoder, config.vit
    heads = decoder.head_dim * (decoder.num_heads + decoder.num_kv_heads)
    layer = decoder.hidden_size * (2 * heads + 3 * decoder.intermediate_size)
    pair = 2 * decoder.head_dim * decoder.num_heads
    tokens = sum(len(document.layout) for document in row)
    need = total_need(row)
    attended = sum(may_attend(d.layout.tokens, d.layout.tokens).sum() for d in row)
    images = [image.grid[0] * image.grid[1] for document in row for image in document.images("vit")]
    vit_layer = vit.hidden_size * (4 * vit.hidden_size + 2 * vit.intermediate_size)
    width, latent = decoder.hidden_size, config.latent_dim
    connector = vit.patch_dim * vit.hidden_size + width * (vit.hidden_size + width)
    products = (
        tokens * decoder.num_layers * layer
        + need.vit * (vit.num_layers * vit_layer + connector)
        + need.und * width * decoder.vocab_size
        + 2 * need.gen * width * latent
    )
    pairs = decoder.num_layers * attended * pair + vit.num_layers * sum(n * n for n in images) * 2 * vit.hidden_size
    prompt, queries = sampled
    evaluations = SETTINGS.num_timesteps - 1
    one = queries * (decoder.num_layers * layer + 2 * width * latent) * 2
    seen = decoder.num_layers * pair * queries * (prompt + 2 * queries)
    return {"train": 2.0 * (3 * products + 3.5 * pairs), "sample": 2.0 * evaluations * (one + seen)}


def matrix_rate(seconds: float) -> float:
    """The highest rate, FLOP/s, of products of the sizes at hand that this process reached within `seconds`."""
    rng = np.random.default_rng(0)
    sizes = [(768, 256, 704), (768, 704, 256)]
    arrays = [tuple(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((8, m, k), (k, n))) for m, k, n in sizes]
    run = jax.jit(lambda arrays: [[row @ b for row in a] for a, b in arrays])
    jax.block_until_ready(run(arrays))
    flops, best, end = 8 * sum(2 * m * k * n for m, k, n in sizes), math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        jax.block_until_ready(run(arrays))
        best = min(best, time.perf_counter() - begin)
    return flops / best


class Peer:
    """The original in a process of its own, told by lines what to do; it answers with seconds and a result."""

    def __init__(self, checkout: Path, python: str, release: Path, exchange: Path):
        command = [python, str(PEER), str(checkout), str(release), str(exchange)]
        threads = {"OMP_NUM_THREADS": str(os.cpu_count()), "MKL_NUM_THREADS": str(os.cpu_count())}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **threads}
        )

    def ask(self, what: str) -> dict[str, Any]:
        """Does `what`, train or sample, once."""
        assert self._process.stdin and self._process.stdout
        print(what, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the process of the original ended; see its messages above")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def timed(function: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Returns the wall and the processor seconds of a call, and its result."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}, result


def check_agreement(what: str, ours: Any, theirs: Any) -> float:
    """Returns how far the original's result is from ours, over the rms of ours."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    difference = float(np.abs(ours - theirs).max() / np.sqrt(np.mean(ours**2)))
    if not difference < AGREE:
        raise SystemExit(f"{what}: the original's result differs by {difference:.1e} of its rms: not the same work")
    return difference


def measure(ours: Ours, peer: Peer | None, repeats: int) -> list[dict[str, Any]]:
    """Returns one row of figures for each kind of work."""
    rows: list[dict[str, Any]] = []
    rate = matrix_rate(1.0)
    for name, run in (("train", ours.train), ("sample", ours.sample)):
        times: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
        compiling, first = timed(run)
        agreement = None if peer is None else check_agreement(name, first, peer.ask(name)["result"])
        for _ in range(repeats):
            time.sleep(PAUSE)
            times["ours"].append(timed(run)[0])
            if peer is not None:
                time.sleep(PAUSE)
                times["peer"].append(peer.ask(name))
        rate = max(rate, matrix_rate(1.0))
        row: dict[str, Any] = {"work": name, "first_call": compiling["seconds"], "difference": agreement}
        for who, found in times.items():
            for key in ("seconds", "cpu") if found else ():
                values = [one[key] for one in found]
                row |= {f"{who}_{key}": min(values), f"{who}_{key}_median": float(np.median(values))}
        if peer is not None:
            ratios = [b["seconds"] / a["seconds"] for a, b in zip(times["ours"], times["peer"], strict=True)]
            row |= {"ratio": row["peer_seconds"] / row["ours_seconds"], "ratio_median": float(np.median(ratios))}
        rows.append(row)
    for row in rows:
        row |= {"gflop": ours.flops[row["work"]] / 1e9, "floor": ours.flops[row["work"]] / rate, "gflops": rate / 1e9}
    return rows


def main(argv: list[str]) -> int:
    """Runs the benchmark."""
    parser = parser_of("cpu_step", __doc__)
    add = parser.add_argument
    add("--peer", type=Path, metavar="FOLDER", help="a checkout of ByteDance-Seed/Bagel")
    add("--peer-python", default=sys.executable, metavar="FILE", help="an interpreter that has PyTorch")
    add("--repeats", type=int, default=15, metavar="N", help="alternating repeats [15]")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        exchange = Path(name)
        release, folder = exchange / "release", exchange / "converted"
        write_synthetic_release(
            release,
            smaller() if args.smoke else CONFIG,
            dtype=lambda key: np.dtype(np.float32),
            tokenizer=TOKENIZER,
        )
        api.convert(release, folder)
        ours = Ours(folder, exchange)
        peer = Peer(args.peer, args.peer_python, release, exchange) if args.peer else None
        rows = measure(ours, peer, 1 if args.smoke else args.repeats)
        if peer is not None:
            peer.close()
    columns = ["work", "gflop", "floor", "ours_seconds", "ours_seconds_median", "ours_cpu_median"]
    columns += ["peer_seconds", "peer_seconds_median", "peer_cpu_median", "ratio", "ratio_median"] if peer else []
    title = f"float32, {os.cpu_count()} threads, {rows[0]['gflops']:.0f} GFLOP/s in matrix products"
    report(args.out, title, rows, columns)
    return 0
