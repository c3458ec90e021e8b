"""Plans: what is read from a compiled program, what they need without libtpu, and the TPU kernel against dense."""

import contextlib
import dataclasses
import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from loom_jax.cli import main
from loom_jax.commands.plan import describe
from loom_jax.commands.train import read_config, read_recipe
from loom_jax.data import abstract_batch
from loom_jax.data.packing import Tables
from loom_jax.document import CAUSAL, FULL, NOISE, PADDING, TokenLayout
from loom_jax.generate.plan import Sampling, plan_sampling
from loom_jax.nn import choose_attention, dense_attention, tpu_attention
from loom_jax.parallel import batch_sharding, make_mesh, shard_attend
from loom_jax.train import draft_step
from loom_jax.train.hlo import read_program
from loom_jax.train.plan import (
    GIB,
    SPARE,
    Chip,
    advice,
    chip_of,
    fit_config,
    gradient_memory,
    plan_training,
    state_memory,
)
from tests.sources import ROOT
from tests.test_attention import assert_equals_dense, batch_of, first, layout_of, layouts
from tests.test_gpu_attention import sorted_by_document

ROUNDS, ROWS, INNER, OUTER, PARTS = 5, 24, 40, 72, 3


@pytest.fixture(scope="module")
def tiny():
    return read_config(read_recipe(ROOT / "configs/tiny.py"), [])


def text_of(function, *shapes, **options):
    return jax.jit(function, **options).lower(*shapes).compile().as_text()


def test_loops_count_as_often_as_they_run():
    def rounds(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w) @ w.T, None), x, w)[0]

    shapes = jax.ShapeDtypeStruct((ROWS, INNER), jnp.float32), jax.ShapeDtypeStruct((ROUNDS, INNER, OUTER), jnp.float32)
    work = read_program(text_of(rounds, *shapes))
    assert work.flops == ROUNDS * 2 * 2 * ROWS * INNER * OUTER
    assert [length for length, loop in work.loops if loop.flops] == [ROUNDS]


def test_a_loop_in_a_loop_counts_in_all_rounds_of_both():
    """As layers within micro-batches, with one product more in each of these."""

    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w) @ w.T, None), x, weights)[0]

    def parts(x, weights, last):
        return jax.lax.scan(lambda total, x: (total + layers(x, weights) @ last, None), jnp.zeros((ROWS, 56)), x)[0]

    shapes = (PARTS, ROWS, INNER), (ROUNDS, INNER, OUTER), (INNER, 56)
    work = read_program(text_of(parts, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)))
    inner = PARTS * ROUNDS * 2 * 2 * ROWS * INNER * OUTER
    outer = inner + PARTS * 2 * ROWS * INNER * 56
    assert work.flops == outer
    assert sorted((length, loop.flops) for length, loop in work.loops if loop.flops) == [
        (PARTS, outer),
        (ROUNDS, inner),
    ]


def test_a_loop_over_a_traced_range_takes_its_length_from_the_caller():
    def rounds(x, w, stop):
        return jax.lax.fori_loop(0, stop, lambda _, x: jnp.tanh(x @ w), x)

    shapes = (jax.ShapeDtypeStruct((ROWS, INNER), jnp.float32), jax.ShapeDtypeStruct((INNER, INNER), jnp.float32))
    text = text_of(rounds, *shapes, jax.ShapeDtypeStruct((), jnp.int32))
    work = read_program(text, loop_length=7)
    assert work.flops == 7 * 2 * ROWS * INNER * INNER
    assert not work.loops  # seven layers are not mistaken for it


