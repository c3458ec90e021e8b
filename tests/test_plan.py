"""Plans: what is read from a compiled program, what they need without libtpu, and the TPU kernel against dense."""

import dataclasses
import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from loom_jax.cli import main
from loom_jax.commands.train import read_config, read_recipe
from loom_jax.data import abstract_batch
from loom_jax.data.packing import Tables
from loom_jax.document import CAUSAL, FULL, NOISE, PADDING, TokenLayout
from loom_jax.generate.plan import Sampling, plan_sampling
from loom_jax.nn import choose_attention, dense_attention, tpu_attention
from loom_jax.parallel import batch_sharding, make_mesh, shard_attend
from loom_jax.train import draft_step
from loom_jax.train.hlo import read_program
from loom_jax.train.plan import Chip, advice, chip_of, fit_config, state_memory
from tests.sources import ROOT
from tests.test_attention import layout_of

ROUNDS, ROWS, INNER, OUTER = 5, 24, 40, 72


@pytest.fixture(scope="module")
def tiny():
    return read_config(read_recipe(ROOT / "configs/tiny.py"), [])


def text_of(function, *shapes, **options):
    return jax.jit(function, **options).lower(*shapes).compile().as_text()


def test_loops_count_as_often_as_they_run():
    def rounds(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w) @ w.T, None), x, w)[0]

    shapes = jax.ShapeDtypeStruct((ROWS, INNER), jnp.float32), jax.ShapeDtypeStruct((ROUNDS, INNER, OUTER), jnp.float32)
    program = read_program(text_of(rounds, *shapes))
    assert program.work.flops == ROUNDS * 2 * 2 * ROWS * INNER * OUTER
    assert [length for length, work in program.loops if work.flops] == [ROUNDS]


def test_a_loop_over_a_traced_range_takes_its_length_from_the_caller():
    def rounds(x, w, stop):
        return jax.lax.fori_loop(0, stop, lambda _, x: jnp.tanh(x @ w), x)

    shapes = (jax.ShapeDtypeStruct((ROWS, INNER), jnp.float32), jax.ShapeDtypeStruct((INNER, INNER), jnp.float32))
    text = text_of(rounds, *shapes, jax.ShapeDtypeStruct((), jnp.int32))
    assert read_program(text, loop_length=7).work.flops == 7 * 2 * ROWS * INNER * INNER


