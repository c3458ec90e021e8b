"""Training on this machine: does the input pipeline keep up, and what do two streams save?

    python -m benchmarks training

From one run: batches a second of the input pipeline alone against those that the step can take; and the time of
a step against that of the same step with a dense mask and both experts computed on every token, after a check that the
two agree. The autoencoder, the ViT and the logits are the same in both; the first is timed too.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import best_and_median, parser_of, report
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


def main(argv: list[str]) -> int:
    """Runs both comparisons."""
    args = parser_of("training", __doc__).parse_args(argv)
    config = configure(args.smoke)
    job = build_job(config)
    rate, batch = pipeline_rate(job, 4 if args.smoke else 20)
    with layers_of(BothExperts):
        plain = build_job(config)
        plain_step, plain_losses = keep_stepping(plain, batch)
        step, losses = keep_stepping(job, batch)
        drawing = jax.jit(lambda vae, batch: draw(job.parts, vae, batch, jnp.int32(0)))
        calls = {"plain": plain_step, "step": step, "draw": lambda: drawing(job.vae_params, batch)}
        took = {name: median for name, (_, median) in best_and_median(calls, 1 if args.smoke else 5).items()}
    np.testing.assert_allclose(losses, plain_losses, rtol=1e-3)
    layouts = batch.batch.streams.und.document, batch.batch.streams.gen.document
    und, gen = (int((np.asarray(d) != PADDING).sum()) for d in layouts)
    rows = [
        {"what": "step", "seconds": took["step"], "over_step": 1.0},
        {"what": "dense mask, both experts on every token", "seconds": took["plain"]},
        {"what": "both without the autoencoder", "seconds": took["step"] - took["draw"]},
        {"what": "input pipeline alone, one batch", "seconds": 1 / rate},
    ]
    rows[1]["over_step"] = took["plain"] / took["step"]
    rows[2]["over_step"] = (took["plain"] - took["draw"]) / (took["step"] - took["draw"])
    rows[3]["over_step"] = 1 / rate / took["step"]
    title = f"a batch has {und} und and {gen} gen tokens, {jax.devices()[0].device_kind}"
    report(args.out, title, rows, columns=["what", "seconds", "over_step"])
    return 0
