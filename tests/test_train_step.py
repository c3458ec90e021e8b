"""The step: each setting of a job changes what it says, and nothing else; nothing waits, nothing compiles twice."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.errors import KeyReuseError

from loom_jax.core import ConfigError
from loom_jax.document import NO_TOKEN
from loom_jax.nn import Purpose, make_key
from loom_jax.parallel import flatten_params, global_batch, make_mesh
from loom_jax.train import (
    ALWAYS_FROZEN,
    LossConfig,
    TrainConfig,
    apply_updates,
    build_job,
    chunked_cross_entropy,
    cross_entropy,
    draft_step,
    draw,
    gradients,
    parameter_names,
    split_model,
    update_ema,
)
from loom_jax.train.cross_entropy import vocabulary_chunks
from tests import training


def on_device(state):
    return jax.tree.map(jnp.asarray, state)


@functools.cache
def drawn(*overrides: str):
    """What a configuration draws for the first batch."""
    given = training.config(*overrides)
    parts = draft_step(given, make_mesh("single")).parts
    call = jax.jit(lambda *args: draw(parts, *args))
    return call(training.vae_params(), training.train_batch(given), jnp.int32(0))


@functools.cache
def measured(*overrides: str):
    """Gradients by name of a configuration on the first batch, from the shared weights and draws."""
    given = training.config(*overrides)
    parts = draft_step(given, make_mesh("single")).parts
    call = jax.jit(lambda *args: gradients(parts, *args)[0])
    args = on_device(state_for(given)), training.train_batch(given).batch, drawn()
    return flatten_params(jax.device_get(call(*args)))[0]


def state_for(given):
    """The shared weights, split as a configuration wants them."""
    _, trainable, frozen = split_abstract(given)
    weights = flatten_params(training.start().trainable)[0] | flatten_params(training.start().frozen)[0]

    def take(tree):
        leaves, structure = flatten_params(tree)
        return structure.unflatten([weights[name].astype(leaf.dtype) for name, leaf in leaves.items()])

    return training.start()._replace(trainable=take(trainable), frozen=take(frozen), optimizer=(), ema=None)


@functools.cache
def split_abstract(given):
    from loom_jax.train.job import _build_model

    return split_model(nnx.eval_shape(lambda: _build_model(given)), given)


def difference(found, expected):
    """Largest difference of two sets of gradients, over the rms of each tensor."""
    worst = 0.0
    for name, leaf in expected.items():
        rms = np.sqrt(np.mean(np.square(leaf, dtype=np.float64)))
        if rms:
            worst = max(worst, float(np.abs(np.asarray(found[name], np.float64) - leaf).max() / rms))
    return worst


@pytest.mark.parametrize(
    "override",
    ["remat=full", pytest.param("remat=dots", marks=pytest.mark.slow), "loss.vocab_chunk=100", "attention=blockwise"],
)
def test_how_it_is_computed_does_not_change_the_gradient(override):
    assert difference(measured(override), measured()) < 1e-4


def test_bfloat16_is_close_but_not_equal():
    grads = measured("compute_dtype=bfloat16")
    assert {leaf.dtype for leaf in grads.values()} == {np.dtype("float32")}  # as the masters are
    plain = measured()
    assert difference(grads, plain) > 1e-3 and grads.keys() == plain.keys()
    both = [np.concatenate([np.ravel(g[name]).astype(np.float64) for name in plain]) for g in (grads, plain)]
    assert np.dot(*both) / np.prod([np.linalg.norm(b) for b in both]) > 0.99


def test_loss_weights_scale_their_part_of_the_gradient():
    plain, ce, mse = (measured(*o) for o in ((), ("loss.mse_weight=0",), ("loss.ce_weight=0",)))
    assert difference({n: ce[n] + mse[n] for n in plain}, plain) < 1e-4
    assert not mse["lm_head/kernel"].any() and ce["lm_head/kernel"].any()
    assert not ce["llm2vae/kernel"].any() and mse["llm2vae/kernel"].any()


def test_reweighting_changes_text_gradients_alone():
    plain, reweighted = measured(), measured("loss.reweight=True")
    assert difference(reweighted, plain) > 1e-2
    np.testing.assert_allclose(reweighted["llm2vae/kernel"], plain["llm2vae/kernel"], rtol=1e-4, atol=1e-7)


def test_freeze_und_cuts_und_gradients_only():
    plain, cut = measured(), measured("freeze_und=True")
    gen = ("gen", "vae2llm", "llm2vae", "time_embedder", "lm_head")
    for name, gradient in cut.items():
        assert bool(gradient.any()) == any(part in gen for part in name.split("/")), name
    np.testing.assert_allclose(cut["llm2vae/kernel"], plain["llm2vae/kernel"], rtol=1e-4, atol=1e-7)


def test_another_seed_or_shift_draws_anew_and_another_step_too():
    draws, other, shifted = (drawn(*o) for o in ((), ("seed=1",), ("model.timestep_shift=3.0",)))
    for name in ("clean", "noise", "timesteps"):
        assert np.abs(getattr(draws, name) - getattr(other, name)).max() > 1e-3
    np.testing.assert_allclose(shifted.timesteps, 3 * draws.timesteps / (1 + 2 * draws.timesteps), rtol=1e-5)


def test_the_vit_is_frozen_unless_asked_and_its_key_bias_always():
    default = TrainConfig(training.config().model, training.config().data).frozen
    assert default == ("vit/*",)
    _, trainable, frozen = split_abstract(training.config())
    assert all(name.startswith("vit/") or name in ALWAYS_FROZEN for name in parameter_names(frozen))
    _, trainable, frozen = split_abstract(training.config("frozen=()"))
    assert set(parameter_names(frozen)) == set(ALWAYS_FROZEN)
    grads = measured("frozen=()")
    assert all(grads[name].any() for name in grads if name.startswith("vit/"))
    with pytest.raises(ConfigError, match=r"frozen pattern 'vti/\*' fits no parameter"):
        draft_step(training.config("frozen=('vti/*',)"), make_mesh("single"))
    with pytest.raises(ConfigError, match="nothing is trained"):
        draft_step(training.config("frozen=('*',)"), make_mesh("single"))


@functools.cache
def two_steps(*overrides: str):
    """The states after one and two steps, and the metrics of the second."""
    given = training.config(*overrides)
    draft = draft_step(given, make_mesh("single"))
    begin = state_for(given)
    ema = jax.tree.map(lambda a: a.astype(given.ema.dtype), begin.trainable)
    begin = begin._replace(optimizer=jax.device_get(draft.parts.optimizer.init(begin.trainable)), ema=ema)
    rows = [training.train_batch(given, number) for number in (1, 2)]
    step = draft.step if overrides else training.base().step
    first, _ = step(on_device(begin), training.vae_params(), rows[0])
    kept = jax.device_get(first)
    second, metrics = step(first, training.vae_params(), rows[1])
    return begin, kept, jax.device_get(second), jax.device_get(metrics)


def test_a_step_moves_the_trained_parameters_their_average_and_nothing_else():
    begin, first, second, metrics = two_steps()
    assert (second.step, second.skipped, second.bad_steps) == (2, 0, 0)
    np.testing.assert_allclose(metrics.learning_rate, 1e-3)
    assert metrics.loss == pytest.approx(metrics.ce + metrics.mse) and metrics.finite.all()
    jax.tree.map(np.testing.assert_array_equal, second.frozen, begin.frozen)
    names = flatten_params(begin.trainable)[0]
    for name in names:
        start, one, two = (flatten_params(s.trainable)[0][name] for s in (begin, first, second))
        assert np.abs(one - start).max() > 1e-5 and np.abs(two - one).max() > 1e-5, name
        average = flatten_params(second.ema)[0][name]
        np.testing.assert_allclose(average, 0.9 * (0.9 * start + 0.1 * one) + 0.1 * two, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_lean_states_in_bfloat16_take_the_same_way():
    _, _, plain, _ = two_steps()
    lean = "param_dtype=bfloat16", "ema.dtype=bfloat16", "optimizer.moment_dtype=bfloat16"
    begin, _, state, _ = two_steps(*lean)
    for tree in (state.trainable, state.ema):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("bfloat16")}
    for name in ("lm_head/kernel", "decoder/layers/gen/up_proj/kernel"):
        moved, expected = (
            np.asarray(flatten_params(s.trainable)[0][name], np.float32)
            - flatten_params(training.start().trainable)[0][name]
            for s in (state, plain)
        )
        assert np.corrcoef(moved.ravel(), expected.ravel())[0, 1] > 0.8, name


def test_a_step_that_is_not_finite_changes_nothing_but_the_counters():
    step, rows = training.base().step, training.train_batch(training.config())
    state = training.start()
    leaves, structure = flatten_params(state.trainable)
    name = "decoder/norm/gen/scale"
    broken = structure.unflatten([np.full_like(a, np.nan) if n == name else a for n, a in leaves.items()])
    bad = state._replace(trainable=broken, step=np.int32(4), bad_steps=np.int32(1), skipped=np.int32(3))
    after, metrics = jax.device_get(step(on_device(bad), training.vae_params(), rows))
    assert metrics.skipped == 1 and metrics.bad_steps == 2
    assert (after.step, after.skipped, after.bad_steps) == (5, 4, 2)
    for part in ("trainable", "optimizer", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(bad, part))
    assert not metrics.finite[-1] and len(metrics.finite) == len(leaves) + 1
    mended = on_device(bad._replace(trainable=state.trainable))
    good, metrics = jax.device_get(step(mended, training.vae_params(), rows))
    assert (good.bad_steps, good.skipped, metrics.skipped) == (0, 3, 0)


def test_the_step_compiles_once_and_transfers_nothing_by_itself():
    job = training.base()
    state = jax.device_put(training.start(), job.shardings)
    data = job.open_data()
    batches = [next(data) for _ in range(3)]
    data.close()
    job.step.clear_cache()
    before = state
    with jax.transfer_guard("disallow"):
        for batch in batches:
            state, metrics = job.step(state, job.vae_params, global_batch(batch, job.mesh))
    assert job.step._cache_size() == 1
    assert int(metrics.skipped) == 0
    # Its memory is that of the next state.
    assert all(a.is_deleted() for a in jax.tree.leaves((before.trainable, before.ema, before.optimizer)))


def test_a_deeper_model_is_no_larger_a_program():
    """Layers are scanned, so compiling 28 of them takes no longer than 4."""

    def size(layers):
        config = training.config(f"model.decoder.num_layers={layers}")
        draft = draft_step(config, make_mesh("single"))
        batch = jax.eval_shape(lambda: training.train_batch(config))
        return len(draft.step.lower(draft.state, draft.vae, batch).as_text())

    assert size(28) < 1.01 * size(4)


def test_no_key_is_used_twice():
    parts = draft_step(training.config(), make_mesh("single")).parts
    batch = training.train_batch(training.config())
    lean = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(4, jnp.bfloat16)}

    def everything(step):
        params = apply_updates(lean, lean, make_key(3, Purpose.ROUNDING, step))
        average = update_ema(lean, params, 0.9, make_key(3, Purpose.AVERAGE_ROUNDING, step))
        return draw(parts, training.vae_params(), batch, step), params, average

    with jax.debug_key_reuse(True):
        jax.jit(everything)(jnp.int32(3))
        with pytest.raises(KeyReuseError):
            jax.jit(lambda key: (jax.random.normal(key), jax.random.bits(key)))(jax.random.key(0))


@pytest.mark.parametrize("vocab", [96, 97, 130])
@pytest.mark.parametrize("chunk", [1, 7, 32, 96, 1000])
@pytest.mark.parametrize("labelled", [0.0, 0.3, 0.9])
def test_chunked_cross_entropy_is_the_plain_one(vocab, chunk, labelled):
    rng = np.random.default_rng(vocab)
    hidden, kernel = rng.standard_normal((2, 11, 6), np.float32), rng.standard_normal((6, vocab), np.float32)
    labels = np.where(rng.random((2, 11)) < labelled, rng.integers(0, vocab, (2, 11)), NO_TOKEN).astype(np.int32)
    if labelled:
        labels[0, 9], labels[1, 0], labels[1, 1] = NO_TOKEN, vocab - 1, 0

    def plain(hidden, kernel):
        return cross_entropy(hidden @ kernel, labels)

    def chunked(hidden, kernel):
        return chunked_cross_entropy(hidden, kernel, labels, chunk)

    np.testing.assert_allclose(chunked(hidden, kernel), plain(hidden, kernel), rtol=1e-5, atol=1e-5)
    weight = rng.standard_normal((2, 11), np.float32)
    found, expected = (
        jax.grad(lambda h, k, f=f: (f(h, k) * weight).sum(), (0, 1))(hidden, kernel) for f in (chunked, plain)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def test_vocabularies_are_cut_in_few_parts():
    assert vocabulary_chunks(152_064, 16_384) == 11  # divides: no column is filler
    assert vocabulary_chunks(151_681, 16_384) == 10  # a prime but one: filler instead of a part for each column
    assert vocabulary_chunks(500, 16_384) == 1


def test_gradients_of_logits_are_rounded_like_activations():
    """So that products with bfloat16 weights are of bfloat16, and padded tokens of other rows change nothing."""
    rng = np.random.default_rng(0)
    hidden, kernel = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((2, 9, 16), (16, 70)))
    labels = np.full((2, 9), NO_TOKEN, np.int32)
    labels[0, [1, 7]], labels[1, 4] = (3, 69), 12

    def loss(hidden, kernel, chunk):
        return chunked_cross_entropy(hidden, kernel, labels, chunk).sum()

    found, exact = (
        jax.grad(loss, (0, 1))(hidden.astype(dtype), kernel.astype(dtype), 32) for dtype in (jnp.bfloat16, jnp.float32)
    )
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=0.05, atol=0.02)


def test_logits_of_the_whole_vocabulary_never_exist():
    vocab, tokens = 512, 40
    hidden, labels = jnp.ones((1, tokens, 8)), jnp.zeros((1, tokens), jnp.int32)

    def loss(kernel):
        return chunked_cross_entropy(hidden, kernel, labels, 64).sum()

    sizes = set()

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            sizes.update(v.aval.shape for v in equation.outvars if {tokens, tokens // 4} & {*v.aval.shape})
            for value in equation.params.values():
                for inner in value if isinstance(value, tuple | list) else (value,):
                    if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                        visit(getattr(inner, "jaxpr", inner))

    visit(jax.make_jaxpr(jax.grad(loss))(jnp.ones((8, vocab))).jaxpr)
    assert max(int(np.prod(shape)) for shape in sizes) == tokens // 4 * 64


def test_every_field_of_the_loss_has_a_test_here():
    assert {field.name for field in dataclasses.fields(LossConfig)} == {
        "ce_weight",
        "mse_weight",
        "reweight",
        "vocab_chunk",
    }


def test_the_gradient_norm_is_that_of_the_gradients():
    _, metrics = training.take_step(training.config(), make_mesh("single"))
    squares = [(g.astype(np.float64) ** 2).sum() for g in measured().values()]
    np.testing.assert_allclose(metrics.grad_norm, np.sqrt(sum(squares)), rtol=1e-5)


def test_rows_must_divide_over_devices_and_microbatches():
    with pytest.raises(ConfigError, match=r"data.rows=8 .* microbatches=3: make it a multiple of 3"):
        build_job(training.config("microbatches=3"))
    with pytest.raises(ConfigError, match=r"data.rows=4 on a mesh of \{'fsdp': 8\}.*a multiple of 8"):
        build_job(training.config("data.rows=4", "mesh.preset=fsdp"))
