"""Attention on TPUs: a Pallas kernel with an online softmax that skips the blocks in which nobody sees anybody.

Who sees whom is compared by the numbers of `attention_codes`.

All query heads of one key head are worked on together: they share the keys, the values and the mask. The backward pass
is that of FlashAttention-2 (Dao 2023, algorithm 2), as one kernel for the queries and one for the keys and values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from loom_jax.document import TokenLayout
from loom_jax.nn.attention import ATTENTION_OUTPUT, dense_attention
from loom_jax.nn.attention_codes import NOBODY, Codes, attention_codes, meeting_blocks

LANES = 128
"""Width of a TPU's vector registers: head widths and blocks are multiples of it."""

_START, _MASKED = -1e30, -2e30
"""The first peak, and the logit of a forbidden pair: below it, so that its weight is 0 even in an empty row."""

_VMEM_BYTES = 48 * 2**20


def tpu_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_layout: TokenLayout,
    k_layout: TokenLayout,
    block_size: int = 512,
    interpret: bool = False,
) -> jax.Array:
    """Computes attention in a TPU kernel; few queries, as when text is written, go the dense way.

    Args:
      block_size: queries and keys of a block, a multiple of 128.
      interpret: run the kernel in Python on any device, for tests.
    """
    if q.shape[1] < LANES and not interpret:
        return dense_attention(q, k, v, q_layout, k_layout)
    batch, q_len, heads, width = q.shape
    groups = k.shape[2]
    codes = attention_codes(q_layout, k_layout)
    sizes = min(block_size, _up(q_len)), min(block_size, _up(k.shape[1]))
    # [B, S, K, R, A] -> [B, K, R, S, A], and keys [B, K, N, A]; filler sees nobody and is seen by nobody.
    wide = _fill(q.reshape(batch, q_len, groups, -1, width), sizes[0], 1).transpose(0, 2, 3, 1, 4)
    keys, values = (_fill(a, sizes[1], 1).transpose(0, 2, 1, 3) for a in (k, v))
    wide, keys, values = (_fill(a, LANES, -1) for a in (wide, keys, values))
    first, last, own = (_fill(a, sizes[0], 1, fill) for a, fill in zip(codes[:3], (0, 0, NOBODY), strict=True))
    code = _fill(codes.code, sizes[1], 1, -1)
    setting = _Setting(*sizes, width**-0.5, interpret)
    out = _flash(wide, keys, values, Codes(first, last, own, code), setting)
    return out.transpose(0, 3, 1, 2, 4)[:, :q_len, ..., :width].reshape(q.shape)


def _up(length: int) -> int:
    return -(-length // LANES) * LANES


def _fill(x: jax.Array, multiple: int, axis: int, value: int = 0) -> jax.Array:
    """Fills an axis up to a multiple."""
    extra = -x.shape[axis] % multiple
    if not extra:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, extra)
    return jnp.pad(x, widths, constant_values=value)


class _Setting(NamedTuple):
    """Static: queries and keys of a block, scale of the logits, whether to interpret."""

    q_block: int
    k_block: int
    scale: float
    interpret: bool


def _fetches(codes: Codes, setting: _Setting) -> tuple[jax.Array, jax.Array]:
    """Returns which block to hold at each step, flat int32: [B, nq, nk] of keys, and [B, nk, nq] of queries.

    A step whose own number is not the one to hold has nothing to do, and nothing is fetched for it.
    """
    needed = meeting_blocks(codes, setting.q_block, setting.k_block)

    def held(needed: jax.Array) -> jax.Array:
        numbers = jnp.arange(needed.shape[2])
        before = jax.lax.cummax(jnp.where(needed, numbers, -1), axis=2)
        next_one = jnp.argmax(needed, axis=2, keepdims=True)
        return jnp.where(before < 0, next_one, before).astype(jnp.int32).reshape(-1)

    return held(needed), held(needed.swapaxes(1, 2))


def _bias(first: Any, last: Any, own: Any, code: Any) -> jax.Array:
    """0 for pairs that the rule allows, else _MASKED: float32 of the shape that its arguments make together."""
    return jnp.where(((code >= first) & (code < last)) | (code == own), 0.0, _MASKED)


def _dot(a: jax.Array, b: jax.Array, transpose_b: bool = False) -> jax.Array:
    contract = ((1,), (1 if transpose_b else 0,))
    return jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)


