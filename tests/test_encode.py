"""From texts and pictures to encoded segments."""

import json

import numpy as np
import pytest
from PIL import Image as PILImage

from loom_jax.core import ConfigError, TokenizerError
from loom_jax.document import (
    THINK_THEN_ANSWER,
    THINK_THEN_DRAW,
    Encoder,
    ImageTokens,
    ImageTransform,
    Picture,
    Text,
    TextTokens,
    Tokenizer,
)
from tests.reference import CKPT, REFERENCE, SET, golden

VAE, VIT = ImageTransform(64, 32, 16), ImageTransform(70, 28, 14)
"""The transforms of the recorded set."""


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(Tokenizer.from_folder(CKPT), latent_stride=16, vit_patch=14, vae_transform=VAE, vit_transform=VIT)


def picture(width: int = 75, height: int = 50, mode: str = "RGB") -> PILImage.Image:
    pixels = np.random.default_rng(7).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PILImage.fromarray(pixels).convert(mode)


def test_recorded_condition_pictures(encoder: Encoder) -> None:
    record = golden("infer_ctx")
    settings = json.loads((SET / "set_config.json").read_text())
    assert (ImageTransform(*settings["vae_tf"]), ImageTransform(*settings["vit_tf"])) == (VAE, VIT)
    clean, vit = encoder.condition_pictures(PILImage.fromarray(record["image"]))
    assert (clean.role, vit.role) == ("clean", "vit")
    np.testing.assert_array_equal(np.asarray(clean.image), record["image_resized"])
    np.testing.assert_array_equal(np.asarray(vit.image), record["image_resized"])
    latent, patches = encoder.encode([clean, vit])
    assert isinstance(latent, ImageTokens) and isinstance(patches, ImageTokens)
    np.testing.assert_array_equal(latent.pixels, record["vae_pixels"].transpose(1, 2, 0))
    np.testing.assert_array_equal(patches.pixels, record["vit_pixels"].transpose(1, 2, 0))
    assert (latent.grid, patches.grid) == ((3, 4), (3, 5))
    assert encoder.patches(patches).shape == (15, 588)


@pytest.mark.parametrize("edit", [False, True])
def test_recorded_text_ids(encoder: Encoder, edit: bool) -> None:
    settings = json.loads((SET / "set_config.json").read_text()) if SET.exists() else pytest.skip("no records")
    prompt, ids = ("edit_prompt", "text_ids_edit") if edit else ("gen_prompt", "text_ids_gen")
    (text,) = encoder.encode([Text(settings[prompt])])
    assert isinstance(text, TextTokens)
    assert list(text.ids) == golden("infer_ctx")[ids].tolist()


def test_segments_keep_their_order_and_flags(encoder: Encoder) -> None:
    segments = [
        Text("hi", loss=True, droppable=True, end_label="<|vision_start|>"),
        Picture(picture(), "noisy"),
        Picture(picture(), "vit", droppable=True),
        Text("x"),
    ]
    first, noisy, vit, last = encoder.encode(segments)
    assert first == TextTokens(
        encoder.tokenizer.encode("hi"), loss=True, droppable=True, end_label=encoder.special.start_of_image
    )
    assert isinstance(noisy, ImageTokens) and (noisy.role, noisy.grid, noisy.droppable) == ("noisy", (3, 4), False)
    assert isinstance(vit, ImageTokens) and (vit.role, vit.droppable) == ("vit", True)
    assert last == TextTokens(encoder.tokenizer.encode("x"))


def test_outside_requests_each_role_is_resized_from_the_picture_itself(encoder: Encoder) -> None:
    (vit,) = encoder.encode([Picture(picture(), "vit")])
    assert isinstance(vit, ImageTokens)
    np.testing.assert_array_equal(vit.pixels, VIT(picture()))


def test_many_images_share_the_area_of_the_vit_transform_only() -> None:
    vit = ImageTransform(140, 28, 14, max_pixels=140 * 140)
    encoder = Encoder(Tokenizer.from_folder(CKPT), 16, 14, vae_transform=VAE, vit_transform=vit)
    both = [Picture(picture(140, 126), "vit"), Picture(picture(140, 126), "clean")]
    alone, shared = encoder.encode(both), encoder.encode(both, img_num=2)
    assert isinstance(alone[0], ImageTokens) and isinstance(shared[0], ImageTokens)
    assert shared[0].grid < alone[0].grid == (9, 10)
    assert isinstance(alone[1], ImageTokens) and isinstance(shared[1], ImageTokens)
    assert shared[1].grid == alone[1].grid


def test_pictures_of_any_mode_are_encoded_as_rgb(encoder: Encoder) -> None:
    for mode in ("L", "RGBA", "CMYK", "P", "1"):
        (clean,) = encoder.encode([Picture(picture(mode=mode), "clean")])
        assert isinstance(clean, ImageTokens) and clean.pixels is not None and clean.pixels.shape == (48, 64, 3)


def test_roles_of_a_condition_can_be_chosen(encoder: Encoder) -> None:
    (vit,) = encoder.condition_pictures(picture(), roles=["vit"])
    assert vit.role == "vit" and vit.image.size == (64, 48)


def test_unknown_end_labels_are_refused(encoder: Encoder) -> None:
    with pytest.raises(TokenizerError, match="<nothing>"):
        encoder.encode([Text("a", end_label="<nothing>")])


def test_transforms_must_fit_the_tokens_of_the_model() -> None:
    with pytest.raises(ConfigError, match="vit_transform makes sides multiples of 14, but a token covers 16"):
        Encoder(Tokenizer.from_folder(CKPT), latent_stride=16, vit_patch=16, vae_transform=VAE, vit_transform=VIT)


def test_think_prompts_are_those_of_the_original() -> None:
    path = REFERENCE / "prompts.json"
    if not path.exists():
        pytest.skip("prompts.json is not there: it belongs in ../shared/reference beside the checkout")
    recorded = json.loads(path.read_text())["think"]
    assert recorded["VLM_THINK_SYSTEM_PROMPT"] == THINK_THEN_ANSWER
    assert recorded["GEN_THINK_SYSTEM_PROMPT"] == THINK_THEN_DRAW
