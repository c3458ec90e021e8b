"""Each attention backend by length of the packed row, against the dense one: forward, and forward and backward.

    python -m benchmarks attention --lengths 1024 4096 16384 --out attention.json

A row holds documents as training packs them: a text, clean and noisy pictures, half of the tokens noise. The work that
is needed is that of the pairs that may attend to each other; `share` is theirs of all pairs, the least part of the
dense time that a backend could take.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import best_and_median, parser_of, report
from loom_jax.document import (
    PADDING,
    ImageTokens,
    SpecialIds,
    TextTokens,
    TokenLayout,
    lay_out,
    may_attend,
)
from loom_jax.nn import ATTENTION_BACKENDS, Attend, tpu_attention

SPECIAL = SpecialIds(0, 1, 2, 3)
DENSE_MOST = 8192
"""Longest row for which all pairs are computed at once."""


def row_of(length: int) -> TokenLayout:
    """Returns a row [1, S] of documents with a text of 100 tokens, a clean picture and two noisy ones of 16 x 16."""
    documents: list[TokenLayout] = []
    picture = {role: ImageTokens(role, (16, 16)) for role in ("clean", "noisy")}
    one = lay_out([TextTokens((0,) * 98), picture["clean"], picture["noisy"], picture["noisy"]], SPECIAL).tokens
    for number in range(length // len(one.order)):
        documents.append(one._replace(document=one.document + number))
    joined = TokenLayout(*(np.concatenate(parts) for parts in zip(*documents, strict=True)))
    extra = length - len(joined.order)
    filled = TokenLayout(*(np.pad(a, (0, extra)) for a in joined))
    document = np.where(np.arange(length) < length - extra, filled.document, PADDING)
    shuffled = np.random.default_rng(0).permutation(length)  # the two streams tear documents apart
    return TokenLayout(*(a[shuffled][None] for a in filled._replace(document=document)))


def cudnn_attention(q: Any, k: Any, v: Any, q_layout: TokenLayout, k_layout: TokenLayout) -> jax.Array:
    """cuDNN's fused attention with a mask of all pairs, for GPUs: a candidate that no backend is made of yet."""
    mask = may_attend(q_layout, k_layout)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")


def candidates(platform: str) -> dict[str, Attend]:
    """Returns the backends that a platform runs as they are meant to be run, and what might become one."""
    found = {name: attend for name, attend in ATTENTION_BACKENDS.items() if name not in ("auto", "tpu")}
    extra: dict[str, dict[str, Attend]] = {"tpu": {"tpu": tpu_attention}, "gpu": {"cudnn": cudnn_attention}}
    return found | extra.get(platform, {})


def measure(length: int, heads: tuple[int, int, int], repeats: int) -> list[dict[str, Any]]:
    """Returns one row of figures for each backend."""
    layout, (num_heads, num_kv_heads, width) = row_of(length), heads
    rng = np.random.default_rng(1)
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    shapes = [(1, length, count, width) for count in (num_heads, num_kv_heads, num_kv_heads)]
    q, k, v = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    chosen = candidates(jax.default_backend())
    names = [name for name in chosen if name != "dense" or length <= DENSE_MOST]
    calls = {}
    for name in names:
        attend = chosen[name]
        forward = jax.jit(lambda q, k, v, attend=attend: attend(q, k, v, layout, layout))
        loss = lambda q, k, v, run=forward: (run(q, k, v).astype(jnp.float32) ** 2).sum()  # noqa: E731
        backward = jax.jit(jax.grad(loss, (0, 1, 2)))
        calls[name, "forward"] = lambda run=forward: run(q, k, v)
        calls[name, "gradient"] = lambda run=backward: run(q, k, v)
    took = best_and_median({f"{name} {kind}": call for (name, kind), call in calls.items()}, repeats)
    one = TokenLayout(*(a[0] for a in layout))
    share = float(np.mean(may_attend(one, one))) if length <= DENSE_MOST else None
    rows = []
    for name in names:
        seconds = {kind: took[f"{name} {kind}"][0] for kind in ("forward", "gradient")}
        dense = {kind: took.get(f"dense {kind}", (None,))[0] for kind in seconds}
        speed = {f"{kind}_over_dense": dense[kind] and dense[kind] / seconds[kind] for kind in seconds}
        rows.append({"length": length, "backend": name, **seconds, **speed, "share": share})
    return rows


def main(argv: list[str]) -> int:
    """Runs the benchmark."""
    parser = parser_of("attention", __doc__)
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192], metavar="N", help="[1024 2048 4096 8192]")
    add("--heads", type=int, nargs=3, default=[8, 4, 32], metavar="N", help="heads, key heads, width [8 4 32]")
    add("--repeats", type=int, default=5, metavar="N", help="measurements, of which the best counts [5]")
    args = parser.parse_args(argv)
    lengths, repeats = ([1024], 1) if args.smoke else (args.lengths, args.repeats)
    rows = [row for length in lengths for row in measure(length, tuple(args.heads), repeats)]
    report(args.out, f"attention, {args.heads} heads, seconds, {jax.devices()[0].device_kind}", rows)
    return 0
