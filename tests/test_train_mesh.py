"""How a job lies on its devices changes no number: every preset, micro-batches, two processes."""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from loom_jax.checkpoint import read_run_params
from loom_jax.parallel import flatten_params, make_mesh
from loom_jax.train import train
from tests import training
from tests.flags import xla_flags

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def alone():
    return training.take_step(training.config(), make_mesh("single"))


def rms(array):
    return np.sqrt(np.mean(np.square(array, dtype=np.float64)))


def assert_same_step(found, expected):
    """Loss 1e-5 relative; gradients (a tenth of which AdamW's first moment holds) and parameters 1e-4 of rms.

    AdamW's first update is the gradient divided by its own size: where a gradient is less than 1e-5 of rms, rounding
    decides the update, and the gradient alone is compared.
    """
    (state, metrics), (expected_state, expected_metrics) = found, expected
    for name in ("loss", "ce", "mse"):
        np.testing.assert_allclose(getattr(metrics, name), getattr(expected_metrics, name), rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, expected_metrics.grad_norm, rtol=1e-4)
    moments = flatten_params(expected_state.optimizer)[0]
    first = {path.partition("/mu/")[2]: moment for path, moment in moments.items() if "/mu/" in path}
    for part in ("optimizer", "trainable", "ema"):
        leaves, expected_leaves = (flatten_params(getattr(s, part))[0] for s in (state, expected_state))
        assert leaves.keys() == expected_leaves.keys()
        for name, expected_leaf in expected_leaves.items():
            off = np.abs(leaves[name] - expected_leaf) > 1e-4 * rms(expected_leaf)
            if part != "optimizer":
                off &= np.abs(first[name]) > 1e-5 * rms(first[name])
            assert not off.any(), (part, name)


@pytest.mark.parametrize(
    ("preset", "vocab_chunk"), [("fsdp", 16384), ("hsdp", 100), ("fsdp+tensor", 100), ("fsdp+context", 100)]
)
def test_a_preset_on_eight_devices_equals_one_device(preset, vocab_chunk):
    mesh = make_mesh(preset)
    assert mesh.size == 8
    config = training.config(f"mesh.preset={preset}", f"loss.vocab_chunk={vocab_chunk}")
    assert_same_step(training.take_step(config, mesh), alone())


@pytest.mark.parametrize("preset", ["single", pytest.param("fsdp+tensor", marks=pytest.mark.slow)])
def test_four_microbatches_equal_one(preset):
    given = training.config("microbatches=4", f"mesh.preset={preset}")
    assert_same_step(training.take_step(given, make_mesh(preset)), alone())


def test_the_step_that_is_compared_moves_everything():
    state, metrics = alone()
    assert metrics.ce_count > 100 and metrics.mse_count > 100 and metrics.skipped == 0
    before, after = (flatten_params(s.trainable)[0] for s in (training.start(), state))
    assert all(np.abs(before[name] - after[name]).max() > 1e-5 for name in after)


RECIPE = """
import ml_collections
from tests.training import RECIPE

def get_config():
    return ml_collections.ConfigDict(RECIPE)
"""

OVERRIDES = ("mesh.preset=fsdp", "data.shards=2", "total_steps=3", "save.every=3")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": xla_flags(4),
        "LOOM_DEBUG": "1",
    }
    command = [
        sys.executable,
        "-m",
        "loom_jax.cli",
        "train",
        "--config",
        str(recipe),
        "--workdir",
        str(tmp_path / "two"),
    ]
    command += [*(f"--config.{o}" for o in OVERRIDES), "--coordinator", address, "--num-processes", "2"]
    options = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    started = [subprocess.Popen([*command, "--process-id", str(number)], **options) for number in range(2)]
    state = train(training.config(*OVERRIDES), tmp_path / "one")
    outputs = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)[-4000:]
    lines, expected = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("two", "one")
    )
    assert [line["step"] for line in lines] == [line["step"] for line in expected] == [1, 2, 3]
    for name in ("loss", "ce", "mse", "grad_norm"):
        np.testing.assert_allclose([x[name] for x in lines], [x[name] for x in expected], rtol=1e-4)
    abstract = jax.eval_shape(lambda: nnx.merge_state(state.trainable, state.frozen))
    params = read_run_params(tmp_path / "two", abstract, weights="params")
    for name, leaf in flatten_params(state.trainable)[0].items():
        found, leaf = np.asarray(flatten_params(params)[0][name]), np.asarray(leaf)
        assert np.abs(found - leaf).max() <= 3e-4 * np.sqrt(np.mean(leaf**2)), name
