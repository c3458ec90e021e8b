"""Schedules, optimizers, averages and rounding on small trees: every setting changes what it says it changes."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from loom_jax.core import ConfigError, from_mapping
from loom_jax.parallel import flatten_params, make_mesh
from loom_jax.train import (
    EmaConfig,
    LossConfig,
    OptimizerConfig,
    WatchConfig,
    apply_updates,
    decay_mask,
    init_state,
    learning_rate,
    make_optimizer,
    round_stochastically,
    update_ema,
)

PLAIN = OptimizerConfig(
    learning_rate=1e-2, warmup_steps=2, eps=1e-8, weight_decay=0.1, schedule="cosine", clip_norm=0.5
)
SHAPES = {"embed_tokens/embedding": (9, 4), "lm_head/kernel": (130, 129), "norm/scale": (5,), "q_proj/bias": (2, 3)}


def tree(scale: float, seed: int, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    out: dict = {}
    for path, shape in SHAPES.items():
        module, name = path.split("/")
        out[module] = {name: jnp.asarray(scale * rng.standard_normal(shape), dtype)}
    return out


def run(config: OptimizerConfig, steps: int = 5, scale: float = 1.0, dtype=jnp.float32):
    """Parameters after some steps with random gradients of a norm far above the clipping, and the optimizer's state."""
    optimizer, params = make_optimizer(config, 10), tree(1.0, 0, dtype)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(steps):
        updates, state = update(tree(scale * (1 + step), 1 + step, dtype), state, params)
        params = apply_updates(params, updates, jax.random.key(step))
    return params, state


CHANGES = {
    "name": "adafactor",
    "learning_rate": 2e-2,
    "schedule": "constant",
    "warmup_steps": 3,
    "min_learning_rate": 5e-3,
    "decay_steps": 20,
    "b1": 0.5,
    "b2": 0.5,
    "eps": 1e-2,
    "weight_decay": 0.3,
    "clip_norm": 0.0,
    "moment_dtype": "bfloat16",
}


def test_every_setting_changes_the_update():
    assert set(CHANGES) == {field.name for field in dataclasses.fields(OptimizerConfig)}
    plain = np.asarray(run(PLAIN)[0]["lm_head"]["kernel"])
    for name, value in CHANGES.items():
        changed = np.asarray(run(dataclasses.replace(PLAIN, **{name: value}))[0]["lm_head"]["kernel"])
        assert np.abs(changed - plain).max() > 1e-6, name


def test_adamw_is_the_published_formula():
    """Against numpy in float64, with clipping and decay of matrices alone."""
    params, m, v = (dict.fromkeys(SHAPES, 0.0) for _ in range(3))
    params |= {name: np.asarray(leaf, np.float64) for name, leaf in flatten_params(tree(1.0, 0))[0].items()}
    rate = learning_rate(PLAIN, 10)
    for step in range(5):
        grads = {n: np.asarray(g, np.float64) for n, g in flatten_params(tree(1.0 + step, 1 + step))[0].items()}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for n, g in grads.items():
            g = g * min(1, PLAIN.clip_norm / norm)
            m[n], v[n] = PLAIN.b1 * m[n] + (1 - PLAIN.b1) * g, PLAIN.b2 * v[n] + (1 - PLAIN.b2) * g**2
            update = m[n] / (1 - PLAIN.b1 ** (step + 1)) / (np.sqrt(v[n] / (1 - PLAIN.b2 ** (step + 1))) + PLAIN.eps)
            decay = PLAIN.weight_decay * params[n] if n == "lm_head/kernel" else 0.0
            params[n] = params[n] - float(rate(step)) * (update + decay)
    for n, leaf in flatten_params(run(PLAIN)[0])[0].items():
        np.testing.assert_allclose(leaf, params[n], rtol=2e-5, atol=2e-6, err_msg=n)


