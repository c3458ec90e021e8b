"""The GPU kernels: interpreted against dense, lowered for CUDA without a GPU, and run where there is one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import AbstractDevice, AbstractMesh

from loom_jax.document import CAUSAL, FULL, NOISE, PADDING, TokenLayout, may_attend
from loom_jax.nn import auto_attention, choose_attention, dense_attention
from loom_jax.nn.attention_codes import attention_codes
from loom_jax.nn.gpu_attention import Tile, Tiles, _lists, gpu_attention
from tests.test_attention import (
    KEYS,
    QUERIES,
    assert_equals_dense,
    batch_of,
    first,
    layout_of,
    layouts,
    output_and_gradients,
    qkv,
    some,
)

SMALL = Tiles(Tile(16, 8, 4, 2), Tile(8, 16, 4, 2), Tile(16, 8, 4, 2))
interpreted = functools.partial(gpu_attention, tiles=SMALL, interpret=True)
on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU: the kernels do not run on this device")


def sorted_by_document(layout):
    """The tokens of each row in the order of documents, so that some blocks are full."""
    places = np.argsort(layout.document * 1000 + layout.order, axis=1)
    return TokenLayout(*(np.take_along_axis(a, places, axis=1) for a in layout))


@pytest.mark.parametrize("queries", [KEYS, QUERIES])
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(drawn=layouts)
def test_the_kernels_equal_dense_forward_and_backward(queries, drawn):
    """On random documents, splits, modes and padding; blocks that do not divide; fewer queries than keys."""
    for layout in (batch_of(drawn), sorted_by_document(batch_of(drawn))):
        assert_equals_dense(layout, queries, interpreted)


@pytest.mark.parametrize("queries", [300, 190])
def test_the_tiles_in_use_equal_dense(queries):
    """Blocks of different sizes for each kernel, and lengths that none of them divides."""
    documents = [(CAUSAL, 60), (FULL, 90), (NOISE, 70), (CAUSAL, 33)], [(CAUSAL, 41), (NOISE, 35), (NOISE, 170)]
    layout = batch_of([(documents, 0), (documents, 1)], 300)
    for tokens in (layout, sorted_by_document(layout)):
        assert_equals_dense(tokens, queries, functools.partial(gpu_attention, interpret=True))


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(drawn=layouts)
def test_lists_hold_every_block_with_an_allowed_pair_and_full_ones_first(drawn):
    layout = sorted_by_document(batch_of(drawn, 48))
    tile = Tile(16, 8, 4, 2)
    mask = np.asarray(may_attend(layout, layout)).reshape(len(drawn), 3, 16, 6, 8)
    for by_key in (False, True):
        blocks, counts = (np.asarray(a) for a in _lists(attention_codes(layout, layout), tile, by_key))
        some_pair, every_pair = (a.swapaxes(1, 2) if by_key else a for a in (mask.any((2, 4)), mask.all((2, 4))))
        for place in np.ndindex(blocks.shape[:2]):
            full, needed = counts[place]
            assert set(blocks[place][:full]) == set(np.flatnonzero(every_pair[place]))
            assert set(blocks[place][:needed]) >= set(np.flatnonzero(some_pair[place]))


def test_a_noisy_picture_and_the_text_before_it_take_no_mask():
    layout = TokenLayout(*(a[None] for a in straight([[(CAUSAL, 16), (NOISE, 32)]], 48)))
    blocks, counts = _lists(attention_codes(layout, layout), Tile(16, 8, 4, 2))
    np.testing.assert_array_equal(counts, [[[0, 2], [6, 6], [6, 6]]])
    assert sorted(np.asarray(blocks[0, 1])) == list(range(6))


def straight(documents, length):
    """One row [length] of documents in order, padding last."""
    row = layout_of(documents, 0, length)
    places = np.lexsort((row.order, np.where(row.document == PADDING, 999, row.document)))
    return TokenLayout(*(a[places] for a in row))


def test_the_kernels_are_finite_where_nobody_sees_anybody():
    empty = TokenLayout(*(np.full((2, KEYS), PADDING, np.int32),) * 5)
    layout = TokenLayout(*(np.where([[True], [False]], a, b) for a, b in zip(empty, some(), strict=True)))

    def loss(q, k, v):
        out = interpreted(q, k, v, layout, layout)
        return (out**2).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*qkv(KEYS))
    assert all(np.isfinite(a).all() for a in (out, *gradients))


def abstract(queries, keys, heads=(28, 4, 128), dtype=jnp.bfloat16):
    """Shapes of q, k, v and both layouts."""
    layouts = (TokenLayout(*(jax.ShapeDtypeStruct((1, n), jnp.int32),) * 5) for n in (queries, keys))
    shapes = (1, queries, heads[0], heads[2]), *((1, keys, heads[1], heads[2]),) * 2
    return *(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes), *layouts


def lowered(run, *args):
    """The program for an H100, as text: how far compilation goes without the device."""
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    checks = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return jax.export.export(jax.jit(run), platforms=["cuda"], disabled_checks=checks)(*args).mlir_module()


@pytest.mark.parametrize(("queries", "keys"), [(1000, 1000), (500, 1001)])
def test_the_kernels_are_lowered_for_cuda(queries, keys):
    def loss(q, k, v, q_layout, k_layout):
        return gpu_attention(q, k, v, q_layout, k_layout).astype(jnp.float32).sum()

    args = abstract(queries, keys)
    assert lowered(gpu_attention, *args).count("@__gpu$xla.gpu.triton") == 1
    assert lowered(jax.grad(loss, (0, 1, 2)), *args).count("@__gpu$xla.gpu.triton") == 3


@pytest.mark.parametrize(
    "args", [abstract(1, 500), abstract(70, 70, dtype=jnp.float32), abstract(70, 70, (4, 2, 256))], ids=str
)
def test_few_queries_and_what_does_not_suit_take_other_ways(args):
    assert "triton" not in lowered(gpu_attention, *args)


def test_auto_is_the_kernels_on_gpus_alone():
    assert choose_attention("auto", "gpu") is choose_attention("gpu", "cpu") is gpu_attention
    assert choose_attention("auto", "rocm") is auto_attention


@on_gpu
@pytest.mark.parametrize("heads", [(28, 4, 128), (6, 3, 32), (4, 2, 72)])
@pytest.mark.parametrize("queries", [900, 333])
def test_on_a_gpu_the_kernels_equal_dense(heads, queries):
    """In bfloat16, as far from dense in float32 as dense in bfloat16 is."""
    documents = [(CAUSAL, 160), (FULL, 190), (NOISE, 170)], [(CAUSAL, 141), (NOISE, 35), (FULL, 80), (NOISE, 38)]
    k_layout = TokenLayout(
        *(np.stack(a) for a in zip(straight(documents, 900), layout_of(documents, 1, 900), strict=True))
    )
    q_layout = first(k_layout, queries)
    rng = np.random.default_rng(0)
    shapes = (2, queries, heads[0], heads[2]), *((2, 900, heads[1], heads[2]),) * 2
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes)
    weight = rng.standard_normal(q.shape).astype(np.float32)
    run = functools.partial(output_and_gradients, q_layout=q_layout, k_layout=k_layout, weight=weight)
    with jax.default_matmul_precision("highest"):
        exact = run(*(a.astype(jnp.float32) for a in (q, k, v)), attend=dense_attention)
    held = (q_layout.document != PADDING)[..., None, None]

    def errors(found):
        counted = zip(jax.tree.leaves(found), jax.tree.leaves(exact), (held, True, True, True), strict=True)
        return [np.abs(np.where(mask, np.float32(a) - b, 0)).max() / np.abs(b).max() for a, b, mask in counted]

    ours, theirs = errors(run(q, k, v, attend=gpu_attention)), errors(run(q, k, v, attend=dense_attention))
    assert all(a <= 3 * b + 2e-3 for a, b in zip(ours, theirs, strict=True)), (ours, theirs)