def test_bytes_between_chips_are_those_of_a_ring():
    mesh = make_mesh({"fsdp": 8})
    cut, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
    x = jax.ShapeDtypeStruct((ROWS, INNER), jnp.float32, sharding=cut)
    gathered = read_program(text_of(lambda x: x * 2, x, out_shardings=whole)).work
    assert gathered.sent == {"all-gather": ROWS * INNER * 4 * 7 // 8} and gathered.calls["all-gather"] == 1
    summed = read_program(text_of(lambda x: x.sum(0), x, out_shardings=whole)).work
    assert summed.sent == {"all-reduce": INNER * 4 * 2 * 7 // 8}


TPU_LINES = """
%all-reduce-scatter.1 (input: bf16[64,128]) -> bf16[8,128] {
  %input = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[64,128]{1,0:T(8,128)(2,1)} all-reduce(%input), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %slice = bf16[8,128]{1,0} dynamic-slice(%all-reduce.1, %c, %c), dynamic_slice_sizes={8,128}
}

%product (a: bf16[96,32], b: bf16[32,128]) -> bf16[96,128] {
  %a = bf16[96,32]{1,0} parameter(0)
  %b = bf16[32,128]{1,0} parameter(1)
  ROOT %convolution.1 = bf16[96,128]{1,0:T(8,128)} convolution(%a, %b), dim_labels=bf_io->bf
}

ENTRY %main (x: bf16[64,128], a: bf16[96,32], b: bf16[32,128]) -> bf16[8,128] {
  %x = bf16[64,128]{1,0} parameter(0)
  %a = bf16[96,32]{1,0} parameter(1)
  %b = bf16[32,128]{1,0} parameter(2)
  %gathered = bf16[64,128]{1,0} all-gather(%x), replica_groups=mesh['axis_0'=16,'axis_1'=4] {'axis_1'}, dimensions={0}
  %fusion.1 = bf16[96,128]{1,0} fusion(%a, %b), kind=kOutput, calls=%product, backend_config={"estimated_cycles":"1750"}
  %kernel = bf16[64,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"cost_estimate":{"flops":"9000","transcendentals":"8"}}}
  ROOT %fusion.2 = bf16[8,128]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_the_text_of_the_tpu_compiler_is_understood():
    """In its own notation: a reduce-scatter inside a fusion, products as convolutions, cycles, kernels, groups."""
    work = read_program(TPU_LINES).work
    assert work.flops == 2 * 96 * 32 * 128 + 9000 and work.kernel_flops == 9000
    assert work.cycles == 1750
    assert work.sent == {"reduce-scatter": 64 * 128 * 2 * 7 // 8, "all-gather": 64 * 128 * 2 * 3 // 4}


def test_a_step_is_drafted_without_memory_and_its_memory_known(tiny):
    mesh = make_mesh({"fsdp": 8})
    tiny = dataclasses.replace(tiny, mesh=dataclasses.replace(tiny.mesh, preset="fsdp"))
    config = fit_config(tiny, mesh, rows=2, tokens=1024)
    assert config.data.rows == 16 and config.data.budget.und + config.data.budget.gen == 1024
    draft = draft_step(config, mesh)
    place = batch_sharding(mesh)
    shapes = abstract_batch(config.data, Tables.of(config.model), config.model.latent_stride)
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), shapes)
    jax.eval_shape(draft.step, draft.state, draft.vae, batch)
    memory = state_memory(draft, batch)
    whole = sum(math.prod(a.shape) * 4 for a in jax.tree.leaves(draft.state.trainable))
    assert whole / 8 < memory["ema"] < 1.1 * whole / 8
    assert memory["moments"] == pytest.approx(2 * memory["ema"], rel=1e-4)


def test_advice_names_shards_that_end_within_a_tile_and_what_saves_memory(tiny):
    odd = advice(tiny, make_mesh({"fsdp": 8}), fits=True)  # 96 / 8 = 12 rows
    assert len(odd) == 1 and "data=4,fsdp=2" in odd[0]
    assert not advice(tiny, make_mesh({"data": 4, "fsdp": 2}), fits=True)
    assert any("ema.dtype=bfloat16" in line for line in advice(tiny, make_mesh({"data": 4, "fsdp": 2}), fits=False))
    assert chip_of("TPU v6 lite").memory_gib < chip_of("TPU v5").memory_gib


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_the_command_says_how_to_get_it(capsys):
    assert main(["plan", "--config", str(ROOT / "configs/tiny.py"), "--topology", "v5p:2x2x1"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and 'pip install "jax[tpu]"' in said


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--help"])
    assert stop.value.code == 0
    assert "loom plan --config configs/bagel_7b_finetune.py" in capsys.readouterr().out


# The kernel, interpreted: blocks of 128, so that several are needed, some are skipped and the last is not full.
DOCUMENTS = [(CAUSAL, 60), (FULL, 90), (NOISE, 70), (CAUSAL, 33)], [(CAUSAL, 41), (NOISE, 35), (FULL, 80), (NOISE, 38)]
HEADS, KV_HEADS, WIDTH = 6, 2, 14


def both(length, queries, seed):
    """Two rows: documents in order, and shuffled with padding in between."""
    rows = [np.stack(layout_of(DOCUMENTS, s, length)) for s in (seed, seed + 1)]
    kinds = np.lexsort((rows[0][3], rows[0][0]))
    rows[0] = rows[0][:, kinds]
    k_layout = TokenLayout(*np.stack(rows, axis=1))
    return TokenLayout(*(a[:, :queries] for a in k_layout)), k_layout


@functools.partial(jax.jit, static_argnames="attend")
def outputs(q, k, v, weight, q_layout, k_layout, attend):
    def loss(q, k, v):
        out = attend(q, k, v, q_layout, k_layout)
        return (out * weight).sum(), out

    (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return out, gradients


interpreted = functools.partial(tpu_attention, block_size=128, interpret=True)


@pytest.mark.parametrize(("queries", "seed"), [(500, 0), (200, 5)])
def test_the_tpu_kernel_equals_dense_forward_and_backward(queries, seed):
    q_layout, k_layout = both(500, queries, seed)
    rng = np.random.default_rng(seed)
    shapes = (2, queries, HEADS, WIDTH), (2, 500, KV_HEADS, WIDTH), (2, 500, KV_HEADS, WIDTH)
    q, k, v = (rng.standard_normal(shape, np.float32) for shape in shapes)
    held = q_layout.document != PADDING
    weight = np.where(held[..., None, None], rng.standard_normal(q.shape, np.float32), 0)
    out, gradients = outputs(q, k, v, weight, q_layout, k_layout, interpreted)
    expected, expected_gradients = outputs(q, k, v, weight, q_layout, k_layout, dense_attention)
    np.testing.assert_allclose(out[held], expected[held], atol=2e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_the_tpu_kernel_is_finite_where_nobody_sees_anybody():
    empty = TokenLayout(*(np.full((1, 130), PADDING, np.int32),) * 5)
    tensors = [np.ones((1, 130, heads, WIDTH), np.float32) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    out, gradients = outputs(*tensors, np.ones_like(tensors[0]), empty, empty, interpreted)
    assert all(np.isfinite(a).all() for a in (out, *gradients))


@pytest.mark.parametrize("axes", [{"fsdp": 2, "tensor": 2, "data": 2}, {"fsdp": 2, "context": 4}])
def test_attention_on_a_mesh_equals_that_on_one_device(axes):
    """Rows, heads and queries are cut; each device computes its own."""
    q_layout, k_layout = both(48, 48, 2)
    rng = np.random.default_rng(3)
    rows = 2
    q, k, v = (rng.standard_normal((rows, 48, n, WIDTH), np.float32) for n in (HEADS, KV_HEADS, KV_HEADS))
    weight = np.ones_like(q)
    attend = shard_attend(dense_attention, make_mesh(axes))
    out, gradients = outputs(q, k, v, weight, q_layout, k_layout, attend)
    expected, expected_gradients = outputs(q, k, v, weight, q_layout, k_layout, dense_attention)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_auto_is_the_kernel_on_tpus_alone():
    assert choose_attention("auto", "tpu") is tpu_attention
    assert choose_attention("auto", "cpu") is not tpu_attention


@pytest.mark.parametrize("preset", ["fsdp", "hsdp"])
def test_the_sampling_loop_is_planned_whatever_axes_cut_its_rows(preset, tiny, monkeypatch):
    model = tiny.model
    monkeypatch.setattr("loom_jax.train.plan.CHIPS", (Chip("cpu", 1.0, 1.0, 1.0),))
    sampling = Sampling(pictures=4, side=128, context=64, steps=5)
    report = plan_sampling(model, make_mesh(preset), preset, "blockwise", sampling)
    assert report["fits"] and report["flops_compiled"] > 0
    more = plan_sampling(model, make_mesh(preset), preset, "blockwise", dataclasses.replace(sampling, steps=10))
    assert more["flops_compiled"] == pytest.approx(2 * report["flops_compiled"], rel=0.01)
