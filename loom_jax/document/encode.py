"""From a document as a person writes it to encoded segments that the layout can place."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image as PILImage

from loom_jax.core import ConfigError, LoomConfig
from loom_jax.document.document import EncodedSegment, ImageTokens, Picture, Role, Segment, Text, TextTokens
from loom_jax.document.layout import SpecialIds
from loom_jax.document.tokenizer import Tokenizer
from loom_jax.document.transforms import (
    VAE_TRANSFORM,
    VIT_TRANSFORM,
    ImageTransform,
    bounded_transform,
    normalize,
    patchify,
    to_rgb,
    unit_range,
)


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Encodes texts and pictures for one model.

    Attributes:
      tokenizer: of the checkpoint.
      latent_stride: pixels a side of one latent token (`LoomConfig.latent_stride`).
      vit_patch: pixels a side of one ViT patch.
      vae_transform, vit_transform: for `clean` and `noisy` pictures, and for `vit` pictures.
    """

    tokenizer: Tokenizer
    latent_stride: int
    vit_patch: int
    vae_transform: ImageTransform = VAE_TRANSFORM
    vit_transform: ImageTransform = VIT_TRANSFORM

    def __post_init__(self) -> None:
        for name, transform, cell in (
            ("vae_transform", self.vae_transform, self.latent_stride),
            ("vit_transform", self.vit_transform, self.vit_patch),
        ):
            if transform.stride % cell:
                raise ConfigError(
                    f"{name} makes sides multiples of {transform.stride}, but a token covers {cell} pixels a side: "
                    f"set its stride to a multiple of {cell}"
                )

    @property
    def special(self) -> SpecialIds:
        """Ids of the marks that frame segments, as `lay_out` wants them."""
        return self.tokenizer.special

    def encode(self, segments: Sequence[Segment], img_num: int = 1, raw: bool = False) -> list[EncodedSegment]:
        """Returns one encoded segment for each segment, in order. A picture shown twice alike is resized once.

        Args:
          segments: texts and pictures.
          img_num: number of images that share the area bound of the ViT transform (data with many images a sample).
          raw: leave pixels as uint8; `unit_range` of them is what they are otherwise, bit for bit.
        """
        seen: dict[tuple[int, bool], np.ndarray] = {}
        return [
            self._text(segment) if isinstance(segment, Text) else self._picture(segment, img_num, raw, seen)
            for segment in segments
        ]

    def condition_pictures(self, image: PILImage.Image, roles: Sequence[Role] = ("clean", "vit")) -> list[Picture]:
        """Returns an input picture of a generation request in its roles.

        The original resizes it for the VAE first and shows the result to the ViT too (spec section 11), even where the
        VAE does not see it. Its size is then the default size of the output.
        """
        resized = self.vae_transform.resize(to_rgb(image))
        return [Picture(resized, role) for role in roles]

    def patches(self, image: ImageTokens) -> np.ndarray:
        """Returns the ViT patches of a `vit` image with pixels, float32 [V, 3PP], one row for each cell of its grid."""
        if image.role != "vit" or image.pixels is None:
            raise ValueError(
                f"an image of role {image.role} {'with' if image.pixels is not None else 'without'} pixels"
            )
        return unit_range(patchify(image.pixels, self.vit_patch))

    def _text(self, text: Text) -> TextTokens:
        return TextTokens(
            ids=self.tokenizer.encode(text.text),
            loss=text.loss,
            droppable=text.droppable,
            end_label=None if text.end_label is None else self.tokenizer.token_id(text.end_label),
        )

    def _picture(
        self, picture: Picture, img_num: int, raw: bool, seen: dict[tuple[int, bool], np.ndarray]
    ) -> ImageTokens:
        understood = picture.role == "vit"
        if picture.moments is not None and not understood:
            rows, columns, _ = picture.moments.shape
            return ImageTokens(picture.role, (rows, columns), moments=picture.moments, droppable=picture.droppable)
        key = id(picture.image), understood
        if key not in seen:
            transform = self.vit_transform if understood else self.vae_transform
            resized = transform.resize(to_rgb(picture.image), img_num if understood else 1)
            seen[key] = np.asarray(resized) if raw else normalize(resized)
        pixels, cell = seen[key], self.vit_patch if understood else self.latent_stride
        height, width, _ = pixels.shape
        return ImageTokens(
            role=picture.role,
            grid=(height // cell, width // cell),
            pixels=pixels,
            droppable=picture.droppable,
        )


def make_encoder(config: LoomConfig, tokenizer: Tokenizer) -> Encoder:
    """Returns the document encoder of a model: the release's image bounds, or what its position tables can hold.

    Raises:
      ConfigError: the tokenizer has more tokens than the embedding table has rows.
    """
    if len(tokenizer) > config.decoder.vocab_size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, the embedding table {config.decoder.vocab_size} rows: "
            "raise model.decoder.vocab_size, or use fewer added tokens"
        )
    return Encoder(
        tokenizer=tokenizer,
        latent_stride=config.latent_stride,
        vit_patch=config.vit.patch_size,
        vae_transform=bounded_transform(VAE_TRANSFORM, config.latent_stride, config.max_latent_size),
        vit_transform=bounded_transform(VIT_TRANSFORM, config.vit.patch_size, config.vit_max_num_patch_per_side),
    )
