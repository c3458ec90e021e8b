"""The trained weights that come along: how small they are, what they say, and what their autoencoder keeps."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from loom_jax.checkpoint import COMPONENTS, SHIPPED, portable, read_folder, stored_params
from loom_jax.commands.train import read_config, read_recipe
from loom_jax.data.world import STYLES, draw_example, read_pictures, render
from loom_jax.document import unit_range
from loom_jax.models import load_folder, to_uint8
from tests.sources import ROOT


@pytest.fixture(scope="module")
def decoded():
    """Returns a function that sends pictures [N, 64, 64, 3] through the autoencoder."""
    graphdef, params = nnx.split(load_folder(SHIPPED).vae)

    @jax.jit
    def there_and_back(params, pixels):
        vae = nnx.merge(graphdef, params)
        return to_uint8(vae.decode(vae.sample(vae.encode(pixels), None)))

    return lambda pictures: np.asarray(there_and_back(params, unit_range(pictures)))


def frames(task, count):
    """The pictures to be made of some held-out requests."""
    return [scene for index in range(count) for scene in draw_example(task, "test", 0, index).frames]


def test_they_are_small_and_stored_as_they_are_used():
    stored = {component: stored_params(SHIPPED / component) for component in COMPONENTS}
    assert sum(math.prod(leaf.shape) for leaves in stored.values() for leaf in leaves.values()) <= 16e6
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) <= 25e6
    dtypes = {component: {str(leaf.dtype) for leaf in leaves.values()} for component, leaves in stored.items()}
    assert dtypes == {"model": {"bfloat16"}, "vae": {"float32"}}


def test_they_are_of_the_recipe_and_say_where_they_come_from():
    folder = read_folder(SHIPPED)
    assert folder.config == read_config(read_recipe(ROOT / "configs/world_tiny.py"), []).model
    assert {"tool", "created", "source", "weights"} <= set(folder.provenance) and folder.provenance["weights"] == "ema"
    assert portable(folder.provenance) == folder.provenance  # no paths of the machine that they were made on


def test_what_is_read_in_pictures_survives_the_autoencoder(decoded):
    scenes = [*frames("tutorial", 24), *frames("composition", 24)][:96]
    readings = read_pictures(decoded(render(scenes)))
    assert [reading.scene for reading in readings] == scenes and all(reading.clear for reading in readings)


def test_pictures_of_all_styles_survive_the_autoencoder(decoded):
    scenes = [*frames("tutorial", 24)[:64], *frames("style", 32)]
    assert {scene.style for scene in scenes} == set(STYLES)
    pictures = render(scenes)
    errors = np.abs(decoded(pictures) / 255.0 - pictures / 255.0).mean(axis=(1, 2, 3))
    assert errors.mean() <= 0.02
