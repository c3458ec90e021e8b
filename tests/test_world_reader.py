"""The reader of pictures: exact on what was rendered, and still right on pictures that went through noise or blur."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from loom_jax.core import InputError
from loom_jax.data.world import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    STYLES,
    Scene,
    Thing,
    read_pictures,
    render,
)


def draw_scenes(count, seed, styles=STYLES):
    """Returns scenes of zero to sixteen things, any combination, in any style."""
    rng = np.random.default_rng(seed)

    def pick(values):
        return values[int(rng.integers(len(values)))]

    scenes = []
    for _ in range(count):
        places = rng.permutation(PLACES)[: rng.integers(0, 17)]
        things = frozenset(Thing(pick(SIZES), pick(tuple(COLOURS)), pick(SHAPES), str(place)) for place in places)
        scenes.append(Scene(pick(BACKGROUNDS), things, pick(styles)))
    return scenes


def check_exact(count, seed):
    scenes = draw_scenes(count, seed)
    readings = read_pictures(render(scenes))
    assert [reading.scene for reading in readings] == scenes
    assert max(reading.error for reading in readings) < 0.005


def share_right(scenes, pictures):
    readings = read_pictures(pictures)
    return np.mean([reading.clear and reading.scene == scene for reading, scene in zip(readings, scenes, strict=True)])


def test_rendered_pictures_are_read_exactly():
    check_exact(500, seed=0)


@pytest.mark.slow
def test_ten_thousand_rendered_pictures_are_read_exactly():
    check_exact(10_000, seed=1)


def test_pictures_with_noise_are_read():
    scenes = draw_scenes(150, seed=2)
    noise = np.random.default_rng(3).normal(0, 0.05 * 255, (150, 64, 64, 3))
    assert share_right(scenes, np.clip(render(scenes) + noise, 0, 255).astype(np.uint8)) >= 0.99


def test_blurred_pictures_are_read():
    scenes = draw_scenes(150, seed=4, styles=("plain", "pastel", "night"))
    blur = ImageFilter.GaussianBlur(0.8)
    pictures = np.stack([np.asarray(Image.fromarray(picture).filter(blur)) for picture in render(scenes)])
    assert share_right(scenes, pictures) >= 0.99


def test_a_picture_of_something_else_is_not_clear():
    rng = np.random.default_rng(5)
    (real,) = render([Scene("meadow", frozenset({Thing("large", "red", "circle", "lower right")}))])
    noise = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    plain = np.full((64, 64, 3), (200, 0, 200), np.uint8)  # grey would be near to paper at night
    doubled = real.copy()
    doubled[32:48, 40:48] = (40, 88, 212)
    for picture in (noise, plain, doubled):
        (reading,) = read_pictures(picture[None])
        assert not reading.clear
    assert read_pictures(real[None])[0].clear


def test_styles_can_be_left_out():
    scenes = draw_scenes(40, seed=6, styles=("plain",))
    assert [reading.scene for reading in read_pictures(render(scenes), styles=("plain",))] == scenes
    assert {reading.scene.style for reading in read_pictures(render(scenes), styles=("night",))} == {"night"}


def test_no_pictures_are_no_readings():
    assert read_pictures(np.zeros((0, 64, 64, 3), np.uint8)) == []


@pytest.mark.parametrize("pictures", [np.zeros((2, 64, 48, 3), np.uint8), np.zeros((2, 64, 64, 3), np.float32)])
def test_pictures_of_another_form_are_refused(pictures):
    with pytest.raises(InputError, match="expected uint8"):
        read_pictures(pictures)
