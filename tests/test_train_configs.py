"""The recipes that train: every variant is a whole configuration, and a job that fits its devices."""

import functools
import importlib
import math

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from loom_jax.commands.train import read_config
from loom_jax.configs import bagel_7b, world_ablation, world_autoencoder
from loom_jax.core import CheckpointError, ConfigError, LoomConfig, apply_overrides, from_mapping
from loom_jax.data import RECIPES
from loom_jax.document import VIT_TRANSFORM
from loom_jax.parallel import PRESETS, state_shardings
from loom_jax.train import AutoencoderTrainConfig, build_job, draft_step

NAMES = ("bagel_7b_finetune", "loom_7b")
DEVICES = {"v5p-64": 32, "v6e-64": 64, "h100-8": 8, "h200-8": 8, "h100-64": 64, "h200-64": 64}
WORLD = {
    "world_tiny": {"first": (), "second": ("init_from", "vae_from"), "on": ("init_from",)},
    "world_ablation": {"base": ("vae_from",)} | dict.fromkeys(world_ablation.IDEAS, ("init_from",)),
}
NEEDED = WORLD | {name: dict.fromkeys(DEVICES, ("init_from",)) for name in NAMES}
"""Recipe -> variant -> weights that it goes on from."""
GIBIBYTES = {"v5p": 95, "v6e": 31, "h100": 79, "h200": 140}


def module(name):
    return importlib.import_module(f"loom_jax.configs.{name}")


def mesh_of(config, count):
    """The mesh that the job makes on `count` devices of one slice."""
    axes = dict(zip(config.mesh.axes, config.mesh.sizes, strict=True)) or dict(PRESETS[config.mesh.preset].axes)
    axes = {name: count if size == -1 else size for name, size in axes.items()}
    return AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


@functools.cache
def drafted(name):
    """The abstract state of a recipe, whose shapes no variant changes."""
    config = read_config(module(name).get_config().to_dict(), [])
    return draft_step(config, mesh_of(config, 64))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("variant", DEVICES)
def test_a_variant_fits_its_devices(name, variant):
    """Shapes and places of the whole state on a mesh of that many devices; nothing is allocated."""
    assert set(module(name).MESHES) == set(DEVICES)
    config = read_config(module(name).get_config(variant).to_dict(), [])
    mesh = mesh_of(config, DEVICES[variant])
    assert mesh.size == DEVICES[variant]
    groups = mesh.shape.get("data", 1) * mesh.shape["fsdp"]
    assert config.data.rows % (groups * config.microbatches) == 0 and config.data.shards == config.data.rows
    state = drafted(name).state
    shardings = state_shardings(state, (state.trainable, state.frozen), mesh, config.mesh.preset)
    leaves = zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True)
    held = sum(np.dtype(a.dtype).itemsize * math.prod(s.shard_shape(a.shape)) for a, s in leaves)
    gradient = held / 4  # of parameters, average and two moments
    assert held + gradient < 0.5 * GIBIBYTES[variant.split("-")[0]] * 2**30, f"{held / 2**30:.1f} GiB"


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_what_the_paper_trains(name):
    config = read_config(module(name).get_config().to_dict(), [])
    assert config.model == from_mapping(LoomConfig, bagel_7b.get_config().model.to_dict())
    assert config.frozen == ("vit/*",) and not config.freeze_und and config.lora.rank == 0
    assert (config.optimizer.learning_rate, config.optimizer.warmup_steps, config.ema.decay) == (2e-5, 2000, 0.9999)
    assert (config.optimizer.b1, config.optimizer.b2, config.optimizer.eps) == (0.9, 0.95, 1e-15)
    assert config.optimizer.weight_decay == 0 and config.optimizer.clip_norm == 1
    assert all(entry.recipe in RECIPES for entry in config.data.mixture)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_holds_the_largest_image_in_every_role(name):
    config = read_config(module(name).get_config().to_dict(), [])
    budget, side = config.data.budget, config.model.max_latent_size
    assert budget.gen >= side**2 and any(c.height == c.width == side * 16 for c in config.data.canvases)
    for entry in config.data.mixture:
        vit = entry.vit_transform or VIT_TRANSFORM
        width, height = vit.size(4000, 4000)
        patches = (width // 14) * (height // 14)
        assert patches <= budget.vit and patches + 100 <= budget.und, entry.name


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_is_ours_and_how_to_run_it(name):
    text = module(name).__doc__
    assert all(word in text for word in ("Command:", "Data:", "Hardware:", "Expect:", "Unpublished, so ours", "rozen"))
    with pytest.raises(ConfigError, match="unknown key"):
        read_config(module(name).get_config().to_dict(), ["optimizer.lr=1"])


@pytest.mark.parametrize(("name", "variant"), [(name, variant) for name in NEEDED for variant in NEEDED[name]])
def test_a_recipe_is_refused_without_the_weights_that_it_goes_on_from(name, variant):
    recipe, needed = module(name).get_config(variant).to_dict(), NEEDED[name][variant]
    for lacking in needed:
        config = read_config(recipe, [f"{key}=somewhere" for key in needed if key != lacking])
        with pytest.raises(
            ConfigError, match=rf"{lacking} is not given: add --config\.{lacking}=DIR, .*(convert|train)"
        ):
            build_job(config)
    config = read_config(recipe, [f"{key}=somewhere" for key in needed])
    assert config.needs == needed and all(entry.recipe in RECIPES for entry in config.data.mixture)
    if "init_from" in needed and name in WORLD:  # the others need more devices first
        with pytest.raises(CheckpointError, match="somewhere is not a converted model"):  # it is looked for
            build_job(config)


@pytest.mark.parametrize("name", WORLD)
def test_all_variants_of_the_world_are_known_here(name):
    assert set(module(name).VARIANTS) == set(WORLD[name])


def test_the_recipe_of_an_autoencoder_is_refused_without_the_encoder_that_it_keeps():
    assert world_autoencoder.VARIANTS == ("whole", "decoder")
    whole, decoder = (world_autoencoder.get_config(variant).to_dict() for variant in world_autoencoder.VARIANTS)
    assert from_mapping(AutoencoderTrainConfig, whole).init_from is None
    with pytest.raises(ConfigError, match=r"no encoder to keep; add --config\.init_from=DIR"):
        from_mapping(AutoencoderTrainConfig, decoder)
    assert from_mapping(AutoencoderTrainConfig, apply_overrides(decoder, ["init_from=somewhere"])).keep_encoder