def test_bytes_between_chips_are_those_of_a_ring():
    mesh = make_mesh({"fsdp": 8})
    cut, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
    x = jax.ShapeDtypeStruct((ROWS, INNER), jnp.float32, sharding=cut)
    gathered = read_program(text_of(lambda x: x * 2, x, out_shardings=whole))
    assert gathered.sent == {"all-gather": ROWS * INNER * 4 * 7 // 8} and gathered.calls["all-gather"] == 1
    summed = read_program(text_of(lambda x: x.sum(0), x, out_shardings=whole))
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
    work = read_program(TPU_LINES)
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


@pytest.mark.parametrize(("microbatches", "width"), [(1, 2), (2, 4)])
def test_gradients_are_of_the_parameters_dtype_but_float32_where_they_are_added_up(microbatches, width, tiny):
    config = dataclasses.replace(tiny, param_dtype="bfloat16", microbatches=microbatches, frozen=("vit/*",))
    draft = draft_step(config, make_mesh("single"))
    assert gradient_memory(draft) == width * sum(math.prod(a.shape) for a in jax.tree.leaves(draft.state.trainable))


QUICK = ["data.latents=moments", "data.budget.vit=0", "attention=dense", "remat=none", "frozen=('vit/*','decoder/*')"]
"""What of the tiny recipe compiles soonest."""


@contextlib.contextmanager
def simulated(memory_gib):
    """The simulated devices are chips of 1 TFLOP/s, 1 GB/s and 1 GHz, and the compiler spares itself optimizations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loom_jax.train.plan.CHIPS", (Chip("cpu", memory_gib, 1.0, 1.0),))
        for module in ("train", "generate"):
            patch.setattr(f"loom_jax.{module}.plan.peak_tflops", lambda kind: 1.0)
        jax.config.update("jax_disable_most_optimizations", True)
        try:
            yield
        finally:
            jax.config.update("jax_disable_most_optimizations", False)


def plan_quickly(*overrides, memory_gib=1.0):
    config = read_config(read_recipe(ROOT / "configs/tiny.py"), [*QUICK, "mesh.preset=fsdp", *overrides])
    mesh = make_mesh("fsdp")
    with simulated(memory_gib):
        return plan_training(fit_config(config, mesh, rows=1, tokens=512), mesh)


@pytest.fixture(scope="module")
def planned():
    """The plan of a row of 512 tokens on each of eight devices, which fits."""
    return plan_quickly()


def test_a_plan_names_every_kind_of_memory_and_they_add_up(planned):
    memory = planned["memory"]
    assert memory["gradients"] == memory["ema"] > 0 and memory["activations"] > 0
    assert sum(memory.values()) == planned["memory_total"] and planned["fits"]
    free = (1 - SPARE) * GIB - planned["memory_total"]
    temporary = memory["gradients"] + memory["activations"]
    assert planned["rows_that_fit"] == math.floor((free + temporary) / temporary)
    said = describe(planned)
    for kind in memory:
        assert sum(line.startswith(f"  {kind} ") for line in said) == 1
    assert any(" fits with 10 % to spare" in line for line in said)
    assert f"rows of a data shard that fit: {planned['rows_that_fit']}" in said
    assert any("gradients" in line and "by arithmetic" in line for line in said)
    assert 0 < planned["mfu"]["serial"] <= planned["mfu"]["overlapped"]


def test_a_chip_with_too_little_memory_fits_no_row_and_gets_advice(planned):
    memory = planned["memory"]
    arguments = planned["memory_total"] - memory["gradients"] - memory["activations"]
    small = plan_quickly(memory_gib=arguments / GIB)
    assert not small["fits"] and small["rows_that_fit"] == 0
    said = describe(small)
    assert any("does not fit with 10 % to spare" in line for line in said)
    assert any(line.startswith("advice: ") and "moment_dtype=bfloat16" in line for line in said)


@contextlib.contextmanager
def refused(module):
    def compile_for_plan(*args):
        raise MemoryError("RESOURCE_EXHAUSTED: 3.00G too many")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"loom_jax.{module}.plan.compile_for_plan", compile_for_plan)
        yield


def test_where_the_compiler_refuses_a_step_the_plan_says_how_many_rows_are_too_many():
    with refused("train"):
        report = plan_quickly()
    assert not report["fits"] and report["memory"]["gradients"] > 0 and "activations" not in report["memory"]
    said = describe(report)
    assert any("3.00G too many" in line for line in said) and any(line.startswith("advice: ") for line in said)
    assert "rows of a data shard that fit: fewer than 1" in said


def test_search_compiles_for_twice_the_rows_until_they_do_not_fit(planned, monkeypatch, capsys):
    monkeypatch.setattr("loom_jax.commands.plan.topology_devices", lambda topology: jax.devices())
    flags = ["--topology", "v5p:2x2x2", "--preset", "fsdp", "--tokens", "512", "--search"]
    with simulated(1.2 * planned["memory_total"] / GIB):
        status = main(["plan", "--config", str(ROOT / "configs/tiny.py"), *flags, *(f"--config.{o}" for o in QUICK)])
    assert status == 0
    assert "rows of a data shard that fit: 1\n" in capsys.readouterr().out


def test_the_loop_over_labelled_tokens_counts_for_all_of_them(planned):
    """The vocabulary in parts is worked through by a loop whose length is not written in the program."""
    assert plan_quickly("loss.vocab_chunk=100")["flops_compiled"] >= planned["flops_compiled"]


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
    return first(k_layout, queries), k_layout


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
    assert_equals_dense(both(500, queries, seed)[1], queries, interpreted)


def several_blocks(drawn):
    """Rows of 270 keys, three blocks, of drawn documents made six times as long."""
    rows = [([[(mode, 6 * count) for mode, count in splits] for splits in row], seed) for row, seed in drawn]
    return batch_of(rows, 270)


@pytest.mark.parametrize("queries", [270, 150])
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(drawn=layouts)
def test_the_tpu_kernel_equals_dense_on_random_layouts(queries, drawn):
    """On random documents, splits, modes and padding, in any order and in that of documents: blocks are skipped."""
    for layout in (several_blocks(drawn), sorted_by_document(several_blocks(drawn))):
        assert_equals_dense(layout, queries, interpreted)


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
def test_the_sampling_loop_is_planned_whatever_axes_cut_its_rows(preset, tiny):
    report = plan_pictures(tiny, preset)
    assert report["fits"] and report["flops_compiled"] > 0
    more = plan_pictures(tiny, preset, steps=10)
    assert more["flops_compiled"] == pytest.approx(2 * report["flops_compiled"], rel=0.01)


def plan_pictures(config, preset, memory_gib=1.0, steps=5):
    sampling = Sampling(pictures=4, side=128, context=64, steps=steps)
    with simulated(memory_gib):
        return plan_sampling(config.model, make_mesh(preset), preset, "blockwise", sampling)


def test_a_plan_of_sampling_says_how_many_pictures_fit_and_what_to_change(tiny):
    report = plan_pictures(tiny, "fsdp")
    memory = report["memory"]
    assert sum(memory.values()) == report["memory_total"] and not report["advice"]
    growing = memory["contexts"] + memory["activations"]
    fixed = report["memory_total"] - growing
    assert report["pictures_that_fit"] == math.floor(4 * ((1 - SPARE) * GIB - fixed) / growing) > 4
    seconds = report["flops_compiled"] / 1e12
    assert report["mfu"]["serial"] == pytest.approx(seconds / report["seconds"]["serial"])
    said = describe(report)
    assert f"pictures that fit: {report['pictures_that_fit']}" in said
    assert any(line.startswith("MFU of the FLOPs as compiled, estimated: ") for line in said)
    small = plan_pictures(tiny, "fsdp", (fixed + 0.6 * growing) / (1 - SPARE) / GIB)
    assert not small["fits"] and small["pictures_that_fit"] == 2
    advised = [line for line in describe(small) if line.startswith("advice: ")]
    for flag in ("--pictures 2", "--preset fsdp+tensor", "--quantize int8"):
        assert sum(flag in line for line in advised) == 1


def test_where_the_compiler_refuses_sampling_the_plan_says_how_many_pictures_are_too_many(tiny):
    with refused("generate"):
        report = plan_pictures(tiny, "hsdp")
    assert not report["fits"] and "activations" not in report["memory"]
    said = describe(report)
    assert "pictures that fit: fewer than 4" in said
    assert any("--pictures 2" in line for line in said) and any(line.endswith("--preset fsdp") for line in said)