def _forward_kernel(
    setting: _Setting, steps: int, fetch: Any, q: Any, k: Any, v: Any, see: Any, code: Any, *refs: Any
) -> None:
    """One block of queries [R, q, A] and one of keys; the last grid axis runs over the keys."""
    out, lse, peaks, totals, sums = refs
    step = pl.program_id(3)
    place = (pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)) * steps + step

    @pl.when(step == 0)
    def _() -> None:
        peaks[...] = jnp.full_like(peaks, _START)
        totals[...] = jnp.zeros_like(totals)
        sums[...] = jnp.zeros_like(sums)

    @pl.when(fetch[place] == step)
    def _() -> None:
        bias = _bias(see[0, :, 0:1], see[0, :, 1:2], see[0, :, 2:3], code[0])
        for r in range(q.shape[2]):
            logits = _dot(q[0, 0, r], k[0, 0], transpose_b=True) * setting.scale + bias
            peak = peaks[r][:, :1]
            new_peak = jnp.maximum(peak, logits.max(axis=1, keepdims=True))
            weights = jnp.exp(logits - new_peak)
            shrink = jnp.exp(peak - new_peak)
            total = totals[r][:, :1] * shrink + weights.sum(axis=1, keepdims=True)
            peaks[r] = jnp.broadcast_to(new_peak, peaks.shape[1:])
            totals[r] = jnp.broadcast_to(total, totals.shape[1:])
            sums[r] = sums[r] * shrink + _dot(weights.astype(v.dtype), v[0, 0])

    @pl.when(step == steps - 1)
    def _() -> None:
        for r in range(q.shape[2]):
            total = jnp.maximum(totals[r][:, :1], jnp.finfo(jnp.float32).tiny)
            out[0, 0, r] = (sums[r] / total).astype(out.dtype)
            lse[0, 0, r] = (peaks[r][:, :1] + jnp.log(total)).T


def _dq_kernel(
    setting: _Setting, steps: int, fetch: Any, q: Any, k: Any, v: Any, see: Any, code: Any, *refs: Any
) -> None:
    """As the forward kernel; `stats` holds the log-sum-exp and the delta of each query."""
    grad, stats, dq, sums = refs
    step = pl.program_id(3)
    place = (pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)) * steps + step

    @pl.when(step == 0)
    def _() -> None:
        sums[...] = jnp.zeros_like(sums)

    @pl.when(fetch[place] == step)
    def _() -> None:
        bias = _bias(see[0, :, 0:1], see[0, :, 1:2], see[0, :, 2:3], code[0])
        for r in range(q.shape[2]):
            column = stats[0, 0, r].T
            logits = _dot(q[0, 0, r], k[0, 0], transpose_b=True) * setting.scale + bias
            weights = jnp.exp(logits - column[:, 0:1])
            change = _dot(grad[0, 0, r], v[0, 0], transpose_b=True) - column[:, 1:2]
            sums[r] += _dot((weights * change).astype(k.dtype), k[0, 0])

    @pl.when(step == steps - 1)
    def _() -> None:
        dq[0, 0] = (sums[...] * setting.scale).astype(dq.dtype)


def _dkv_kernel(
    setting: _Setting, steps: int, fetch: Any, q: Any, k: Any, v: Any, see: Any, code: Any, *refs: Any
) -> None:
    """One block of keys and one of queries, keys first: the last grid axis runs over the queries."""
    grad, stats, dk, dv, k_sums, v_sums = refs
    step = pl.program_id(3)
    place = (pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)) * steps + step

    @pl.when(step == 0)
    def _() -> None:
        k_sums[...] = jnp.zeros_like(k_sums)
        v_sums[...] = jnp.zeros_like(v_sums)

    @pl.when(fetch[place] == step)
    def _() -> None:
        bias = _bias(see[0, 0:1], see[0, 1:2], see[0, 2:3], code[0])
        for r in range(q.shape[2]):
            logits = _dot(k[0, 0], q[0, 0, r], transpose_b=True) * setting.scale + bias
            weights = jnp.exp(logits - stats[0, 0, r, 0:1])
            v_sums[...] += _dot(weights.astype(grad.dtype), grad[0, 0, r])
            change = _dot(v[0, 0], grad[0, 0, r], transpose_b=True) - stats[0, 0, r, 1:2]
            k_sums[...] += _dot((weights * change).astype(q.dtype), q[0, 0, r])

    @pl.when(step == steps - 1)
    def _() -> None:
        dk[0, 0] = (k_sums[...] * setting.scale).astype(dk.dtype)
        dv[0, 0] = v_sums[...].astype(dv.dtype)


class _Specs(NamedTuple):
    """Where each kind of operand lies, for a grid (B, K, outer block, inner block)."""

    queries: pl.BlockSpec
    keys: pl.BlockSpec
    q_numbers: pl.BlockSpec
    k_numbers: pl.BlockSpec
    per_query: Callable[[int], pl.BlockSpec]


def _specs(shape: tuple[int, ...], setting: _Setting, q_outer: bool, grid: tuple[int, ...]) -> _Specs:
    """The blocks of a grid whose outer axis runs over queries, or over keys; numbers of the outer one are columns."""
    _, _, rep, _, width = shape
    size = setting.q_block, setting.k_block

    def inner(b: Any, i: Any, j: Any, fetch: Any) -> Any:
        return fetch[(b * grid[2] + i) * grid[3] + j]

    def spec(block: tuple[int, ...], outer: bool, place: Callable[[Any, Any, Any], tuple[Any, ...]]) -> pl.BlockSpec:
        def index(b: Any, h: Any, i: Any, j: Any, fetch: Any) -> tuple[Any, ...]:
            return place(b, h, i if outer else inner(b, i, j, fetch))

        return pl.BlockSpec(block, index)

    column, row = (lambda b, h, i: (b, i, 0)), (lambda b, h, i: (b, 0, i))
    numbers = [((1, n, m), (1, m, n)) for n, m in zip(size, (3, 1), strict=True)]
    return _Specs(
        queries=spec((1, 1, rep, size[0], width), q_outer, lambda b, h, i: (b, h, 0, i, 0)),
        keys=spec((1, 1, size[1], width), not q_outer, lambda b, h, i: (b, h, i, 0)),
        q_numbers=spec(numbers[0][not q_outer], q_outer, column if q_outer else row),
        k_numbers=spec(numbers[1][q_outer], not q_outer, row if q_outer else column),
        per_query=lambda n: spec((1, 1, rep, n, size[0]), q_outer, lambda b, h, i: (b, h, 0, 0, i)),
    )


