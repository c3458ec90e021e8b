"""Meshes, presets and the rule table, on eight simulated devices and on abstract meshes of larger machines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from loom_jax.core import AutoencoderConfig, ConfigError, DecoderConfig, LoomConfig, SiglipConfig
from loom_jax.models import Autoencoder, LoomModel
from loom_jax.parallel import PRESETS, RULES, flatten_params, logical_axes, make_mesh, shardings_for

BAGEL_7B = LoomConfig(
    decoder=DecoderConfig(152064, 3584, 18944, 28, 28, 4, 128),
    vit=SiglipConfig(1152, 4304, 26, 16, 14, 4900),
    vae=AutoencoderConfig(128, (1, 2, 4, 4), 2, 16, 0.3611, 0.1159),
    max_latent_size=64,
    vit_max_num_patch_per_side=70,
)
MESHES_64 = {
    "single": {"fsdp": 1},
    "fsdp": {"fsdp": 64},
    "hsdp": {"data": 4, "fsdp": 16},
    "fsdp+tensor": {"fsdp": 16, "tensor": 4},
    "fsdp+context": {"fsdp": 16, "context": 4},
}


def abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


@pytest.fixture(scope="module")
def big() -> dict:
    """Shapes of the real release's parameters, by path."""
    model = nnx.eval_shape(lambda: LoomModel(BAGEL_7B, rngs=nnx.Rngs(0)))
    vae = nnx.eval_shape(lambda: Autoencoder(BAGEL_7B.vae, rngs=nnx.Rngs(0)))
    return {"model": nnx.state(model, nnx.Param), "vae": nnx.state(vae, nnx.Param)}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("component", ["model", "vae"])
def test_rules_cover_the_release_under_every_preset(big, preset, component):
    sizes = MESHES_64[preset]
    shardings, _ = flatten_params(shardings_for(big[component], abstract_mesh(sizes), preset))
    params, _ = flatten_params(big[component])
    assert list(shardings) == list(params)
    devices = np.prod(list(sizes.values())) // sizes.get("data", 1)
    total = sum(p.size for p in params.values())
    a_device = sum(np.prod(shardings[path].shard_shape(p.shape)) for path, p in params.items())
    assert a_device <= 1.05 * total / devices if component == "model" else a_device <= 1.3 * total / devices


def test_one_line_of_the_golden_kind(big):
    shardings, _ = flatten_params(shardings_for(big["model"], abstract_mesh(MESHES_64["fsdp+tensor"]), "fsdp+tensor"))
    kernel = shardings["decoder/layers/gen/q_proj/kernel"]
    assert kernel.spec == jax.P(None, ("fsdp",), ("tensor",), None)
    assert kernel.shard_shape((28, 3584, 28, 128)) == (28, 224, 7, 128)


def test_there_are_at_most_fifteen_rules():
    assert len(RULES) <= 15 and all(len(preset.rules) <= 15 for preset in PRESETS.values())


def test_a_dimension_falls_to_the_largest_part_of_an_axis_that_divides_it(big):
    shardings, _ = flatten_params(shardings_for(big["model"], abstract_mesh({"fsdp": 256, "tensor": 8}), "fsdp+tensor"))
    vit = shardings["vit/layers/fc1/kernel"]  # 1152 = 9 * 128
    assert vit.shard_shape((26, 1152, 4304)) == (26, 9, 538)
    keys = shardings["decoder/layers/und/k_proj/kernel"]  # 4 heads on 8 tensor devices
    assert keys.shard_shape((28, 3584, 4, 128)) == (28, 14, 1, 128)


def test_arrays_on_a_split_axis_compute_together_with_others():
    mesh = make_mesh("fsdp")
    shapes = {
        "connector": {"fc1": {"kernel": jnp.ones((12, 16))}, "fc2": {"kernel": jnp.ones((16, 24))}},  # 12 on 8: 4 parts
    }
    shardings = shardings_for(shapes, mesh, "fsdp")
    assert shardings["connector"]["fc1"]["kernel"].shard_shape((12, 16)) == (3, 16)
    placed = jax.device_put(shapes, shardings)
    product = jax.jit(lambda c: c["fc1"]["kernel"] @ c["fc2"]["kernel"])(placed["connector"])
    np.testing.assert_array_equal(product, np.full((12, 24), 16.0))


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(ConfigError, match="0 sharding rules fit parameter 'adapter/kernel'"):
        logical_axes("adapter/kernel", 2)
    with pytest.raises(ConfigError, match="3 dimensions"):
        logical_axes("lm_head/kernel", 3)


def test_large_parameters_left_whole_are_an_error(big):
    with pytest.raises(ConfigError, match="MiB of parameters whole on every device"):
        shardings_for(big["model"], abstract_mesh({"fsdp": 5}), "fsdp")


def test_a_preset_needs_its_axes():
    with pytest.raises(ConfigError, match="needs mesh axis 'tensor'"):
        shardings_for({}, make_mesh("fsdp"), "fsdp+tensor")
    with pytest.raises(ConfigError, match="preset 'ddp' is not one of"):
        shardings_for({}, make_mesh("fsdp"), "ddp")


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [
        ("single", {"fsdp": 1}),
        ("fsdp", {"fsdp": 8}),
        ("hsdp", {"data": 2, "fsdp": 4}),
        ("fsdp+tensor", {"fsdp": 2, "tensor": 4}),
        ("fsdp+context", {"fsdp": 4, "context": 2}),
    ],
)
def test_presets_make_meshes_of_the_devices_that_are_there(preset, sizes):
    mesh = make_mesh(preset)
    assert dict(mesh.shape) == sizes
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_mesh_sizes_are_checked():
    assert dict(make_mesh({"fsdp": -1, "tensor": 2}).shape) == {"fsdp": 4, "tensor": 2}
    with pytest.raises(ConfigError, match="make 9 devices, but there are 8"):
        make_mesh({"fsdp": 3, "tensor": 3})
    with pytest.raises(ConfigError, match="at most one may be -1"):
        make_mesh({"fsdp": -1, "tensor": -1})
    with pytest.raises(ConfigError, match="'ddp' is not one of"):
        make_mesh("ddp")
