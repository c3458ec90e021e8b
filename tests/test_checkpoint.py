"""Saving and restoring parameters onto meshes, and the folder of a converted model."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loom_jax.checkpoint import (
    SCHEMA_VERSION,
    load_module,
    migrate,
    new_folder,
    read_folder,
    read_params,
    restore_component,
    restore_params,
    save_params,
    stored_params,
)
from loom_jax.converters import to_orbax
from loom_jax.core import CheckpointError, ConfigError, LoomConfig
from loom_jax.models import Autoencoder, LoomModel
from loom_jax.models.load import load_folder
from loom_jax.parallel import PRESETS, flatten_params, make_mesh, shardings_for
from tests.flags import xla_flags
from tests.reference import CKPT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, converted."""
    path = tmp_path_factory.mktemp("converted") / "tiny"
    to_orbax(CKPT, path)
    return path


def build(component: str, config: LoomConfig) -> nnx.Module:
    if component == "model":
        return LoomModel(config, rngs=nnx.Rngs(0))
    return Autoencoder(config.vae, rngs=nnx.Rngs(0))


def abstract_params(folder: Path, component: str) -> nnx.State:
    config = read_folder(folder).config
    return nnx.state(nnx.eval_shape(lambda: build(component, config)), nnx.Param)


@pytest.fixture(scope="module")
def on_one_device(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """All parameters, restored without a mesh."""
    converted = read_folder(folder)
    restored = {c: restore_component(converted, c, abstract_params(folder, c)) for c in ("model", "vae")}
    return {c: {k: np.asarray(v) for k, v in flatten_params(tree)[0].items()} for c, tree in restored.items()}


def test_layers_are_stacked_as_they_lie_on_disk(folder, on_one_device):
    stored = stored_params(folder / "model")
    leaves = read_params(folder / "model", stored)
    kernel = on_one_device["model"]["decoder/layers/gen/q_proj/kernel"]
    assert kernel.shape == (3, 64, 4, 16) and kernel.dtype == jnp.bfloat16
    for layer in range(3):
        np.testing.assert_array_equal(kernel[layer], leaves[f"decoder/layers/{layer}/gen/q_proj/kernel"])
    total = sum(array.size for array in on_one_device["model"].values())
    assert total == sum(array.size for array in leaves.values())


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("component", ["model", "vae"])
def test_restoring_onto_a_mesh_equals_restoring_on_one_device(folder, on_one_device, component, preset):
    abstract = abstract_params(folder, component)
    mesh = make_mesh(preset)
    restored = restore_component(read_folder(folder), component, abstract, mesh=mesh, preset=preset)
    assert jax.tree.structure(restored) == jax.tree.structure(abstract)
    shardings, _ = flatten_params(shardings_for(abstract, mesh, preset))
    for path, array in flatten_params(restored)[0].items():
        assert array.sharding.is_equivalent_to(shardings[path], array.ndim), path
        np.testing.assert_array_equal(np.asarray(array), on_one_device[component][path])
    if preset != "single":
        assert all(len(array.sharding.device_set) == 8 for array in jax.tree.leaves(restored))


def test_a_module_is_loaded_with_its_weights(folder, on_one_device):
    model = load_module(read_folder(folder), "model", lambda config: build("model", config), preset="fsdp")
    expected = on_one_device["model"]["decoder/layers/und/k_proj/kernel"]
    np.testing.assert_array_equal(np.asarray(model.decoder.layers.und.k_proj.kernel[...]), expected)


def test_a_folder_is_loaded_whole(folder):
    loaded = load_folder(folder, param_dtype=jnp.float32)
    assert loaded.config.decoder.num_layers == 3
    assert loaded.model.lm_head.kernel[...].dtype == jnp.float32
    assert loaded.vae.encoder.conv_in.kernel[...].shape == (3, 3, 3, 32)
    assert loaded.tokenizer.encode("a boat")


def params_of(dtypes=(jnp.float32, jnp.float32)) -> dict:
    """Parameters like a small model's: layers, and modules without layers."""
    ramp = lambda *shape: jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)  # noqa: E731
    return {
        "lm_head": {"kernel": ramp(16, 24).astype(dtypes[0])},
        "decoder": {
            "norm": {"und": {"scale": ramp(16)}},
            "layers": {"und": {"q_proj": {"kernel": ramp(3, 16, 4, 2), "bias": ramp(3, 4, 2).astype(dtypes[1])}}},
        },
    }


