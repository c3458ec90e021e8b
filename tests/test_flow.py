"""Rope, the flow, position and timestep embeddings, buckets, and random keys."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loom_jax.generate import bucket, canvas_side
from loom_jax.nn import (
    Purpose,
    apply_rope,
    denoising_schedule,
    interpolate,
    make_key,
    rope_frequencies,
    rope_tables,
    shift_timesteps,
    sincos_2d_table,
    timestep_sinusoid,
    training_timesteps,
    velocity_target,
)

HEAD, THETA = 10, 500.0
RNG = np.random.default_rng(0)


def turned(x, positions):
    """x [S, A] of one head at `positions`."""
    return np.asarray(apply_rope(x[None, :, None], rope_tables(jnp.asarray(positions)[None], HEAD, THETA)))[0, :, 0]


def test_rope_turns_halves_as_complex_numbers():
    x, positions = RNG.standard_normal((4, HEAD), np.float32), np.asarray([0, 1, 7, 1000])
    angles = positions[:, None] * THETA ** (-2 * np.arange(HEAD // 2) / HEAD)
    z = (x[:, : HEAD // 2] + 1j * x[:, HEAD // 2 :]) * np.exp(1j * angles)
    np.testing.assert_allclose(turned(x, positions), np.concatenate([z.real, z.imag], axis=1), atol=2e-4)
    np.testing.assert_array_equal(turned(x, positions)[0], x[0])


def test_rope_products_depend_on_the_distance_alone():
    q, k = RNG.standard_normal((2, HEAD), np.float32)
    products = [turned(q[None], [a])[0] @ turned(k[None], [b])[0] for a, b in ((3, 1), (102, 100), (2, 0), (1, 3))]
    np.testing.assert_allclose(products[:3], products[0], rtol=1e-4)
    assert abs(products[3] - products[0]) > 1e-2


def test_rope_keeps_the_dtype_and_computes_in_float32():
    x = RNG.standard_normal((1, 3, 2, HEAD), np.float32)
    tables = rope_tables(jnp.asarray([[1, 2, 900]]), HEAD, THETA)
    out = apply_rope(jnp.asarray(x, jnp.bfloat16), tables)
    assert out.dtype == jnp.bfloat16 and tables[0].dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(out, np.float32), apply_rope(x, tables), atol=0.04)
    assert rope_frequencies(HEAD, THETA).shape == (HEAD // 2,)


def test_the_flow_runs_straight_from_data_to_noise():
    clean, noise = RNG.standard_normal((2, 2, 3, 5), np.float32)
    at = {t: np.asarray(interpolate(clean, noise, jnp.full((2, 3), t))) for t in (0.0, 0.25, 0.75, 1.0)}
    np.testing.assert_array_equal(at[0.0], clean)
    np.testing.assert_array_equal(at[1.0], noise)
    np.testing.assert_allclose((at[0.75] - at[0.25]) / 0.5, velocity_target(clean, noise), atol=1e-6)
    rowwise = interpolate(clean, noise, jnp.asarray([[0.25], [0.75]]))
    np.testing.assert_array_equal(rowwise, np.stack([at[0.25][0], at[0.75][1]]))


def test_euler_steps_along_the_true_velocity_end_at_the_data():
    clean, noise = RNG.standard_normal((2, 6), np.float32)
    times, x = denoising_schedule(7, 3.0), noise
    for t, after in itertools.pairwise(times):
        x = x - velocity_target(clean, noise) * (t - after)
    np.testing.assert_allclose(x, clean, atol=1e-6)


def test_training_timesteps():
    normal = jnp.asarray([-jnp.inf, -40.0, -1.0, 0.0, 2.0, 40.0])
    plain, shifted = training_timesteps(normal, 1.0), training_timesteps(normal, 3.0)
    np.testing.assert_allclose(plain, 1 / (1 + np.exp(-np.asarray(normal, np.float64))), rtol=1e-6)
    assert plain[0] == shifted[0] == 0.0 and plain[3] == 0.5 and shifted[3] == 0.75
    assert (jnp.diff(shifted) > 0).all() and (shifted[2:5] > plain[2:5]).all() and shifted[-1] <= 1.0


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(points=st.integers(2, 200), shift=st.floats(0.2, 8.0))
def test_schedules_fall_from_one_to_zero(points, shift):
    times = denoising_schedule(points, shift)
    assert times.dtype == np.float32 and times.shape == (points,)
    assert times[0] == 1.0 and times[-1] == 0.0 and (np.diff(times) < 0).all()
    even = np.linspace(1, 0, points)
    np.testing.assert_allclose(times, shift * even / (1 + (shift - 1) * even), atol=1e-6)
    np.testing.assert_allclose(times, shift_timesteps(jnp.asarray(even, jnp.float32), shift), atol=1e-6)


def test_position_table_puts_the_column_first():
    side, dim = 7, 12
    table = sincos_2d_table(dim, side).reshape(side, side, dim)
    for row, column in ((0, 0), (2, 5), (6, 1)):
        expected = [f(u * 10000 ** (-k / 3)) for u in (column, row) for f in (np.sin, np.cos) for k in range(3)]
        np.testing.assert_allclose(table[row, column], expected, atol=1e-7)
    assert table.dtype == np.float32


def test_timestep_sinusoid():
    t = jnp.asarray([[0.0, 0.3], [0.5, 1.0]])
    out = timestep_sinusoid(t)
    args = np.asarray(t, np.float64)[..., None] * np.exp(-np.log(10000) * np.arange(128) / 128)
    np.testing.assert_allclose(out, np.concatenate([np.cos(args), np.sin(args)], -1), atol=1e-6)
    assert out.shape == (2, 2, 256) and out.dtype == jnp.float32


def test_keys_differ_by_seed_step_and_purpose():
    cases = itertools.product((0, 1, 2), (0, 1, 2), Purpose)
    data = [tuple(jax.random.key_data(make_key(seed, purpose, step)).tolist()) for seed, step, purpose in cases]
    assert len(set(data)) == len(data)
    again = jax.jit(lambda seed, step: jax.random.key_data(make_key(seed, Purpose.FLOW_NOISE, step)))(1, 2)
    np.testing.assert_array_equal(again, jax.random.key_data(make_key(1, Purpose.FLOW_NOISE, 2)))


def test_purposes_keep_their_numbers():
    """A renumbering would change the meaning of every seed that anybody wrote down."""
    names = ["INIT", "POSTERIOR_NOISE", "INITIAL_NOISE", "TEXT_SAMPLING", "TIMESTEP", "FLOW_NOISE"]
    assert [p.name for p in Purpose][: len(names)] == names
    assert [int(p) for p in Purpose][: len(names)] == list(range(len(names)))


@pytest.mark.parametrize("smallest", [16, 32])
def test_buckets_hold_their_lengths_and_are_few(smallest):
    sizes = [bucket(n, smallest) for n in range(20_000)]
    assert all(size >= n for n, size in enumerate(sizes)) and sizes == sorted(sizes)
    assert sizes[0] == 0 and len(set(sizes)) <= 24
    assert all(size <= max(1.5 * n, smallest) for n, size in enumerate(sizes) if n)


def test_canvases_hold_their_pictures_and_are_few():
    sides = [canvas_side(n) for n in range(16, 1025, 8)]
    assert all(side >= n for n, side in zip(range(16, 1025, 8), sides, strict=True))
    assert sorted(set(sides)) == [64, 128, 256, 512, 768, 1024]
