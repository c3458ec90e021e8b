"""From an address to a document ready to be packed: read, recipe, encode, drop. Runs in worker processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from loom_jax.core import ConfigError, InputError
from loom_jax.data.bad_rows import BadRow
from loom_jax.data.config import DataConfig, DropoutConfig
from loom_jax.data.order import Address
from loom_jax.data.packing import Packable
from loom_jax.data.recipes import RECIPES, Recipe
from loom_jax.data.sources import Row, Source
from loom_jax.document import (
    EncodedSegment,
    Encoder,
    HistoryPolicy,
    ImageTokens,
    Picture,
    Segment,
    drop_segments,
    lay_out,
)


@dataclasses.dataclass(frozen=True)
class Element:
    """What reading one row gave: a document, or the fault of the row."""

    address: Address
    document: Packable | None = None
    fault: BadRow | None = None


class Reader:
    """Reads rows by address. The same address gives the same document, whoever reads it when.

    Raises:
      ConfigError: a recipe is unknown.
      TokenizerError: the tokenizer lacks a token that a recipe needs.
    """

    def __init__(self, config: DataConfig, sources: Sequence[Source], encoder: Encoder):
        self._config, self._sources = config, list(sources)
        self._options: dict[str, Any] = {"method": config.method}
        if config.history is not None:
            self._options["history"] = HistoryPolicy.parse(config.history)
        self._recipes = [find_recipe(entry.recipe) for entry in config.mixture]
        self._encoders = [
            dataclasses.replace(
                encoder,
                vae_transform=entry.vae_transform or encoder.vae_transform,
                vit_transform=entry.vit_transform or encoder.vit_transform,
            )
            for entry in config.mixture
        ]
        for entry, recipe in zip(config.mixture, self._recipes, strict=True):
            if entry.max_frames is not None and "max_frames" not in recipe.options:
                raise ConfigError(f"mixture entry {entry.name!r} has max_frames: recipe {entry.recipe!r} has no frames")
            for token in recipe.tokens:
                encoder.tokenizer.token_id(token)

    def __call__(self, address: Address) -> Element:
        """Returns the document at an address, or what is wrong with its row."""
        try:
            return Element(address, self.document(address))
        except BadRow as fault:
            return Element(address, fault=fault)

    def read(self, address: Address) -> Row:
        """Returns the row at an address.

        Raises:
          BadRow: it cannot be read.
        """
        return self._sources[address.entry][address.row]

    def document(self, address: Address) -> Packable:
        """Returns the document at an address.

        Raises:
          BadRow: the row cannot be read, or cannot become a document.
        """
        entry = address.entry
        rng = np.random.default_rng((self._config.seed, entry, address.epoch, address.row))
        recipe, encoder = self._recipes[entry], self._encoders[entry]
        options = {**self._options, "max_frames": self._config.mixture[entry].max_frames}
        given = {name: value for name, value in options.items() if name in recipe.options}
        segments = recipe.build(self.read(address), rng, **given)
        segments = repeat_noisy(segments, self._config.mixture[entry].noisy_copies)
        images = sum(isinstance(segment, Picture) for segment in segments)
        try:
            encoded = encoder.encode(segments, img_num=max(images, 1) if recipe.shares_area else 1, raw=True)
        except InputError as error:
            raise BadRow("cannot be encoded", str(error)) from error
        if self._config.latents == "moments" and any(_lacks_moments(segment) for segment in encoded):
            raise BadRow("no stored latents", "latents='moments' reads what `loom data encode` wrote")
        kept = drop_conditions(encoded, self._config.mixture[entry].dropout or recipe.dropout, rng)
        return Packable(kept, lay_out(kept, encoder.special, weighting=self._config.weighting))


def find_recipe(name: str) -> Recipe:
    """Returns a recipe by its name.

    Raises:
      InputError: there is none of that name.
    """
    if name not in RECIPES:
        raise InputError(f"unknown recipe {name!r}: there are {', '.join(RECIPES)}")
    return RECIPES[name]


def repeat_noisy(segments: Sequence[Segment], copies: int) -> list[Segment]:
    """Returns segments with every picture that is to be generated `copies` times in a row."""
    repeats = [copies if isinstance(segment, Picture) and segment.role == "noisy" else 1 for segment in segments]
    return [segment for segment, count in zip(segments, repeats, strict=True) for _ in range(count)]


def drop_conditions(
    segments: Sequence[EncodedSegment], dropout: DropoutConfig, rng: np.random.Generator
) -> list[EncodedSegment]:
    """Marks droppable segments as dropped with the probabilities of `dropout`."""
    chance = {"text": dropout.text, "clean": dropout.clean, "vit": dropout.vit}
    if not dropout.together:
        return drop_segments(segments, lambda kind: bool(rng.random() < chance[kind]))
    texts, images = rng.random(2) < (dropout.text, dropout.clean)
    return drop_segments(segments, lambda kind: bool(texts if kind == "text" else images))


def _lacks_moments(segment: Any) -> bool:
    return isinstance(segment, ImageTokens) and segment.role != "vit" and segment.moments is None