def test_saved_from_one_mesh_and_restored_onto_another(tmp_path):
    params = params_of((jnp.bfloat16, jnp.float16))
    before = make_mesh("fsdp+tensor")
    save_params(tmp_path / "step", jax.device_put(params, shardings_for(params, before, "fsdp+tensor")))
    assert sorted(stored_params(tmp_path / "step")) == [
        *(f"decoder/layers/{i}/und/q_proj/{name}" for i in range(3) for name in ("bias", "kernel")),
        "decoder/norm/und/scale",
        "lm_head/kernel",
    ]
    shardings = shardings_for(params, make_mesh("fsdp"), "fsdp")
    restored = restore_params(tmp_path / "step", params, shardings)
    for saved, loaded in zip(jax.tree.leaves(params), jax.tree.leaves(restored), strict=True):
        assert saved.dtype == loaded.dtype
        np.testing.assert_array_equal(np.asarray(saved), np.asarray(loaded))
    assert restored["lm_head"]["kernel"].sharding.shard_shape((16, 24)) == (2, 24)
    as_host = read_params(tmp_path / "step", stored_params(tmp_path / "step"))
    np.testing.assert_array_equal(as_host["decoder/layers/1/und/q_proj/bias"], np.arange(8, 16).reshape(4, 2))


def test_a_folder_does_not_tell_where_it_was_written(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if str(folder.parent).encode() in path.read_bytes()] == []


def test_dtype_is_as_stored_or_as_asked(tmp_path):
    params = params_of((jnp.bfloat16, jnp.float16))
    save_params(tmp_path / "step", params)
    abstract = jax.eval_shape(lambda: params_of())
    assert restore_params(tmp_path / "step", abstract)["lm_head"]["kernel"].dtype == jnp.bfloat16
    cast = restore_params(tmp_path / "step", abstract, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(cast)} == {np.dtype(jnp.bfloat16)}


def test_layers_of_different_dtypes_meet_in_the_widest(folder, tmp_path):
    from loom_jax.checkpoint import ParamWriter

    with ParamWriter(tmp_path / "step") as writer:
        writer.write(
            {"vit/layers/0/fc1/bias": np.ones(3, np.float16), "vit/layers/1/fc1/bias": np.ones(3, jnp.bfloat16)}
        )
    abstract = {"vit": {"layers": {"fc1": {"bias": jax.ShapeDtypeStruct((2, 3), jnp.float32)}}}}
    assert jax.tree.leaves(restore_params(tmp_path / "step", abstract))[0].dtype == jnp.float32


def test_leaves_that_do_not_fit_are_named(tmp_path):
    save_params(tmp_path / "step", params_of())
    more = params_of()
    more["decoder"]["layers"]["und"]["k_proj"] = more["decoder"]["layers"]["und"]["q_proj"]
    with pytest.raises(CheckpointError, match=r"step: 6 missing: decoder/layers/0/und/k_proj/bias, .* and 3 more;"):
        restore_params(tmp_path / "step", more)
    less = params_of()
    del less["lm_head"]
    with pytest.raises(CheckpointError, match="step: 1 unknown: lm_head/kernel;"):
        restore_params(tmp_path / "step", less)
    other = params_of()
    other["decoder"]["layers"] = jax.tree.map(lambda x: x[:2], other["decoder"]["layers"])
    with pytest.raises(CheckpointError, match="2 unknown: decoder/layers/2/und"):
        restore_params(tmp_path / "step", other)
    other = params_of() | {"lm_head": {"kernel": jnp.ones((24, 16))}}
    with pytest.raises(CheckpointError, match=r"lm_head/kernel has shape \(16, 24\), expected \(24, 16\)"):
        restore_params(tmp_path / "step", other)


def test_damaged_checkpoints_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="none holds no readable Orbax checkpoint"):
        restore_params(tmp_path / "none", params_of())
    save_params(tmp_path / "step", {"lm_head": {"kernel": jnp.ones((512, 600))}})
    for file in (tmp_path / "step").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(CheckpointError) as caught:
        restore_params(tmp_path / "step", {"lm_head": {"kernel": jnp.ones((512, 600))}})
    assert "\n" not in str(caught.value)


def test_a_killed_save_does_not_stand_in_the_way(tmp_path):
    (tmp_path / "step.partial_save").mkdir()
    (tmp_path / "step.partial_save" / "state").mkdir()
    save_params(tmp_path / "step", params_of())
    assert len(stored_params(tmp_path / "step")) == 8
    with pytest.raises(CheckpointError, match="is already there"):
        save_params(tmp_path / "step", params_of())


