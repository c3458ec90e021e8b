"""Attention on GPUs: Triton kernels with an online softmax over the blocks in which somebody sees somebody.

Who sees whom is compared by the numbers of `attention_codes`. Each block of queries has a list of the blocks of keys
that it needs: first those in which every query sees every key, which take no mask, then the others. The backward pass
is that of FlashAttention-2 (Dao 2023, algorithm 2), as one kernel for the queries and one for the keys and values.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from loom_jax.document import TokenLayout
from loom_jax.nn.attention import ATTENTION_OUTPUT, auto_attention, dense_attention
from loom_jax.nn.attention_codes import NOBODY, Codes, attention_codes, meeting_blocks

_START, _MASKED = -1e30, -2e30
"""The first peak, and the logit of a forbidden pair: below it, so that its weight is 0 even in an empty row."""

_FEW = 64
"""Fewer queries than this do not fill a block."""

_NARROW, _WIDE = 16, 128
"""Least width of a matrix product, and the greatest head width whose sums fit the registers."""


class Tile(NamedTuple):
    """How a kernel cuts its work: queries and keys of a block (powers of 2), warps, stages of the pipeline of loads."""

    queries: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """One tile for each kernel: the fastest of some on an H200, rows of 1024 x 1024 pictures (docs/performance.md)."""

    forward: Tile = Tile(64, 64, 4, 3)
    dq: Tile = Tile(128, 64, 8, 3)
    dkv: Tile = Tile(64, 128, 8, 3)


TILES = Tiles()


def gpu_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_layout: TokenLayout,
    k_layout: TokenLayout,
    tiles: Tiles = TILES,
    interpret: bool = False,
) -> jax.Array:
    """Computes attention in GPU kernels; few queries, float32 and wide heads go other ways.

    Args:
      interpret: run the kernels in Python on any device, whatever the type, for tests.
    """
    (_, q_len, _, width), k_len = q.shape, k.shape[1]
    if not interpret and q_len < _FEW:
        return dense_attention(q, k, v, q_layout, k_layout)
    if not interpret and (q.dtype not in (jnp.bfloat16, jnp.float16) or width > _WIDE):
        return auto_attention(q, k, v, q_layout, k_layout)
    codes = attention_codes(q_layout, k_layout)
    # Filler sees nobody and is seen by nobody.
    extra_q, extra_k = -q_len % max(t.queries for t in tiles), -k_len % max(t.keys for t in tiles)
    first, last, own = (_fill(a, extra_q, 0, value) for a, value in zip(codes[:3], (0, 0, NOBODY), strict=True))
    code = _fill(codes.code, extra_k, 0, -1)
    extra_width = max(_NARROW, pl.next_power_of_2(width)) - width
    setting = _Setting(tiles, width**-0.5, interpret)
    q = _fill(q, extra_q, extra_width)
    k, v = (_fill(a, extra_k, extra_width) for a in (k, v))
    return _flash(q, k, v, Codes(first, last, own, code), setting)[:, :q_len, :, :width]


def _fill(x: jax.Array, length: int, width: int, value: int = 0) -> jax.Array:
    """Adds tokens to [B, S, ...] and, with 4 axes, numbers to each of them."""
    extra = [(0, 0), (0, length), (0, 0), (0, width)][: x.ndim]
    return jnp.pad(x, extra, constant_values=value) if length or width else x


class _Setting(NamedTuple):
    """Static: tiles, scale of the logits, whether to interpret."""

    tiles: Tiles
    scale: float
    interpret: bool


def _lists(codes: Codes, tile: Tile, by_key: bool = False) -> tuple[jax.Array, jax.Array]:
    """Returns the blocks of keys in the order of use, int32 [B, nq, nk], and how many, [B, nq, 2]: full ones, all.

    With `by_key` the blocks of queries that a block of keys needs, [B, nk, nq] and [B, nk, 2].
    """
    needed = meeting_blocks(codes, tile.queries, tile.keys)
    batch = len(codes.code)
    first, last, own = (a.reshape(batch, -1, 1, tile.queries) for a in codes[:3])
    code = codes.code.reshape(batch, 1, -1, tile.keys)
    low, high = code.min(axis=3), code.max(axis=3)
    full = (first.max(axis=3) <= low) & (high < last.min(axis=3))
    full |= (own.min(axis=3) == low) & (high == own.max(axis=3)) & (low == high)
    kind = jnp.where(full, 0, jnp.where(needed, 1, 2))
    kind = kind.swapaxes(1, 2) if by_key else kind
    counts = jnp.stack([(kind == 0).sum(axis=2), (kind < 2).sum(axis=2)], axis=2)
    return jnp.argsort(kind, axis=2).astype(jnp.int32), counts.astype(jnp.int32)


def _allowed(see: jax.Array | tuple[jax.Array, ...], code: jax.Array, turned: bool = False) -> jax.Array:
    """The rule for a block, bool [q, k]; turned [k, q]."""
    first, last, own = (a[None, :] if turned else a[:, None] for a in see)
    code = code[:, None] if turned else code[None, :]
    return ((code >= first) & (code < last)) | (code == own)


def _exp2(x: jax.Array, setting: _Setting) -> jax.Array:
    """One instruction; without the flush of denormal numbers it takes several."""
    if setting.interpret:
        return jnp.exp2(x)
    (out,) = plt.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return out


def _dot(a: jax.Array, b: jax.Array, transpose_b: bool = False) -> jax.Array:
    contract = ((1,), (1 if transpose_b else 0,))
    return jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)


def _over_blocks(blocks: Any, counts: Any, size: int, step: Callable[..., Any], carry: Any) -> Any:
    """Runs step(place, carry, masked) over the tokens of each block of a list."""
    full, every, last = counts[0], counts[1], blocks.shape[0] - 1

    def run(masked: bool) -> Callable[[Any, Any], Any]:
        def body(n: Any, both: Any) -> Any:
            # The number of the next block is read ahead: loads whose place must be read first are not overlapped.
            number, carry = both
            after = blocks[jnp.minimum(n + 1, last)]
            return after, step(pl.ds(number * size, size), carry, masked)

        return body

    both = jax.lax.fori_loop(0, full, run(False), (blocks[0], carry))
    return jax.lax.fori_loop(full, every, run(True), both)[1]


def _forward_kernel(
    setting: _Setting, q: Any, k: Any, v: Any, see: Any, code: Any, blocks: Any, counts: Any, out: Any, lse: Any
) -> None:
    """One block of queries [q, A] of a head against all keys [N, A]; lse is the base-2 logarithm."""
    scale = setting.scale * math.log2(math.e)
    queries, (rows, width), see = q[...], q.shape, (see[0], see[1], see[2])

    def step(place: Any, carry: tuple[jax.Array, ...], masked: bool) -> tuple[jax.Array, ...]:
        peak, total, sums = carry
        logits = _dot(queries, k[place, :], transpose_b=True)
        if masked:
            logits = jnp.where(_allowed(see, code[place]), logits, _MASKED)
        new_peak = jnp.maximum(peak, logits.max(axis=1))
        weights = _exp2(logits * scale - (new_peak * scale)[:, None], setting)
        shrink = _exp2((peak - new_peak) * scale, setting)
        values = v[place, :]
        sums = sums * shrink[:, None] + _dot(weights.astype(values.dtype), values)
        return new_peak, total * shrink + weights.sum(axis=1), sums

    start = jnp.full(rows, _START, jnp.float32), jnp.zeros(rows, jnp.float32), jnp.zeros((rows, width), jnp.float32)
    peak, total, sums = _over_blocks(blocks, counts, setting.tiles.forward.keys, step, start)
    total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    out[...] = (sums / total[:, None]).astype(out.dtype)
    lse[...] = peak * scale + jnp.log(total) * math.log2(math.e)


def _dq_kernel(
    setting: _Setting, q: Any, k: Any, v: Any, grad: Any, lse: Any, delta: Any, see: Any, code: Any, *refs: Any
) -> None:
    """One block of queries [q, A] of a head against all keys [N, A]."""
    blocks, counts, dq = refs
    scale = setting.scale * math.log2(math.e)
    queries, grads, see = q[...], grad[...], (see[0], see[1], see[2])
    peak, mean = lse[...][:, None], delta[...][:, None]

    def step(place: Any, sums: jax.Array, masked: bool) -> jax.Array:
        keys = k[place, :]
        logits = _dot(queries, keys, transpose_b=True)
        if masked:
            logits = jnp.where(_allowed(see, code[place]), logits, _MASKED)
        weights = _exp2(logits * scale - peak, setting)
        slopes = weights * (_dot(grads, v[place, :], transpose_b=True) - mean)
        return sums + _dot(slopes.astype(keys.dtype), keys)

    sums = _over_blocks(blocks, counts, setting.tiles.dq.keys, step, jnp.zeros(q.shape, jnp.float32))
    dq[...] = (sums * setting.scale).astype(dq.dtype)


def _dkv_kernel(
    setting: _Setting, q: Any, k: Any, v: Any, grad: Any, lse: Any, delta: Any, see: Any, code: Any, *refs: Any
) -> None:
    """One block of keys [k, A] against all queries [Q, A] of a head, keys first: no product turns the weights."""
    blocks, counts, dk, dv = refs
    scale = setting.scale * math.log2(math.e)
    keys, values, codes = k[...], v[...], code[...]

    def step(place: Any, carry: tuple[jax.Array, jax.Array], masked: bool) -> tuple[jax.Array, jax.Array]:
        k_sums, v_sums = carry
        queries, grads = q[place, :], grad[place, :]
        logits = _dot(keys, queries, transpose_b=True)
        if masked:
            sees = see[0, place], see[1, place], see[2, place]
            logits = jnp.where(_allowed(sees, codes, turned=True), logits, _MASKED)
        weights = _exp2(logits * scale - lse[place][None, :], setting)
        v_sums = v_sums + _dot(weights.astype(grads.dtype), grads)
        slopes = weights * (_dot(values, grads, transpose_b=True) - delta[place][None, :])
        return k_sums + _dot(slopes.astype(queries.dtype), queries), v_sums

    zeros = jnp.zeros(k.shape, jnp.float32)
    k_sums, v_sums = _over_blocks(blocks, counts, setting.tiles.dkv.queries, step, (zeros, zeros))
    dk[...] = (k_sums * setting.scale).astype(dk.dtype)
    dv[...] = v_sums.astype(dv.dtype)


def _spec(x: Any, axes: str, size: int | None = None, group: int = 1) -> pl.BlockSpec:
    """The part of an array that the program for block i, head h and row b of the grid sees.

    Args:
      axes: a letter for each: b and i, the row's and the block's own; h, the head's, which `group` heads share; s,
        tokens: the `size` of block i, or all without; a dot, all.
    """
    blocks = {"b": None, "i": None, "h": None, "s": size}

    def place(i: Any, h: Any, b: Any) -> tuple[Any, ...]:
        at = {"b": b, "i": i, "h": h if group == 1 else jax.lax.div(h, group), "s": i if size else 0, ".": 0}
        return tuple(at[axis] for axis in axes)

    own = (
        n if axis == "." or (axis == "s" and not size) else blocks[axis] for axis, n in zip(axes, x.shape, strict=True)
    )
    return pl.BlockSpec(tuple(own), place)


def _call(
    kernel: Callable[..., None],
    name: str,
    setting: _Setting,
    tile: Tile,
    grid: tuple[int, int, int],
    operands: list[tuple[jax.Array, pl.BlockSpec]],
    results: list[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
) -> Any:
    return pl.pallas_call(
        functools.partial(kernel, setting),
        grid=grid,
        in_specs=[spec for _, spec in operands],
        out_specs=[spec for _, spec in results],
        out_shape=[shape for shape, _ in results],
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=setting.interpret,
        name=name,
    )(*(x for x, _ in operands))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q: jax.Array, k: jax.Array, v: jax.Array, codes: Codes, setting: _Setting) -> jax.Array:
    """q [B, Q, H, A], k and v [B, N, K, A] -> [B, Q, H, A]; lengths fill whole blocks, A is a power of 2."""
    return _flash_forward(q, k, v, codes, setting)[0]


def _flash_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, codes: Codes, setting: _Setting
) -> tuple[jax.Array, tuple[Any, ...]]:
    batch, q_len, heads, _ = q.shape
    tile, group = setting.tiles.forward, heads // k.shape[2]
    see, (blocks, counts) = jnp.stack(codes[:3], axis=1), _lists(codes, tile)
    lse_shape = jax.ShapeDtypeStruct((batch, heads, q_len), jnp.float32)
    out, lse = _call(
        _forward_kernel,
        "attention_forward",
        setting,
        tile,
        (q_len // tile.queries, heads, batch),
        [
            (q, _spec(q, "bsh.", tile.queries)),
            *((a, _spec(a, "bsh.", group=group)) for a in (k, v)),
            (see, _spec(see, "b.s", tile.queries)),
            (codes.code, _spec(codes.code, "bs")),
            *((a, _spec(a, "bi.")) for a in (blocks, counts)),
        ],
        [
            (jax.ShapeDtypeStruct(q.shape, q.dtype), _spec(q, "bsh.", tile.queries)),
            (lse_shape, _spec(lse_shape, "bhs", tile.queries)),
        ],
    )
    out, lse = checkpoint_name(out, ATTENTION_OUTPUT), checkpoint_name(lse, ATTENTION_OUTPUT)
    return out, (q, k, v, codes, out, lse)


def _flash_backward(setting: _Setting, saved: tuple[Any, ...], grad: jax.Array) -> tuple[Any, ...]:
    """Each query head has its own gradient of the keys that it shares; they are added up at the end."""
    q, k, v, codes, out, lse = saved
    (batch, q_len, heads, width), (_, k_len, groups, _) = q.shape, k.shape
    delta = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    see, code, group = jnp.stack(codes[:3], axis=1), codes.code, heads // groups

    def operands(tile: Tile, by_key: bool) -> list[tuple[jax.Array, pl.BlockSpec]]:
        queries, keys = (None, tile.keys) if by_key else (tile.queries, None)
        return [
            (q, _spec(q, "bsh.", queries)),
            *((a, _spec(a, "bsh.", keys, group)) for a in (k, v)),
            (grad, _spec(grad, "bsh.", queries)),
            *((a, _spec(a, "bhs", queries)) for a in (lse, delta)),
            (see, _spec(see, "b.s", queries)),
            (code, _spec(code, "bs", keys)),
            *((a, _spec(a, "bi.")) for a in _lists(codes, tile, by_key)),
        ]

    tile = setting.tiles.dq
    result = jax.ShapeDtypeStruct(q.shape, q.dtype), _spec(q, "bsh.", tile.queries)
    grid = q_len // tile.queries, heads, batch
    (dq,) = _call(_dq_kernel, "attention_dq", setting, tile, grid, operands(tile, False), [result])
    tile, part = setting.tiles.dkv, jax.ShapeDtypeStruct((batch, k_len, heads, width), k.dtype)
    result = part, _spec(part, "bsh.", tile.keys)
    grid = k_len // tile.keys, heads, batch
    parts = _call(_dkv_kernel, "attention_dkv", setting, tile, grid, operands(tile, True), [result, result])
    dk, dv = (a.reshape(*k.shape[:3], group, width).astype(jnp.float32).sum(axis=3).astype(k.dtype) for a in parts)
    return dq, dk, dv, None


_flash.defvjp(_flash_forward, _flash_backward)
