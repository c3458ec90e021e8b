"""Attention backends: blockwise equals dense for every layout, in memory that is linear in the length."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loom_jax.document import CAUSAL, FULL, NOISE, PADDING, TokenLayout, may_attend
from loom_jax.nn import auto_attention, blockwise_attention, dense_attention, document_attention
from tests.tiny import relative

BATCH, QUERIES, KEYS, HEADS, KV_HEADS, WIDTH = 2, 23, 37, 6, 2, 14
MODES = (CAUSAL, FULL, NOISE)

splits = st.lists(st.tuples(st.sampled_from(MODES), st.integers(1, 6)), min_size=1, max_size=4)
rows = st.tuples(st.lists(splits, min_size=1, max_size=4), st.integers(0, 2**32 - 1))
layouts = st.lists(rows, min_size=BATCH, max_size=BATCH)


def layout_of(documents, seed, length):
    """Returns one row [length]: the tokens of documents of (mode, length) splits in any order, padding in between."""
    tokens = [
        (number, split, mode)
        for number, splits in enumerate(documents)
        for split, (mode, count) in enumerate(splits)
        for _ in range(count)
    ]
    orders = {}
    table = []
    for number, split, mode in tokens[:length]:
        order = orders[number] = orders.get(number, -1) + 1
        table.append((number, split, mode, order, order))
    table += [(PADDING, 0, 0, 0, 0)] * (length - len(table))
    columns = np.asarray(table, np.int32)[np.random.default_rng(seed).permutation(length)].T
    return TokenLayout(*columns)


def batch_of(drawn, length=KEYS):
    return TokenLayout(*(np.stack(a) for a in zip(*(layout_of(d, s, length) for d, s in drawn), strict=True)))


def first(layout, count):
    return TokenLayout(*(a[:, :count] for a in layout))


def qkv(queries=QUERIES, seed=0, keys=KEYS):
    rng = np.random.default_rng(seed)
    shapes = (BATCH, queries, HEADS, WIDTH), (BATCH, keys, KV_HEADS, WIDTH), (BATCH, keys, KV_HEADS, WIDTH)
    return tuple(rng.standard_normal(s, np.float32) for s in shapes)


@functools.partial(jax.jit, static_argnames=("attend", "block"))
def output_and_gradients(q, k, v, q_layout, k_layout, weight, attend, block=None):
    """The outputs, and the gradients of their weighted sum; padding queries have no weight, as in any loss."""
    options = {} if block is None else {"block_size": block}
    weight = jnp.where((q_layout.document != PADDING)[..., None, None], weight, 0.0)

    def loss(q, k, v):
        out = attend(q, k, v, q_layout, k_layout, **options)
        return (out * weight).sum(), out

    (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return out, gradients


@pytest.mark.parametrize("attend", [blockwise_attention, document_attention])
@pytest.mark.parametrize(("block", "queries"), [(16, KEYS), (16, QUERIES), (8, QUERIES), (100, KEYS)])
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(drawn=layouts)
def test_backends_equal_dense_forward_and_backward(attend, block, queries, drawn):
    """On random documents, splits, modes and padding; blocks that do not divide; fewer queries than keys."""
    assert_equals_dense(batch_of(drawn), queries, attend, block)


def assert_equals_dense(k_layout, queries, *attend):
    """Compares a backend, called as `output_and_gradients` does, for the first queries of a layout."""
    q_layout = first(k_layout, queries)
    q, k, v = qkv(queries, keys=k_layout.document.shape[1])
    weight = np.random.default_rng(1).standard_normal(q.shape, np.float32)
    out, gradients = output_and_gradients(q, k, v, q_layout, k_layout, weight, *attend)
    expected, expected_gradients = output_and_gradients(q, k, v, q_layout, k_layout, weight, dense_attention)
    held = q_layout.document != PADDING
    np.testing.assert_allclose(out[held], expected[held], atol=2e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(drawn=layouts)
def test_dense_is_the_softmax_over_what_the_rule_allows(drawn):
    layout = batch_of(drawn)
    q, k, v = qkv(KEYS)
    out = output_and_gradients(q, k, v, layout, layout, np.ones_like(q), dense_attention)[0]
    wide = [np.repeat(a.astype(np.float64), HEADS // KV_HEADS, axis=2) for a in (k, v)]
    logits = np.einsum("bqha,bnha->bhqn", q, wide[0]) / np.sqrt(WIDTH)
    weights = np.exp(logits) * may_attend(layout, layout)[:, None]
    held = layout.document != PADDING
    total = np.where(held[:, None], weights.sum(-1), 1.0)
    expected = np.einsum("bhqn,bnha->bqha", weights / total[..., None], wide[1])
    np.testing.assert_allclose(out[held], expected[held], atol=2e-6)


@pytest.mark.parametrize("attend", [dense_attention, blockwise_attention, document_attention])
def test_padding_rows_have_finite_outputs_and_gradients(attend):
    """Even a row of nothing but padding, and even where something weighs its output."""
    empty = TokenLayout(*(np.full((BATCH, KEYS), PADDING, np.int32),) * 5)
    layout = TokenLayout(*(np.where(np.arange(BATCH)[:, None] == 0, a, b) for a, b in zip(empty, some(), strict=True)))

    def loss(q, k, v):
        out = attend(q, k, v, layout, layout)
        return (out**2).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*qkv(KEYS))
    assert all(np.isfinite(a).all() for a in (out, *gradients))


def some():
    """Two documents that share a row with padding: text, an image, a noisy image; and text."""
    document = [(CAUSAL, 5), (FULL, 6), (NOISE, 7)], [(CAUSAL, 4), (FULL, 3)]
    return batch_of([(document, 3), (document, 4)])


@pytest.mark.parametrize(
    ("attend", "block"), [(dense_attention, None), (blockwise_attention, 16), (document_attention, 16)]
)
def test_documents_attend_only_within_themselves_bit_for_bit(attend, block):
    layout, (q, k, v) = some(), qkv(KEYS)
    other = (layout.document == 1)[..., None, None]
    weight = np.where(other, 0.0, 1.0).astype(np.float32) * np.ones_like(q)
    out, gradients = output_and_gradients(q, k, v, layout, layout, weight, attend, block)
    changed = [np.where(other, 100 * a + 1, a) for a in (q, k, v)]
    out_changed, gradients_changed = output_and_gradients(*changed, layout, layout, weight, attend, block)
    mine = layout.document == 0
    np.testing.assert_array_equal(out[mine], out_changed[mine])
    for before, after in zip(gradients, gradients_changed, strict=True):
        np.testing.assert_array_equal(before[mine], after[mine])
        assert not np.asarray(after)[layout.document == 1].any()


@pytest.mark.parametrize("attend", [blockwise_attention, document_attention])
def test_nobody_sees_a_noisy_split_but_itself(attend):
    layout, (q, k, v) = some(), qkv(KEYS)
    noisy = (layout.mode == NOISE) & (layout.document != PADDING)
    run = functools.partial(output_and_gradients, attend=attend, block=16)
    before = run(q, k, v, layout, layout, np.ones_like(q))[0]
    after = run(q, k, np.where(noisy[..., None, None], v + 1, v), layout, layout, np.ones_like(q))[0]
    np.testing.assert_array_equal(before[~noisy], after[~noisy])
    assert (np.abs(before - after)[noisy] > 1e-3).any(axis=-1).all()


def test_half_precision_keeps_float32_softmax():
    layout, tensors = some(), qkv(KEYS)
    half = [jnp.asarray(a, jnp.bfloat16) for a in tensors]
    held = layout.document != PADDING
    expected = dense_attention(*(a.astype(jnp.float32) for a in half), layout, layout)[held]
    for attend in (dense_attention, blockwise_attention, document_attention):
        out = attend(*half, layout, layout)
        assert out.dtype == jnp.bfloat16
        assert relative(out.astype(jnp.float32)[held], expected) < 0.03


def temporary_bytes(attend, length, backward):
    """Returns what the compiler sets aside for one row of `length` tokens, two query heads on one key head."""
    heads = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32), jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
    layout = TokenLayout(*[jax.ShapeDtypeStruct((1, length), jnp.int32)] * 5)

    def run(q, k, v, layout):
        if not backward:
            return attend(q, k, v, layout, layout)
        return jax.grad(lambda *a: attend(*a, layout, layout).sum(), (0, 1, 2))(q, k, v)

    compiled = jax.jit(run).lower(heads[0], heads[1], heads[1], layout).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("backward", [False, True])
def test_memory_of_long_rows_is_linear(backward):
    """`auto_attention` leaves the dense way before 8k tokens."""
    short, long = (temporary_bytes(auto_attention, n, backward) for n in (4096, 8192))
    all_pairs = 4 * 8192**2
    assert long < all_pairs / 8
    assert long < 2.3 * short


def test_memory_of_dense_attention_holds_all_pairs():
    """So that the measure above does see what it should."""
    assert temporary_bytes(dense_attention, 4096, False) > 4 * 4096**2


def test_short_rows_are_dense():
    q, k, v = qkv(KEYS)
    np.testing.assert_array_equal(auto_attention(q, k, v, some(), some()), dense_attention(q, k, v, some(), some()))