def record(folder: Path, tmp_path: Path, **changes: object) -> Path:
    """A folder with nothing but a changed record."""
    content = json.loads((folder / "loom.json").read_text()) | changes
    (tmp_path / "loom.json").write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return tmp_path


def test_records_of_other_versions(folder, tmp_path):
    with pytest.raises(CheckpointError, match=f"schema_version {SCHEMA_VERSION + 1}, .*: upgrade loom_jax"):
        read_folder(record(folder, tmp_path, schema_version=SCHEMA_VERSION + 1))
    with pytest.raises(CheckpointError, match="schema_version 0, which cannot be migrated: make it anew"):
        read_folder(record(folder, tmp_path, schema_version=0))
    with pytest.raises(CheckpointError, match="schema_version None, expected a number"):
        read_folder(record(folder, tmp_path, schema_version=None))
    migrations = {1: lambda r: {**r, "b": r["a"] + 1}, 2: lambda r: {**r, "c": r["b"] + 1}}
    migrated = migrate({"schema_version": 1, "a": 1}, tmp_path / "loom.json", migrations, 3)
    assert migrated == {"schema_version": 3, "a": 1, "b": 2, "c": 3}


def test_records_that_cannot_be_used(folder, tmp_path):
    with pytest.raises(CheckpointError, match="is not a converted model: it holds no loom.json"):
        read_folder(tmp_path)
    with pytest.raises(CheckpointError, match="lacks key 'provenance'"):
        read_folder(record(folder, tmp_path, provenance=None))
    with pytest.raises(ConfigError, match="unknown key 'config.depth'"):
        read_folder(
            record(folder, tmp_path, config=json.loads((folder / "loom.json").read_text())["config"] | {"depth": 3})
        )
    (tmp_path / "loom.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_folder(tmp_path)


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    with new_folder(tmp_path / "a" / "new") as temporary:
        (temporary / "file").write_text("1")
        assert not (tmp_path / "a" / "new").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["new"]
    with pytest.raises(KeyError), new_folder(tmp_path / "a" / "new", overwrite=True, mark="file") as temporary:
        raise KeyError
    assert (tmp_path / "a" / "new" / "file").read_text() == "1"
    assert len(list((tmp_path / "a").iterdir())) == 1
    (tmp_path / "plain").touch()
    with pytest.raises(CheckpointError, match="plain cannot be written to"), new_folder(tmp_path / "plain" / "new"):
        raise AssertionError


TWO_PROCESSES = """
import os, sys
import jax
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[1]))
import jax.numpy as jnp, tensorstore
from pathlib import Path
from loom_jax.checkpoint import restore_params, save_params
from loom_jax.parallel import make_mesh, shardings_for
kernel = jax.ShapeDtypeStruct((4, 8192, 512), jnp.float32)
abstract = {"decoder": {"layers": {"und": {"gate_proj": {"kernel": kernel}}}}}
shardings = shardings_for(abstract, make_mesh("fsdp"), "fsdp")
kernel = jax.tree.leaves(restore_params(Path(sys.argv[3]), abstract, shardings))[0]
for shard in kernel.addressable_shards:
    assert (shard.data[:, :, 0] == jnp.arange(8192.0)[shard.index[1]]).all(), shard.index
read = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
print("READ", len(kernel.addressable_shards), sum(value["value"] for metric in read for value in metric["values"]))
save_params(Path(sys.argv[3]).parent / "again", jax.tree.map(lambda _: kernel, abstract))
"""


def test_each_process_reads_only_its_own_shards_and_saves_them(tmp_path):
    from loom_jax.checkpoint import ParamWriter

    layer = np.repeat(np.arange(8192, dtype=np.float32)[:, None], 512, 1)  # a chunk of 2 MiB for each of 8 devices
    with ParamWriter(tmp_path / "step") as writer:
        for i in range(4):
            writer.write({f"decoder/layers/{i}/und/gate_proj/kernel": layer})
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": xla_flags(4), "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(rank), address, str(tmp_path / "step")],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    for output in outputs:
        shards, read = map(int, re.search(r"READ (\d+) (\d+)", output).groups())
        assert shards == 4
        assert 0.5 * 4 * layer.nbytes <= read <= 0.55 * 4 * layer.nbytes
    assert all(process.returncode == 0 for process in processes)
    again = read_params(tmp_path / "again", stored_params(tmp_path / "again"))
    assert len(again) == 4
    for kernel in again.values():
        np.testing.assert_array_equal(kernel, layer)
