"""Images: reading them safely, resizing them as the original does, and cutting pixels and latents into tokens.

Source: spec sections 6 and 10. Pixels are float32 [H, W, 3] in [-1, 1], 0 is mid-grey.
"""

from __future__ import annotations

import dataclasses
import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image as PILImage

from loom_jax.core import ImageError, InputError

MAX_IMAGE_PIXELS = 89_478_485
"""Larger pictures are refused before they are decoded: 0.25 GiB as RGB, where Pillow warns of a decompression bomb.

No transform keeps more than 2 million pixels, so nothing is gained by reading more.
"""

_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)
"""What Pillow's decoders raise for damaged files."""


def open_image(source: str | os.PathLike[str] | bytes, name: str | None = None) -> PILImage.Image:
    """Reads and decodes a picture from a path or from its encoded bytes.

    An orientation kept in EXIF data is not applied: the original ignores it, and checkpoints were trained without it.

    Args:
      source: a path, or the bytes of an encoded picture.
      name: how errors name the picture; by default its path.

    Raises:
      ImageError: the file is missing, is no picture, is damaged, or has more than MAX_IMAGE_PIXELS.
    """
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), name or "the picture")
    path = Path(source)
    if not path.is_file():
        found = "it is a folder" if path.is_dir() else "there is no such file"
        raise ImageError(f"{name or path}: {found}: expected a picture file, such as PNG or JPEG")
    return _decode(path, name or str(path))


def _decode(source: Path | io.BytesIO, name: str) -> PILImage.Image:
    try:
        with warnings.catch_warnings():  # around the header only: the filters belong to the whole process
            warnings.simplefilter("error", PILImage.DecompressionBombWarning)
            image = PILImage.open(source)
        with image:
            # Pillow's own bound can be switched off by the program that uses this one.
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise PILImage.DecompressionBombError(f"{image.width} x {image.height} pixels")
            image.load()
            return image.copy()
    except (PILImage.DecompressionBombError, PILImage.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: too large ({error}): scale it down to at most {MAX_IMAGE_PIXELS} pixels") from error
    except PILImage.UnidentifiedImageError as error:
        raise ImageError(f"{name}: not a picture that can be read: expected one such as PNG or JPEG") from error
    except _DAMAGED as error:
        raise ImageError(f"{name}: damaged, cut short or not readable ({error}): make or copy it anew") from error


def to_rgb(image: PILImage.Image) -> PILImage.Image:
    """Returns the picture as RGB; one with transparency is laid on white.

    Alpha counts where the mode is RGBA or the file declares a transparent colour; that of mode LA is dropped, as in the
    original.
    """
    if image.mode == "RGBA" or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = PILImage.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """Resizes a picture into bounds that the model can take, and normalises it.

    Attributes:
      max_size, min_size: bounds in pixels: of the longer side after shrinking, of the shorter side after enlarging.
      stride: both sides become multiples of it.
      max_pixels: bound on the area, shared among the `img_num` images of a sample.
    """

    max_size: int
    min_size: int
    stride: int
    max_pixels: int = 14 * 14 * 9 * 1024

    def __call__(self, image: PILImage.Image, img_num: int = 1) -> np.ndarray:
        """Returns the resized RGB picture as float32 [H, W, 3] in [-1, 1]."""
        return normalize(self.resize(image, img_num))

    def resize(self, image: PILImage.Image, img_num: int = 1) -> PILImage.Image:
        """Returns the picture with the size that `size` gives (bicubic, antialiased); itself where that is its own."""
        size = self.size(*image.size, img_num)
        return image if size == image.size else image.resize(size, PILImage.Resampling.BICUBIC)

    def size(self, width: int, height: int, img_num: int = 1) -> tuple[int, int]:
        """Returns the new (width, height) of a picture of that size.

        An area beyond the bound scales the *sides* by the ratio of the areas, which shrinks more than needed: kept for
        parity (spec section 13).
        """
        scale = max(min(self.max_size / max(width, height), 1.0), self.min_size / min(width, height))
        width, height = self._scaled(width, height, scale)
        if width * height > self.max_pixels / img_num:
            width, height = self._scaled(width, height, self.max_pixels / img_num / (width * height))
        if max(width, height) > self.max_size:
            width, height = self._scaled(width, height, self.max_size / max(width, height))
        return width, height

    def _scaled(self, width: int, height: int, scale: float) -> tuple[int, int]:
        return self._to_stride(round(width * scale)), self._to_stride(round(height * scale))

    def _to_stride(self, length: int) -> int:
        return max(self.stride, round(length / self.stride) * self.stride)


VAE_TRANSFORM = ImageTransform(max_size=1024, min_size=512, stride=16)
VIT_TRANSFORM = ImageTransform(max_size=980, min_size=224, stride=14)


def bounded_transform(transform: ImageTransform, cell: int, side: int) -> ImageTransform:
    """Returns a transform whose pictures fit into a position table of side x side cells of `cell` pixels."""
    largest = min(transform.max_size, cell * side)
    return ImageTransform(largest, min(transform.min_size, largest // 2), cell, transform.max_pixels)


def normalize(image: PILImage.Image) -> np.ndarray:
    """Returns an RGB picture as float32 [H, W, 3] in [-1, 1].

    Raises:
      InputError: the picture is not RGB.
    """
    if image.mode != "RGB":
        raise InputError(f"a picture of mode {image.mode} was given, expected RGB: convert it with to_rgb")
    return unit_range(np.asarray(image))


def unit_range(pixels: np.ndarray) -> np.ndarray:
    """Returns uint8 pixels of any shape as float32 in [-1, 1]; others, which are there already, as they are."""
    if pixels.dtype != np.uint8:
        return pixels
    # Two steps in float32, as torchvision does them, so that every bit agrees.
    unit = pixels.astype(np.float32) / np.float32(255)
    return (unit - np.float32(0.5)) / np.float32(0.5)


def patchify(pixels: np.ndarray, patch: int) -> np.ndarray:
    """Cuts pixels [H, W, 3] into [H/P * W/P, 3PP]: patches row by row, inside each the order (row, column, channel).

    Raises:
      InputError: a side is not a multiple of `patch`.
    """
    return pack_latent(pixels, patch)


def pack_latent(z: np.ndarray, patch: int) -> np.ndarray:
    """Cuts a grid [h*P, w*P, C] into tokens [h*w, P*P*C], row by row, inside each the order (row, column, channel).

    Raises:
      InputError: a side is not a multiple of `patch`.
    """
    height, width, channels = z.shape
    if height % patch or width % patch:
        raise InputError(
            f"a size of {width} x {height} (width x height) cannot be cut into squares of {patch}: resize it first"
        )
    cut = z.reshape(height // patch, patch, width // patch, patch, channels)
    return cut.transpose(0, 2, 1, 3, 4).reshape(-1, patch * patch * channels)


def unpack_latent(tokens: np.ndarray, grid: tuple[int, int], patch: int) -> np.ndarray:
    """Joins tokens [h*w, P*P*C] of a grid (h, w) into [h*P, w*P, C]: undoes `pack_latent`.

    Raises:
      InputError: the number of tokens is not that of the grid, or their width does not split into P*P equal parts.
    """
    (rows, columns), (count, width) = grid, tokens.shape
    if count != rows * columns or width % patch**2:
        raise InputError(
            f"{count} tokens of width {width} do not fill a {rows} x {columns} grid with {patch} x {patch} cells each"
        )
    cells = tokens.reshape(rows, columns, patch, patch, width // patch**2)
    return cells.transpose(0, 2, 1, 3, 4).reshape(rows * patch, columns * patch, width // patch**2)
