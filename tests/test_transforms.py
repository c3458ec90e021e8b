"""Image transforms against the recorded ones, bit for bit; cutting into tokens; and pictures that cannot be read."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from loom_jax.core import ImageError, InputError
from loom_jax.document import (
    MAX_IMAGE_PIXELS,
    VAE_TRANSFORM,
    VIT_TRANSFORM,
    ImageTransform,
    grid_position_ids,
    interpolated_position_ids,
    normalize,
    open_image,
    pack_latent,
    patchify,
    to_rgb,
    unpack_latent,
)
from tests.reference import golden

SOURCES = ["50x37", "120x45", "20x20", "64x48", "33x97"]


@pytest.mark.parametrize("case", range(20))
def test_recorded_transforms_bit_for_bit(case: int) -> None:
    record = golden("transforms")
    *arguments, img_num = map(int, record[f"case_{case}_args"])
    image = PILImage.fromarray(record[f"image_{SOURCES[case // 4]}"])
    pixels = ImageTransform(*arguments)(image, img_num)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, record[f"case_{case}_out"].transpose(1, 2, 0))


def test_all_recorded_transforms_are_tested() -> None:
    assert sum(name.endswith("_out") and name.startswith("case_") for name in golden("transforms")) == 20


def test_recorded_sizes() -> None:
    for row in golden("transforms")["sizes"].tolist():
        width, height, *arguments, img_num, new_width, new_height = row
        assert ImageTransform(*arguments).size(width, height, img_num) == (new_width, new_height), row


def test_defaults_of_the_release() -> None:
    assert ImageTransform(1024, 512, 16, 1806336) == VAE_TRANSFORM
    assert ImageTransform(980, 224, 14, 1806336) == VIT_TRANSFORM


def test_a_picture_of_the_right_size_is_not_resampled() -> None:
    image = PILImage.fromarray(golden("transforms")["image_64x48"])
    assert ImageTransform(64, 32, 16).resize(image) is image


def test_recorded_conversions_to_rgb() -> None:
    record = golden("transforms")
    for kind in ("rgba", "l"):
        converted = to_rgb(PILImage.fromarray(record[f"rgb_{kind}_in"]))
        assert converted.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(converted), record[f"rgb_{kind}_out"])


def test_a_transparent_colour_becomes_white() -> None:
    image = PILImage.new("P", (3, 2), 1)
    image.putpalette([0, 0, 0, 200, 10, 20])
    image.putpixel((1, 0), 0)
    image.info["transparency"] = 0
    rgb = np.asarray(to_rgb(image))
    assert rgb[0, 1].tolist() == [255, 255, 255] and rgb[1, 2].tolist() == [200, 10, 20]


def test_transparency_survives_reading_a_file() -> None:
    stream = io.BytesIO()
    PILImage.fromarray(np.full((2, 3, 3), 9, np.uint8)).save(stream, "PNG", transparency=(9, 9, 9))
    assert np.asarray(to_rgb(open_image(stream.getvalue()))).min() == 255


def test_normalize_refuses_other_modes() -> None:
    with pytest.raises(InputError, match=r"mode L.*to_rgb"):
        normalize(PILImage.new("L", (3, 2)))


def test_recorded_vit_patches() -> None:
    record = golden("vit")
    patches = [patchify(record[f"image_{i}"].transpose(1, 2, 0), 14) for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(patches), record["patches"])


def test_recorded_patchify() -> None:
    record = golden("vae")
    patches = patchify(record["patchify_in"].transpose(1, 2, 0), 14)
    np.testing.assert_array_equal(patches, record["patchify_out"])


def test_recorded_latent_packing_and_back() -> None:
    record = golden("vae")
    z = record["pack_in"].transpose(1, 2, 0)
    grid = (z.shape[0] // 2, z.shape[1] // 2)
    tokens = pack_latent(z, 2)
    np.testing.assert_array_equal(tokens, record["pack_out"])
    np.testing.assert_array_equal(unpack_latent(tokens, grid, 2), z)
    np.testing.assert_array_equal(unpack_latent(tokens, grid, 2), record["unpack_out"][0].transpose(1, 2, 0))


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InputError, match=r"42 x 30 .*squares of 14"):
        patchify(np.zeros((30, 42, 3), np.float32), 14)
    with pytest.raises(InputError, match=r"7 tokens of width 12 do not fill a 2 x 3 grid"):
        unpack_latent(np.zeros((7, 12), np.float32), (2, 3), 2)
    with pytest.raises(InputError, match="width 13"):
        unpack_latent(np.zeros((6, 13), np.float32), (2, 3), 2)


@pytest.mark.parametrize("case", range(8))
def test_recorded_position_ids(case: int) -> None:
    record = golden("pos")
    for kind, position_ids in (("ext", grid_position_ids), ("int", interpolated_position_ids)):
        height, width, patch, side = map(int, record[f"{kind}_{case}_args"])
        ids = position_ids((height // patch, width // patch), side)
        assert ids.dtype == np.int32
        np.testing.assert_array_equal(ids, record[f"{kind}_{case}_ids"])


def test_a_grid_beyond_the_position_table_is_refused() -> None:
    with pytest.raises(InputError, match=r"3 x 11 tokens .*table of 10 x 10"):
        grid_position_ids((3, 11), 10)


def encoded(format: str) -> bytes:
    pixels = np.random.default_rng(3).integers(0, 256, (37, 50, 3), dtype=np.uint8)
    stream = io.BytesIO()
    PILImage.fromarray(pixels).save(stream, format)
    return stream.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_pictures_open_from_paths_and_from_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    pictures = [open_image(tmp_path / "a.png"), open_image(str(tmp_path / "a.png")), open_image(encoded("PNG"))]
    assert [picture.size for picture in pictures] == [(50, 37)] * 3
    np.testing.assert_array_equal(np.asarray(pictures[0]), np.asarray(pictures[2]))


def test_missing_files_and_folders_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"away\.png: there is no such file"):
        open_image(tmp_path / "away.png")
    with pytest.raises(ImageError, match="it is a folder"):
        open_image(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n"])
def test_other_files_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "b.png").write_bytes(content)
    with pytest.raises(ImageError, match=r"b\.png: ") as caught:
        open_image(tmp_path / "b.png")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_truncated_pictures_are_refused(format: str) -> None:
    whole = encoded(format)
    for share in (0.2, 0.5, 0.8):
        with pytest.raises(ImageError, match="row 7"):
            open_image(whole[: int(len(whole) * share)], name="row 7")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of odd TIFF tags and goes on
@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_damaged_pictures_raise_nothing_but_image_errors(format: str) -> None:
    rng, whole = np.random.default_rng(5), encoded(format)
    for _ in range(30):
        damaged = bytearray(whole)
        for place in rng.integers(0, min(len(whole), 120), 4):
            damaged[place] = rng.integers(256)
        try:
            assert open_image(bytes(damaged)).width > 0
        except ImageError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("size", [(10_000, 9_000), (60_000, 50_000)])
@pytest.mark.parametrize("pillow_limit", [MAX_IMAGE_PIXELS, None])
def test_gigantic_pictures_are_refused_before_they_are_decoded(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], pillow_limit: int | None
) -> None:
    """10,000 x 9,000 is where Pillow only warns; decoding would fail otherwise, as the file holds no pixels."""
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", pillow_limit)
    with warnings.catch_warnings(record=True) as heard, pytest.raises(ImageError, match=r"big\.png: too large"):
        open_image(png_header(*size), name="big.png")
    assert not heard


def test_orientation_in_exif_is_not_applied(tmp_path: Path) -> None:
    exif = PILImage.Exif()
    exif[0x0112] = 6
    PILImage.new("RGB", (50, 37)).save(tmp_path / "c.jpg", exif=exif)
    assert open_image(tmp_path / "c.jpg").size == (50, 37)