def test_only_matrices_decay():
    mask = flatten_params(decay_mask(tree(1.0, 0)))[0]
    assert mask == {name: name == "lm_head/kernel" for name in SHAPES}
    stacked = {"layers": {"norm": {"scale": jnp.ones((3, 5))}, "k_proj": {"bias": jnp.ones((3, 2, 4))}}}
    assert not any(jax.tree.leaves(decay_mask(stacked)))  # of stacked layers too, though they have two dimensions


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_a_parameter_without_gradient_does_not_move(name):
    config = dataclasses.replace(PLAIN, name=name, weight_decay=0.0)
    optimizer, params = make_optimizer(config, 10), tree(1.0, 0)
    state = optimizer.init(params)
    for step in range(4):
        gradients = {**tree(1.0, step), "lm_head": {"kernel": jnp.zeros(SHAPES["lm_head/kernel"])}}
        updates, state = optimizer.update(gradients, state, params)
        moved = {n: float(jnp.abs(u).max()) for n, u in flatten_params(updates)[0].items()}
        assert moved["lm_head/kernel"] == 0 and (step == 0 or moved["norm/scale"] > 0)


def test_clipping_keeps_the_direction_and_leaves_small_gradients_alone():
    def first_moment(clip, scale):
        _, state = run(dataclasses.replace(PLAIN, clip_norm=clip), steps=1, scale=scale)
        leaves = flatten_params(state)[0]
        return np.concatenate([np.ravel(leaf) for name, leaf in leaves.items() if "/mu/" in name]) / (1 - PLAIN.b1)

    free, clipped = first_moment(0.0, 1.0), first_moment(0.5, 1.0)
    np.testing.assert_allclose(np.linalg.norm(clipped), 0.5, rtol=1e-5)
    np.testing.assert_allclose(clipped, free * 0.5 / np.linalg.norm(free), rtol=1e-4, atol=1e-9)
    np.testing.assert_array_equal(first_moment(0.5, 1e-4), first_moment(0.0, 1e-4))


def test_moments_are_kept_as_the_configuration_says():
    def dtypes(config, dtype=jnp.float32):
        leaves = flatten_params(run(config, 1, dtype=dtype)[1])[0]
        return {leaf.dtype for name, leaf in leaves.items() if "/mu/" in name or "/nu/" in name}

    assert dtypes(PLAIN) == {jnp.dtype("float32")}
    assert dtypes(PLAIN, jnp.bfloat16) == {jnp.dtype("float32")}  # whatever the parameters are
    lean = dataclasses.replace(PLAIN, moment_dtype="bfloat16")
    assert dtypes(lean) == {jnp.dtype("bfloat16")}
    full, rounded = (np.asarray(run(c)[0]["lm_head"]["kernel"]) for c in (PLAIN, lean))
    assert np.abs(rounded - full).max() < 0.05 * PLAIN.learning_rate * 5


def test_adafactor_keeps_far_fewer_numbers():
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(run(dataclasses.replace(PLAIN, name=name), 1)[1]))
        for name in ("adamw", "adafactor")
    ]
    assert sizes[1] < sizes[0] / 20


def test_muon_moves_matrices_of_layers_equally_in_all_directions():
    """Singular values of its first update are near one, times what makes it as large as Adam's; layers stand alone."""
    shapes = {"q_proj": (2, 12, 3, 5), "o_proj": (2, 3, 5, 12), "down_proj": (2, 7, 12)}
    rng = np.random.default_rng(0)
    # Of layer 0 much larger than of layer 1, and along one direction far larger than along the others.
    grads = {
        name: {"kernel": rng.standard_normal(shape) * np.arange(1, shape[-1] + 1) ** 2 * [[[100]], [[1]]]}
        if len(shape) == 3
        else {"kernel": rng.standard_normal(shape) * np.arange(1, shape[-1] + 1) ** 2}
        for name, shape in shapes.items()
    }
    params = {"decoder": {"layers": {"und": grads}}, "lm_head": {"kernel": rng.standard_normal((12, 9))}}
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    config = OptimizerConfig(name="muon", learning_rate=1e-2, warmup_steps=0, clip_norm=0.0, eps=1e-8)
    optimizer = make_optimizer(config, 10)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    for name, inputs in (("q_proj", 12), ("o_proj", 15), ("down_proj", 7)):
        for layer in updates["decoder"]["layers"]["und"][name]["kernel"]:
            matrix = np.asarray(layer).reshape(inputs, -1)
            values = np.linalg.svd(matrix, compute_uv=False) / (1e-2 * 0.2 * max(matrix.shape) ** 0.5)
            assert values.min() > 0.5 and values.max() < 1.4, (name, values)
    sizes = np.abs(updates["lm_head"]["kernel"])  # of Adam's first step, with Nesterov's momentum
    np.testing.assert_allclose(sizes, sizes.mean(), rtol=1e-3)
    assert 1e-2 < sizes.mean() < 2e-2


