"""Training on this machine: does the input pipeline keep up, and what do two streams save?

Run: python benchmarks/training.py [--smoke]
Prints, from one run: batches a second of the input pipeline alone against those that the step can take; and the time of
a step against that of the same step with a dense mask and both experts computed on every token, after a check that the
two agree. The autoencoder, the ViT and the logits are the same in both; the first is timed too.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from loom_jax.commands.train import read_config, read_recipe
from loom_jax.document import PADDING
from loom_jax.models import mot
from loom_jax.nn import dense_attention
from loom_jax.parallel import global_batch
from loom_jax.train import Job, TrainConfig, build_job, draw

RECIPE = Path(__file__).parents[1] / "configs" / "tiny.py"


class BothExperts(mot.MoTLayer):
    """A layer written the plain way: both experts on every token, one of the results thrown away."""

    def __call__(self, streams: Any, ropes: Any, layout: Any, *args: Any, **options: Any) -> Any:
        """As MoTLayer, but for the work it takes."""
        num_und = streams[0].shape[1]
        x = jnp.concatenate(streams, axis=1)
        rope = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *ropes)
        is_gen = jnp.arange(x.shape[1]) >= num_und

        def both(function: Callable[[Any, Any], Any], *values: Any) -> Any:
            results = function(self.und, *values), function(self.gen, *values)
            return jax.tree.map(lambda u, g: jnp.where(is_gen.reshape(-1, *(1,) * (u.ndim - 2)), g, u), *results)

        q, k, v = both(lambda expert, x: expert.project(x, rope), x)
        attended = dense_attention(q, k, v, layout, layout)
        x = x + both(lambda expert, a: expert.o_proj(a), attended)
        x = x + both(lambda expert, x: expert.mlp(expert.post_attention_norm(x)), x)
        return (x[:, :num_und], x[:, num_und:]), mot.KeysValues(k, v)


@contextlib.contextmanager
def layers_of(kind: type[mot.MoTLayer]) -> Iterator[None]:
    """Builds models with another kind of layer."""
    before, mot.MoTLayer = mot.MoTLayer, kind  # type: ignore[misc]
    try:
        yield
    finally:
        mot.MoTLayer = before  # type: ignore[misc]


MODEL = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_layers": 6,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 32,
}


def configure(smoke: bool) -> TrainConfig:
    """The tiny recipe with a wider decoder, longer rows, and so much text to image that both streams are as long."""
    budget = {"und": 1024, "gen": 768, "vit": 640} if smoke else {"und": 2048, "gen": 1536, "vit": 1280}
    recipe = read_recipe(RECIPE)
    longer = budget["gen"] / recipe["data"]["budget"]["gen"]
    canvases = [{**canvas, "count": round(canvas["count"] * longer)} for canvas in recipe["data"]["canvases"]]
    overrides = [f"model.decoder.{name}={value}" for name, value in MODEL.items()]
    overrides += ["model.decoder.num_layers=2"] if smoke else []
    overrides += [f"data.budget={budget}", f"data.canvases={canvases}", "data.rows=1", "data.look_ahead=4.0"]
    return read_config(recipe, [*overrides, "data.mixture.0.weight=16.0", "remat=none"])


def seconds(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median time of each call; they take turns, so that a busy machine slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            if turn:  # the first one compiles
                times[name].append(time.perf_counter() - begin)
    return {name: float(np.median(values)) for name, values in times.items()}


def keep_stepping(job: Job, batch: Any) -> tuple[Callable[[], Any], list[float]]:
    """A call that takes one step with the same batch, and the losses so far."""
    state, losses = job.new_state(), []
    placed = global_batch(batch, job.mesh)

    def call() -> Any:
        nonlocal state
        state, metrics = job.step(state, job.vae_params, placed)
        losses.append(float(metrics.loss))
        return metrics

    return call, losses


def pipeline_rate(job: Job, batches: int) -> tuple[float, Any]:
    """Batches a second of the input pipeline alone, and its last batch."""
    data = job.open_data()
    batch = next(data)
    begin = time.perf_counter()
    for _ in range(batches):
        batch = next(data)
    rate = batches / (time.perf_counter() - begin)
    data.close()
    return rate, batch


def main() -> None:
    """Prints both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="short rows, one repetition")
    smoke = parser.parse_args().smoke
    config = configure(smoke)
    job = build_job(config)
    rate, batch = pipeline_rate(job, 4 if smoke else 20)
    with layers_of(BothExperts):
        plain = build_job(config)
        plain_step, plain_losses = keep_stepping(plain, batch)
        step, losses = keep_stepping(job, batch)
        drawing = jax.jit(lambda vae, batch: draw(job.parts, vae, batch, jnp.int32(0)))
        calls = {"plain": plain_step, "step": step, "draw": lambda: drawing(job.vae_params, batch)}
        took = seconds(calls, 1 if smoke else 5)
    np.testing.assert_allclose(losses, plain_losses, rtol=1e-3)
    layouts = batch.batch.streams.und.document, batch.batch.streams.gen.document
    und, gen = (int((np.asarray(d) != PADDING).sum()) for d in layouts)
    need = 1 / took["step"]
    print(f"device {jax.devices()[0].device_kind}, a batch has {und} und and {gen} gen tokens")
    print(f"input pipeline alone {rate:.2f} batches/s, the step takes {need:.2f}: ratio {rate / need:.1f}")
    print(
        f"step {took['step']:.2f} s, with a dense mask and both experts on every token {took['plain']:.2f} s: ratio "
        f"{took['plain'] / took['step']:.2f}"
    )
    rest = {name: took[name] - took["draw"] for name in ("plain", "step")}
    print(f"  without the autoencoder's {took['draw']:.2f} s: ratio {rest['plain'] / rest['step']:.2f}")


if __name__ == "__main__":
    main()
