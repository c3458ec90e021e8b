"""The CPU benchmark runs; linear layers with their own backward pass compute what plain products do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loom_jax.nn import choose_attention, dense_attention, document_attention, linear_dot
from tests.test_attention import first, qkv, some

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("outputs", [(6, 4), (2,), (1, 2)])
@pytest.mark.parametrize("inner", [1, 2])
def test_linear_dot_has_the_values_and_gradients_of_a_plain_product(inner, outputs):
    rng = np.random.default_rng(0)
    shapes = (2, 5, 4, 3), (*(4, 3)[2 - inner :], *outputs)
    x, kernel = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes)
    weight = jnp.asarray(rng.standard_normal(jnp.tensordot(x, kernel, inner).shape), jnp.float32)

    def plain(x, kernel):
        return (jnp.tensordot(x, kernel, inner) * weight).sum()

    def ours(x, kernel):
        summed = tuple(range(4 - inner, 4)), tuple(range(inner))
        return (linear_dot(x, kernel, (summed, ((), ()))) * weight).sum()

    np.testing.assert_allclose(ours(x, kernel), plain(x, kernel), rtol=1e-5)
    for a, b in zip(jax.grad(ours, (0, 1))(x, kernel), jax.grad(plain, (0, 1))(x, kernel), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_linear_dot_keeps_dtypes_and_sums_in_the_one_asked_for():
    x, kernel = jnp.ones((3, 4), jnp.bfloat16), jnp.ones((4, 2), jnp.bfloat16)
    out, pull = jax.vjp(lambda x, k: linear_dot(x, k, preferred_element_type=jnp.float32), x, kernel)
    assert out.dtype == jnp.float32
    assert [g.dtype for g in pull(out)] == [jnp.bfloat16, jnp.bfloat16]


def test_few_queries_on_a_cpu_are_dense_and_long_rows_go_by_documents(monkeypatch):
    attend = choose_attention("auto", "cpu")
    layout, (q, k, v) = some(), qkv(37)
    np.testing.assert_array_equal(attend(q, k, v, layout, layout), dense_attention(q, k, v, layout, layout))
    monkeypatch.setattr("loom_jax.nn.backends._SMALL", 0)
    by_documents = attend(q, k, v, layout, layout)
    np.testing.assert_array_equal(by_documents, document_attention(q, k, v, layout, layout))
    one = attend(q[:, :1], k, v, first(layout, 1), layout)
    np.testing.assert_array_equal(one, dense_attention(q[:, :1], k, v, first(layout, 1), layout))


def test_benchmark_prints_and_writes_times_and_floors(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "cpu_step", "--smoke", "--out", str(tmp_path / "o.json")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert [row["work"] for row in rows] == ["train", "sample"]
    assert all(row["ours_seconds"] > 0 and row["floor"] > 0 for row in rows)
    assert "floor" in done.stdout