@pytest.mark.parametrize("layers", [16, 5])
def test_muon_deals_its_layers_out_to_all_devices(layers):
    mesh = make_mesh({"data": 2, "fsdp": -1})
    assert mesh.size == 8
    rng = np.random.default_rng(0)
    names = ("gate_proj", "down_proj")
    grads = {name: {"kernel": rng.standard_normal((layers, 24, 40)).astype(np.float32)} for name in names}
    params = {"decoder": {"layers": {"gen": grads}}, "lm_head": {"kernel": rng.standard_normal((12, 9))}}
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    config = OptimizerConfig(name="muon", learning_rate=1e-2, warmup_steps=0, clip_norm=0.0, eps=1e-8)
    everywhere = NamedSharding(mesh, P())
    found, flops = [], []
    for optimizer in (make_optimizer(config, 10), make_optimizer(config, 10, mesh)):
        state = jax.jit(optimizer.init, out_shardings=everywhere)(params)
        step = jax.jit(optimizer.update, in_shardings=everywhere, out_shardings=everywhere)
        compiled = step.lower(params, state, params).compile()
        flops.append(compiled.cost_analysis()["flops"])
        found.append(compiled(*jax.device_put((params, state, params), everywhere)))
    chex.assert_trees_all_close(found[0], found[1], rtol=1e-4, atol=1e-7)
    assert flops[1] < flops[0] * (-(-layers // 8) / layers + 0.1)


def test_schedules():
    constant = learning_rate(OptimizerConfig(learning_rate=3.0, warmup_steps=4), 100)
    np.testing.assert_allclose([constant(s) for s in range(7)], [0, 0.75, 1.5, 2.25, 3, 3, 3])
    at_once = learning_rate(OptimizerConfig(learning_rate=3.0, warmup_steps=0), 100)
    assert float(at_once(0)) == 3
    cosine = learning_rate(
        OptimizerConfig(learning_rate=3.0, schedule="cosine", warmup_steps=2, min_learning_rate=1.0), 12
    )
    np.testing.assert_allclose([cosine(s) for s in (0, 1, 2, 7, 12)], [0, 1.5, 3, 2, 1], rtol=1e-6)
    longer = learning_rate(
        OptimizerConfig(learning_rate=3.0, schedule="cosine", warmup_steps=2, min_learning_rate=1.0, decay_steps=12), 7
    )
    assert [longer(s) for s in range(8)] == [cosine(s) for s in range(8)]
    with pytest.raises(ConfigError, match="decay_steps=2: must be after"):
        OptimizerConfig(warmup_steps=2, decay_steps=2)


def test_the_average_follows_in_its_own_dtype():
    params = tree(1.0, 3)
    average = jax.tree.map(jnp.zeros_like, params)
    moved = update_ema(average, params, 0.9, jax.random.key(0))
    np.testing.assert_allclose(moved["norm"]["scale"], 0.1 * params["norm"]["scale"], rtol=1e-6)
    same = update_ema(params, params, 0.9999, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, same, params)
    assert update_ema(None, params, 0.9, jax.random.key(0)) is None


def test_an_average_in_bfloat16_moves_at_the_slowest_decay():
    """By 1e-4 of the distance a step: rounding to the nearest would leave it where it is for good."""
    params, average = {"a": jnp.full(4096, 2.0)}, {"a": jnp.ones(4096, jnp.bfloat16)}
    update = jax.jit(lambda average, key: update_ema(average, params, 0.9999, key))
    for step in range(200):
        average = update(average, jax.random.key(step))
    assert average["a"].dtype == jnp.bfloat16
    np.testing.assert_allclose(average["a"].astype(jnp.float32).mean(), 2 - 0.9999**200, atol=2e-3)


def test_bfloat16_masters_move_in_the_mean():
    """Updates of 2e-5 on parameters near one, whose neighbours in bfloat16 lie 4e-3 to 8e-3 away."""
    params = {"a": jnp.ones((64, 64), jnp.bfloat16), "b": jnp.full((64, 64), -1.0, jnp.bfloat16)}
    updates = jax.tree.map(lambda a: jnp.full(a.shape, 2e-5), params)
    nearest = jax.tree.map(lambda a, u: a + u.astype(a.dtype), params, updates)
    jax.tree.map(np.testing.assert_array_equal, nearest, params)  # the fault that this is about
    step = jax.jit(apply_updates)
    for number in range(50):
        params = step(params, updates, jax.random.key(number))
    for name, begin in (("a", 1.0), ("b", -1.0)):
        assert params[name].dtype == jnp.bfloat16
        np.testing.assert_allclose(params[name].astype(jnp.float32).mean() - begin, 50 * 2e-5, atol=3e-4)
    assert np.any(np.asarray(params["a"][:32] != params["a"][32:]))


def test_stochastic_rounding_is_unbiased_and_keeps_what_bfloat16_can_hold():
    values = jnp.asarray([1.0, -3.5, 0.0, jnp.inf, -jnp.inf], jnp.float32)
    np.testing.assert_array_equal(round_stochastically(values, jax.random.key(0)), values.astype(jnp.bfloat16))
    assert jnp.isnan(round_stochastically(jnp.asarray([jnp.nan]), jax.random.key(0)))[0]
    between = jnp.full(1 << 16, 1.0 + 2**-7 * 0.3)
    rounded = np.asarray(round_stochastically(between, jax.random.key(1)), np.float32)
    assert set(np.unique(rounded)) == {1.0, 1.0 + 2**-7}
    np.testing.assert_allclose((rounded > 1).mean(), 0.3, atol=0.01)


def test_the_first_state_holds_an_average_only_where_it_is_on():
    params = tree(1.0, 0)
    optimizer = make_optimizer(PLAIN, 10)
    assert init_state(params, {}, optimizer, EmaConfig(decay=0.0)).ema is None
    lean = init_state(params, {}, optimizer, EmaConfig(decay=0.9, dtype="bfloat16")).ema
    assert {leaf.dtype for leaf in jax.tree.leaves(lean)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("cls", "values", "says"),
    [
        (OptimizerConfig, {"learning_rate": 0.0}, "learning_rate=0.0: must be positive"),
        (OptimizerConfig, {"clip_norm": -1.0}, "clip_norm=-1.0"),
        (OptimizerConfig, {"name": "sgd"}, "'sgd' is not one of 'adamw', 'adafactor', 'muon'"),
        (EmaConfig, {"decay": 1.0}, "ema.decay=1.0"),
        (LossConfig, {"vocab_chunk": 0}, "vocab_chunk=0: must be at least 1"),
        (WatchConfig, {"log_every": 0}, "watch.log_every=0: must be at least 1"),
        (WatchConfig, {"sample_every": 3}, "watch.sample_prompts is empty"),
    ],
)
def test_settings_that_make_no_sense_are_refused(cls, values, says):
    with pytest.raises(ConfigError, match=says):
        from_mapping(cls, values)
