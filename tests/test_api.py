"""From a release of dimensions that nothing here knows to pictures, through the public interface."""

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from loom_jax import api
from loom_jax.converters.synthetic import write_synthetic_release
from loom_jax.core import ConfigError
from loom_jax.data import Budget, Packable, Tables, pack, total_need
from loom_jax.document import ImageTokens, Picture, Text, lay_out
from loom_jax.generate import Generator, branch_velocity
from loom_jax.train import training_forward
from tests import tiny
from tests.reference import CKPT, assert_close


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A converted folder of a random release: every dimension comes from its weights."""
    path = tmp_path_factory.mktemp("other")
    write_synthetic_release(path / "release", tiny.CONFIG, seed=5, tokenizer=CKPT)
    api.convert(path / "release", path / "converted")
    return path / "converted"


@pytest.fixture(scope="module")
def generator(folder) -> Generator:
    return api.load(folder)


def photograph(height, width):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def test_contexts_of_a_converted_release_equal_its_training_path(generator):
    """What is read piece by piece and cached predicts the velocity that one training forward predicts."""
    config, encoder = generator.config, generator.encoder
    picture = photograph(3 * config.latent_stride, 4 * config.latent_stride)
    seen = encoder.encode([Text("a red boat"), Picture(picture, "clean"), Picture(picture, "vit"), Text("now blue")])
    clean = generator.latent_tokens(seen, seed=1)[0]
    noisy = ImageTokens("noisy", (2, 3))
    noise = np.random.default_rng(1).standard_normal((6, config.latent_dim), np.float32)

    whole = Packable([*seen, noisy], lay_out([*seen, noisy], encoder.special))
    batch = pack([[whole]], total_need([whole]), Tables.of(config))
    state = np.concatenate([clean, noise])[None]
    t = np.concatenate([np.zeros(len(clean)), np.full(6, 0.3)]).astype(np.float32)[None]
    model = generator.engine.model()
    trained = model.velocity(training_forward(model, batch.streams, state, state, t).gen)[0, -6:]

    first = generator.read([seen[:3]], [[clean]], room=64)
    read = generator.extend(first, [seen[3:]], [[]])
    query = Packable([noisy], lay_out([noisy], encoder.special, read.ends[0]))
    streams = pack([[query]], Budget(2, 6, 0), Tables.of(config)).streams
    graphdef, params = nnx.split(model)
    cached = jax.jit(lambda p, c, x: branch_velocity(nnx.merge(graphdef, p), c, streams, x, 0.3))(
        params, read.context, noise[None]
    )
    assert_close(cached[0], np.asarray(trained), 1e-5)


def test_the_readme_in_python(generator, tmp_path):
    size = 2 * generator.config.latent_stride, 3 * generator.config.latent_stride
    requests = [api.Request(("A small boat on a quiet lake",), size=size, seed=seed) for seed in range(2)]
    settings = api.ImageSettings(num_timesteps=4)
    for number, result in enumerate(generator.generate(requests, settings)):
        result.image.save(tmp_path / f"boat_{number}.png")
        assert result.image.size == size[::-1]
    assert (tmp_path / "boat_0.png").read_bytes() != (tmp_path / "boat_1.png").read_bytes()


def test_weights_spread_over_devices_draw_the_same(generator, folder):
    size = 2 * generator.config.latent_stride, 3 * generator.config.latent_stride
    request, settings = api.Request(("A boat",), size=size), api.ImageSettings(num_timesteps=4)
    [alone] = generator.generate([request], settings)
    [spread] = api.load(folder, preset="fsdp").generate([request], settings)
    assert_close(spread.latents, alone.latents, 1e-4)


def test_unknown_attention_is_refused(folder):
    with pytest.raises(ConfigError, match="attention='quick' is not one of auto, dense, blockwise"):
        api.load(folder, attention="quick")
