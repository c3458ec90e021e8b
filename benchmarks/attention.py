"""Each attention backend by length of the packed row, against the dense one: forward, and forward and backward.

    python -m benchmarks attention --lengths 1024 4096 16384 --out attention.json
    python -m benchmarks attention --heads 28 4 128 --lengths 24788 --cells 64 --backends gpu --tiles

A row holds documents as training packs them: a text, clean and noisy pictures, half of the tokens noise, the tokens of
the und stream before those of the gen stream. The work that is needed is that of the pairs that may attend to each
other; `share` is theirs of all pairs, the least part of the dense time that a backend could take. --picture adds what
sampling computes: the 4,098 tokens of a noisy picture, which see themselves and a text of 60 tokens. --tiles adds the
GPU kernels with other tiles. A candidate that fails has its error in its row.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import best_and_median, parser_of, report
from loom_jax.core import InputError
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
from loom_jax.nn.gpu_attention import TILES, Tile, gpu_attention

SPECIAL = SpecialIds(0, 1, 2, 3)
DENSE_MOST = 8192
"""Longest row for which all pairs are computed at once."""

FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, ImportError, ExceptionGroup)
"""What a candidate that does not suit the device or its libraries raises: the others are measured all the same."""

VARIANTS = {
    "forward": ((64, 64, 4, 2), (64, 64, 4, 4), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3), (64, 128, 4, 3)),
    "dq": ((128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 4, 3), (128, 128, 8, 2)),
    "dkv": ((64, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (32, 128, 8, 3), (128, 64, 8, 2)),
}
"""Other tiles of the GPU kernels: queries, keys, warps, stages."""


class Case(NamedTuple):
    """What is measured: layouts [1, Q] and [1, N]."""

    work: str
    q_layout: TokenLayout
    k_layout: TokenLayout
    kinds: Sequence[str] = ("forward", "gradient")


def row_of(length: int, side: int) -> Case:
    """Returns a row of documents with a text of 100 tokens, a clean picture and two noisy ones of side x side cells."""
    picture = {role: ImageTokens(role, (side, side)) for role in ("clean", "noisy")}
    one = lay_out([TextTokens((0,) * 98), picture["clean"], picture["noisy"], picture["noisy"]], SPECIAL)
    count = length // len(one.is_gen)
    if count == 0:
        raise InputError(f"--lengths {length} with --cells {side}: a document alone has {len(one.is_gen)} tokens")
    documents = [one.tokens._replace(document=one.tokens.document + number) for number in range(count)]
    streams = np.argsort(np.tile(one.is_gen, count), kind="stable")
    joined = TokenLayout(*(np.concatenate(parts)[streams] for parts in zip(*documents, strict=True)))
    extra = length - len(joined.order)
    filled = TokenLayout(*(np.pad(a, (0, extra)) for a in joined))
    document = np.where(np.arange(length) < length - extra, filled.document, PADDING)
    layout = TokenLayout(*(a[None] for a in filled._replace(document=document)))
    return Case(f"row of {length}", layout, layout)


def picture_of(side: int, prompt: int = 60) -> Case:
    """Returns what a step of sampling computes: a noisy picture of side x side cells after a text."""
    tokens = lay_out([TextTokens((0,) * (prompt - 2)), ImageTokens("noisy", (side, side))], SPECIAL).tokens
    layout = TokenLayout(*(a[None] for a in tokens))
    queries = TokenLayout(*(a[:, prompt:] for a in layout))
    return Case(f"picture of {queries.order.size} tokens", queries, layout, ("forward",))


def _even(x: Any, axis: int) -> jax.Array:
    """Fills an axis up to a multiple of 64: cuDNN takes masks of even lengths alone in training."""
    extra = [(0, 0)] * x.ndim
    extra[axis] = (0, -x.shape[axis] % 64)
    return jnp.pad(x, extra)


def cudnn_attention(q: Any, k: Any, v: Any, q_layout: TokenLayout, k_layout: TokenLayout) -> jax.Array:
    """cuDNN's fused attention with a mask of all pairs, for GPUs: a candidate that no backend is made of yet."""
    mask = _even(_even(may_attend(q_layout, k_layout), 1), 2)[:, None]
    q_len, (q, k, v) = q.shape[1], (_even(a, 1) for a in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")[:, :q_len]


def tokamax_attention(
    q: Any, k: Any, v: Any, q_layout: TokenLayout, k_layout: TokenLayout, implementation: str
) -> jax.Array:
    """tokamax's kernels with a mask of all pairs, as cuDNN's."""
    tokamax = importlib.import_module("tokamax")
    mask = may_attend(q_layout, k_layout)[:, None]
    return tokamax.dot_product_attention(q, k, v, mask=mask, implementation=implementation)


def candidates(platform: str, tiles: bool = False) -> dict[str, Attend]:
    """Returns the backends that a platform runs as they are meant to be run, and what might become one.

    Args:
      tiles: add the GPU kernels with other tiles.
    """
    found = {name: attend for name, attend in ATTENTION_BACKENDS.items() if name not in ("auto", "gpu", "tpu")}
    gpu: dict[str, Attend] = {"gpu": gpu_attention, "cudnn": cudnn_attention}
    if importlib.util.find_spec("tokamax"):
        for name in ("mosaic", "triton"):
            gpu[f"tokamax {name}"] = functools.partial(tokamax_attention, implementation=name)
    if tiles:
        for kernel, variants in VARIANTS.items():
            for variant in variants:
                changed = TILES._replace(**{kernel: Tile(*variant)})
                gpu[f"gpu {kernel} {variant}"] = functools.partial(gpu_attention, tiles=changed)
    extra: dict[str, dict[str, Attend]] = {"tpu": {"tpu": tpu_attention}, "gpu": gpu}
    return found | extra.get(platform, {})


def _calls(attend: Attend, case: Case, operands: tuple[jax.Array, ...]) -> dict[str, Callable[[], Any]]:
    """Compiled calls by kind. Layouts are arguments: as constants they would be worked on while compiling."""
    layouts = jax.device_put((case.q_layout, case.k_layout))
    forward = jax.jit(attend)

    def loss(q: Any, k: Any, v: Any, q_layout: TokenLayout, k_layout: TokenLayout) -> jax.Array:
        return (attend(q, k, v, q_layout, k_layout).astype(jnp.float32) ** 2).sum()

    backward = jax.jit(jax.grad(loss, (0, 1, 2)))
    runs = {"forward": forward, "gradient": backward}
    return {kind: functools.partial(runs[kind], *operands, *layouts) for kind in case.kinds}


def _failure(call: Callable[[], Any]) -> str | None:
    """Runs a call once; returns what it raised, in short."""
    try:
        jax.block_until_ready(call())
    except FAILURES as e:
        return f"{type(e).__name__}: {e}"[:300]
    return None


def measure(case: Case, heads: tuple[int, int, int], repeats: int, chosen: dict[str, Attend]) -> list[dict[str, Any]]:
    """Returns one row of figures for each backend."""
    num_heads, num_kv_heads, width = heads
    rng = np.random.default_rng(1)
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    q_len, k_len = case.q_layout.order.size, case.k_layout.order.size
    shapes = (1, q_len, num_heads, width), *((1, k_len, num_kv_heads, width),) * 2
    operands = tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    names = [name for name in chosen if name != "dense" or k_len <= DENSE_MOST]
    calls = {(name, kind): call for name in names for kind, call in _calls(chosen[name], case, operands).items()}
    errors = {key: _failure(call) for key, call in calls.items()}
    sound = {" ".join(key): call for key, call in calls.items() if errors[key] is None}
    took = best_and_median(sound, repeats)
    q_one, k_one = (TokenLayout(*(a[0] for a in layout)) for layout in case[1:3])
    share = float(np.mean(may_attend(q_one, k_one))) if k_len <= DENSE_MOST else None
    rows = []
    for name in names:
        seconds = {kind: took.get(f"{name} {kind}", (None,))[0] for kind in ("forward", "gradient")}
        dense = {kind: took.get(f"dense {kind}", (None,))[0] for kind in seconds}
        speed = {f"{kind}_over_dense": _over(dense[kind], seconds[kind]) for kind in seconds}
        error = "; ".join(f"{kind}: {errors[name, kind]}" for kind in case.kinds if errors[name, kind]) or None
        rows.append({"work": case.work, "backend": name, **seconds, **speed, "share": share, "error": error})
    return rows


def _over(dense: float | None, seconds: float | None) -> float | None:
    return dense / seconds if dense and seconds else None


def main(argv: list[str]) -> int:
    """Runs the benchmark."""
    parser = parser_of("attention", __doc__)
    add = parser.add_argument
    add("--lengths", type=int, nargs="*", default=[1024, 2048, 4096, 8192], metavar="N", help="[1024 2048 4096 8192]")
    add("--cells", type=int, default=16, metavar="N", help="of a side of the pictures in rows; 64: 1024 pixels [16]")
    add("--heads", type=int, nargs=3, default=[8, 4, 32], metavar="N", help="heads, key heads, width [8 4 32]")
    add("--repeats", type=int, default=5, metavar="N", help="measurements, of which the best counts [5]")
    add("--picture", action="store_true", help="also a picture of 64 x 64 cells as sampling computes it")
    add("--backends", nargs="+", metavar="NAME", help="only those whose names begin so [all]")
    add("--tiles", action="store_true", help="also the GPU kernels with other tiles")
    args = parser.parse_args(argv)
    if args.smoke:
        args.lengths, args.repeats = [1024], 1
    side = 8 if args.smoke else 64
    cases = [row_of(length, args.cells) for length in args.lengths]
    cases += [picture_of(side)] if args.picture or args.smoke else []
    chosen = candidates(jax.default_backend(), args.tiles)
    if args.backends:
        chosen = {name: attend for name, attend in chosen.items() if name.startswith(tuple(args.backends))}
    rows = [row for case in cases for row in measure(case, tuple(args.heads), args.repeats, chosen)]
    report(args.out, f"attention, {args.heads} heads, seconds, {jax.devices()[0].device_kind}", rows)
    return 0