def _call(
    kernel: Callable[..., None],
    name: str,
    grid: tuple[int, ...],
    setting: _Setting,
    specs: tuple[list[pl.BlockSpec], list[pl.BlockSpec]],
    shapes: list[jax.ShapeDtypeStruct],
    scratch: list[Any],
    matmuls: int,
    operands: tuple[Any, ...],
) -> Any:
    """Calls a kernel. The compiler is told to expect half of all pairs, as in one document that fills the row."""
    q, k = operands[1], operands[2]
    pairs = q.shape[0] * q.shape[1] * q.shape[2] * q.shape[3] * k.shape[2] // 2
    moved = sum(a.size * a.dtype.itemsize for a in (*operands[1:], *shapes))
    return pl.pallas_call(
        functools.partial(kernel, setting, grid[3]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=grid, in_specs=specs[0], out_specs=specs[1], scratch_shapes=scratch
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * matmuls * pairs * q.shape[-1], transcendentals=pairs, bytes_accessed=moved
        ),
        interpret=setting.interpret,
        name=name,
    )(*operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q: jax.Array, k: jax.Array, v: jax.Array, codes: Codes, setting: _Setting) -> jax.Array:
    """q [B, K, R, Q, A], k and v [B, K, N, A] -> [B, K, R, Q, A]; lengths and widths fill whole blocks."""
    return _flash_forward(q, k, v, codes, setting)[0]


def _flash_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, codes: Codes, setting: _Setting
) -> tuple[jax.Array, tuple[Any, ...]]:
    by_query, by_key = _fetches(codes, setting)
    batch, groups, rep, q_len, width = q.shape
    grid = batch, groups, q_len // setting.q_block, k.shape[2] // setting.k_block
    at = _specs(q.shape, setting, True, grid)
    see = jnp.stack(codes[:3], axis=-1)
    rows = (rep, setting.q_block)
    out, lse = _call(
        _forward_kernel,
        "attention_forward",
        grid,
        setting,
        ([at.queries, at.keys, at.keys, at.q_numbers, at.k_numbers], [at.queries, at.per_query(1)]),
        [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((*q.shape[:3], 1, q_len), jnp.float32)],
        [pltpu.VMEM((*rows, size), jnp.float32) for size in (LANES, LANES, width)],
        2,
        (by_query, q, k, v, see, codes.code[:, None]),
    )
    out, lse = checkpoint_name(out, ATTENTION_OUTPUT), checkpoint_name(lse, ATTENTION_OUTPUT)
    return out, (q, k, v, codes, by_query, by_key, out, lse)


def _flash_backward(setting: _Setting, saved: tuple[Any, ...], grad: jax.Array) -> tuple[Any, ...]:
    q, k, v, codes, by_query, by_key, out, lse = saved
    batch, groups, rep, q_len, width = q.shape
    blocks = q_len // setting.q_block, k.shape[2] // setting.k_block
    delta = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    stats = jnp.concatenate([lse, delta[:, :, :, None]], axis=3)
    see, rows = jnp.stack(codes[:3], axis=-1), (rep, setting.q_block)
    grid = batch, groups, *blocks
    at = _specs(q.shape, setting, True, grid)
    (dq,) = _call(
        _dq_kernel,
        "attention_dq",
        grid,
        setting,
        (
            [at.queries, at.keys, at.keys, at.q_numbers, at.k_numbers, at.queries, at.per_query(2)],
            [at.queries],
        ),
        [jax.ShapeDtypeStruct(q.shape, q.dtype)],
        [pltpu.VMEM((*rows, width), jnp.float32)],
        3,
        (by_query, q, k, v, see, codes.code[:, None], grad, stats),
    )
    grid = batch, groups, *blocks[::-1]
    at = _specs(q.shape, setting, False, grid)
    dk, dv = _call(
        _dkv_kernel,
        "attention_dkv",
        grid,
        setting,
        (
            [at.queries, at.keys, at.keys, at.q_numbers, at.k_numbers, at.queries, at.per_query(2)],
            [at.keys, at.keys],
        ),
        [jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        [pltpu.VMEM((setting.k_block, width), jnp.float32)] * 2,
        4,
        (by_key, q, k, v, see.swapaxes(1, 2), codes.code[..., None], grad, stats),
    )
    return dq, dk, dv, None


_flash.defvjp(_flash_forward, _flash_backward)
