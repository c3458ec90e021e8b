"""The golden sharding files of bagel_7b, and activations, batches and slices on a mesh."""

import ast
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from loom_jax.core import ConfigError
from loom_jax.parallel import (
    PRESETS,
    REPLICATED_LIMIT,
    activation_spec,
    batch_sharding,
    global_batch,
    logical_axes,
    make_constrain,
    make_mesh,
    row_range,
    start_distributed,
)
from loom_jax.parallel.mesh import arrange_slices
from tests.write_shardings import golden_file, shardings_of


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_lie_as_the_golden_file_says(preset):
    golden = json.loads(golden_file(preset).read_text(encoding="utf-8"))
    found = shardings_of(preset)
    assert golden == found, (
        "shardings changed: if that is meant, run `python tests/write_shardings.py` and read the diff"
    )
    if preset != "single":
        leaves = [leaf for part in ("model", "vae") for leaf in found[part].values()]
        whole = [leaf["shape"] for leaf in leaves if leaf["shape"] == leaf["part"]]
        assert 0 < sum(4 * np.prod(ast.literal_eval(shape)) for shape in whole) <= REPLICATED_LIMIT


def test_adapters_have_rules():
    assert logical_axes("decoder/layers/und/q_proj/lora_a", 3) == (None, "embed", None)
    assert logical_axes("decoder/layers/und/q_proj/lora_b", 4) == (None, None, "heads", "embed")
    assert logical_axes("decoder/layers/gen/o_proj/lora_b", 3) == (None, None, "embed")
    assert logical_axes("decoder/layers/gen/down_proj/lora_a", 3) == (None, "embed", None)


MESH = AbstractMesh((2, 2, 4, 8), ("data", "fsdp", "tensor", "context"), axis_types=(AxisType.Auto,) * 4)


def test_activations_are_cut_by_name_where_they_divide():
    assert activation_spec((4, 24, 12, 7), ("batch", "length", "heads", None), MESH) == jax.P(
        ("data", "fsdp"), ("context",), ("tensor",), None
    )
    assert activation_spec((2, 20, 6), ("batch", "length", "kv_heads"), MESH) == jax.P(("data",), None, None)
    assert activation_spec((16, 96), (None, "embed"), MESH) == jax.P(None, None)
    with pytest.raises(ConfigError, match="activation axis 'width' is not one of batch"):
        activation_spec((4, 4), ("batch", "width"), MESH)
    with pytest.raises(ConfigError, match="has 3 dimensions, but names"):
        activation_spec((4, 4, 4), ("batch", "length"), MESH)


def test_constrain_places_and_changes_nothing():
    x = jnp.arange(8 * 6 * 4.0).reshape(8, 6, 4)
    mesh = make_mesh("fsdp+context")
    placed = jax.jit(lambda x: make_constrain(mesh)(2 * x, ("batch", "length", "embed")))(x)
    assert placed.sharding.shard_shape(x.shape) == (2, 3, 4)
    np.testing.assert_array_equal(placed, 2 * x)
    assert make_constrain(make_mesh("single"))(x, ("batch", "length", "embed")) is x


def test_batches_are_cut_by_rows():
    mesh = make_mesh("hsdp")
    assert row_range(mesh, 16) == (0, 16)
    batch = global_batch({"ids": np.arange(48).reshape(16, 3), "number": np.arange(16)}, mesh)
    assert batch["ids"].sharding.shard_shape((16, 3)) == (2, 3) and batch["number"].sharding == batch_sharding(mesh)
    np.testing.assert_array_equal(batch["ids"], np.arange(48).reshape(16, 3))
    with pytest.raises(ConfigError, match="batch size 12 is not a multiple of 8, the devices that share it"):
        row_range(mesh, 12)
    assert row_range(make_mesh("single"), 3) == (0, 3)


def test_only_data_crosses_slices():
    devices = [
        types.SimpleNamespace(id=n, slice_index=n // 4, platform="other", device_kind="", process_index=0)
        for n in (5, 0, 2, 7, 1, 4, 3, 6)
    ]
    placed = arrange_slices({"fsdp": 2, "data": 4}, devices)
    assert placed.shape == (2, 4)
    assert [len({device.slice_index for device in placed[:, column]}) for column in range(4)] == [1] * 4
    with pytest.raises(ConfigError, match="2 TPU slices: give axis `data` a multiple of 2"):
        arrange_slices({"fsdp": 8}, devices)


def test_a_process_alone_joins_nothing(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert not start_distributed()
    assert not start_distributed("localhost:1", 1, 0)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES given without JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID"):
        start_distributed()
    monkeypatch.setenv("JAX_PROCESS_ID", "one")
    with pytest.raises(ConfigError, match="JAX_PROCESS_ID='one' in the environment is no number"):
        start_distributed()
