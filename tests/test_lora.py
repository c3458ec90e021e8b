"""Adapters: they begin as nothing, they alone are trained, and merging them keeps the function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loom_jax.core import ConfigError
from loom_jax.models import LoomModel, add_lora, merge_lora
from loom_jax.nn import Projection
from loom_jax.parallel import flatten_params, make_mesh
from loom_jax.train import init_state, parameter_names, split_model
from loom_jax.train.job import draft_step
from tests import tiny, training

RANK, ALPHA = 3, 6.0


def adapted(targets=("q_proj", "decoder/layers/gen/down_proj", "o_proj"), seed=None):
    """The tiny model with adapters; with a seed their second halves are drawn too, so that they do something."""
    graphdef, params = nnx.split(tiny.model())
    model = nnx.merge(graphdef, jax.tree.map(jnp.copy, params))
    paths = add_lora(model, RANK, ALPHA, targets, nnx.Rngs(params=1))
    if seed is not None:
        for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
            if path[-1] == "lora_b":
                leaf[...] = 0.3 * jax.random.normal(jax.random.key(seed), leaf[...].shape)
                nnx.update(model, nnx.from_flat_state([(path, leaf)]))
    return model, paths


def forward(model):
    drawn = tiny.draw([tiny.DOCUMENTS])
    graphdef, params = nnx.split(model)
    call = jax.jit(lambda p, *args: nnx.merge(graphdef, p)(*args)[:2])
    return call(params, drawn.batch.streams, drawn.state, drawn.timesteps)


@functools.cache
def plain():
    return forward(tiny.model())


def test_new_adapters_change_nothing_and_are_found_by_name_and_pattern():
    model, paths = adapted()
    assert sorted(paths) == [
        "decoder/layers/gen/down_proj",
        "decoder/layers/gen/o_proj",
        "decoder/layers/gen/q_proj",
        "decoder/layers/und/o_proj",
        "decoder/layers/und/q_proj",
    ]
    for found, expected in zip(forward(model), plain(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_merging_keeps_the_function_and_the_plain_paths():
    model, _ = adapted(seed=5)
    before = forward(model)
    assert tiny.relative(before[1], plain()[1]) > 0.05
    merge_lora(model)
    assert parameter_names(nnx.state(model)) == parameter_names(nnx.state(tiny.model()))
    for found, expected in zip(forward(model), before, strict=True):
        assert tiny.relative(found, expected) < 1e-4


def test_an_adapter_is_the_published_formula():
    projection = Projection((2, 5), 7, axis=(-2, -1), use_bias=False, rngs=nnx.Rngs(0))
    projection.add_adapter(RANK, ALPHA, nnx.Rngs(params=1))
    a, b = projection.lora_a, projection.lora_b
    assert a.shape == (10, RANK) and b.shape == (RANK, 7)
    b[...] = jax.random.normal(jax.random.key(2), b.shape)
    x = np.random.default_rng(0).standard_normal((4, 2, 5))
    weight = np.asarray(projection.kernel[...], np.float64).reshape(10, 7)
    weight = weight + ALPHA / RANK * np.asarray(a[...], np.float64) @ np.asarray(b[...], np.float64)
    np.testing.assert_allclose(projection(x), x.reshape(4, 10) @ weight, rtol=1e-4, atol=1e-5)


def test_a_target_that_names_nothing_is_an_error():
    with pytest.raises(ConfigError, match="lora target 'query' names no projection: there are down_proj, gate_proj"):
        adapted(("q_proj", "query"))


def test_adapters_alone_are_trained():
    given = training.config("lora.rank=2", "lora.targets=('q_proj', 'up_proj')", "frozen=()")
    model = LoomModel(given.model, rngs=nnx.Rngs(0))
    add_lora(model, given.lora.rank, given.lora.alpha, given.lora.targets, nnx.Rngs(1))
    _, trainable, frozen = split_model(model, given)
    names = parameter_names(trainable)
    assert len(names) == 2 * 2 * 2 and {name.rsplit("/", 1)[1] for name in names} == {"lora_a", "lora_b"}
    optimizer = draft_step(given, make_mesh("single")).parts.optimizer
    begin = jax.device_get(training.shaken(init_state(trainable, frozen, optimizer, given.ema)))
    state, metrics = training.take_step(given, make_mesh("single"), begin)
    assert metrics.skipped == 0
    jax.tree.map(np.testing.assert_array_equal, state.frozen, begin.frozen)
    before, after = (flatten_params(s.trainable)[0] for s in (begin, state))
    assert all(np.abs(after[name] - before[name]).max() > 1e-5 for name in names)
    assert {leaf.shape for leaf in jax.tree.leaves(state.ema)} == {leaf.shape for leaf in jax.tree.leaves(trainable)}


def test_rank_alpha_and_targets_each_change_the_adapters():
    def shapes(*overrides):
        given = training.config("lora.rank=2", *overrides)
        draft = draft_step(given, make_mesh("single"))
        return {n: leaf.shape for n, leaf in flatten_params(draft.state.trainable)[0].items()}

    assert shapes() != shapes("lora.rank=3") and shapes() != shapes("lora.targets=('q_proj',)")
    (model, _), (other, _) = adapted(seed=5), adapted(seed=5)
    for _, module in nnx.iter_modules(other):
        if hasattr(module, "lora_scale"):
            module.lora_scale = 2 * module.lora_scale
    assert tiny.relative(forward(model)[1], forward(other)[1]) > 1e-2
