"""Packing: documents laid into rows of static length, the und and the gen stream apart (DESIGN 5.1). numpy only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from loom_jax.core import InputError, LoomConfig
from loom_jax.document import (
    NO_TOKEN,
    PADDING,
    DocumentLayout,
    EncodedSegment,
    ImageTokens,
    TokenLayout,
    grid_position_ids,
    interpolated_position_ids,
    patchify,
    unit_range,
)


class Streams(NamedTuple):
    """What the transformer takes, but for the latents. Arrays of B rows; U und tokens, G gen tokens, V ViT patches."""

    und: TokenLayout
    """[B, U]."""
    token_ids: Any
    """int32 [B, U]: text tokens and markers; 0 at ViT tokens and filler."""
    vit_index: Any
    """int32 [B, U]: the place of a ViT token in the row's pool of patches, NO_TOKEN elsewhere."""
    gen: TokenLayout
    """[B, G]."""
    latent_positions: Any
    """int32 [B, G]: row of the latent position table."""
    patches: Any
    """float32 [B, V, 3PP]."""
    vit_positions: Any
    """int32 [B, V]: row of the ViT's position tables."""
    vit_segments: Any
    """int32 [B, V]: which image of the row a patch belongs to, PADDING for filler."""


class Targets(NamedTuple):
    """What training learns from a batch."""

    labels: Any
    """int32 [B, U]: the next token, NO_TOKEN where there is no loss."""
    label_weights: Any
    """float32 [B, U]: weight of each label when losses are reweighted, 0 without label."""
    noise_split: Any
    """int32 [B, G]: number of the noisy split within the row (its tokens share a timestep), NO_TOKEN for clean ones."""


class LatentSource(NamedTuple):
    """Where the latent of each gen token comes from."""

    image: Any
    """int32 [B, G]: number of the VAE image within the row, in the order of its segments; NO_TOKEN for filler."""
    cell: Any
    """int32 [B, G]: row-major index in that image's own grid of latent tokens."""


class Batch(NamedTuple):
    """Packed documents: a pytree of numpy arrays with static shapes."""

    streams: Streams
    targets: Targets
    latents: LatentSource


@dataclasses.dataclass(frozen=True)
class Budget:
    """Static lengths of one row: und tokens, gen tokens, ViT patches."""

    und: int
    gen: int
    vit: int


@dataclasses.dataclass(frozen=True)
class Tables:
    """The tables that positions of image tokens index, and the ViT patch: sizes of the model that a pack is for."""

    max_latent_size: int
    vit_side: int
    patch_size: int
    latent_dim: int = 0
    """Values in one latent token, CPP; needed only where latents were computed beforehand."""
    interpolate: bool = False
    """Stretches every grid over the whole table, instead of laying it into the corner."""

    @classmethod
    def of(cls, config: LoomConfig) -> Tables:
        """Returns the tables of a model."""
        side, patch = config.vit_max_num_patch_per_side, config.vit.patch_size
        return cls(config.max_latent_size, side, patch, config.latent_dim, config.interpolate_pos)

    def latent_positions(self, grid: tuple[int, int]) -> np.ndarray:
        """Returns the row of the latent table of each cell of a grid; raises InputError where it does not fit."""
        return self._positions(grid, self.max_latent_size)

    def vit_positions(self, grid: tuple[int, int]) -> np.ndarray:
        """Returns the row of the ViT's tables of each cell of a grid; raises InputError where it does not fit."""
        return self._positions(grid, self.vit_side)

    def _positions(self, grid: tuple[int, int], side: int) -> np.ndarray:
        return interpolated_position_ids(grid, side) if self.interpolate else grid_position_ids(grid, side)


@dataclasses.dataclass(frozen=True)
class Packable:
    """One document ready to be packed."""

    segments: Sequence[EncodedSegment]
    layout: DocumentLayout

    @property
    def need(self) -> Budget:
        """What this document takes of each budget."""
        gen = int(self.layout.is_gen.sum())
        vit = sum(s.grid[0] * s.grid[1] for s in self.images("vit"))
        return Budget(len(self.layout) - gen, gen, vit)

    def images(self, *roles: str) -> list[ImageTokens]:
        """Returns the image segments in one of `roles` that were not dropped, in order."""
        return [s for s in self.segments if isinstance(s, ImageTokens) and s.role in roles and not s.dropped]


def total_need(documents: Sequence[Packable]) -> Budget:
    """Returns what `documents` take together."""
    needs = [d.need for d in documents]
    return Budget(sum(n.und for n in needs), sum(n.gen for n in needs), sum(n.vit for n in needs))


def pack(rows: Sequence[Sequence[Packable]], budget: Budget, tables: Tables) -> Batch:
    """Packs each list of documents into one row of `budget`.

    Raises:
      InputError: the documents of a row do not fit; says which budget and by how much.
    """
    return _stack([_pack_row(row, budget, tables) for row in rows])


def _stack(rows: Sequence[Any]) -> Any:
    """Stacks equal NamedTuples of arrays along a new leading axis."""
    first = rows[0]
    if isinstance(first, tuple):
        return type(first)(*(_stack([row[i] for row in rows]) for i in range(len(first))))
    return np.stack(rows)


def _pack_row(documents: Sequence[Packable], budget: Budget, tables: Tables) -> Batch:
    need = total_need(documents)
    for name in ("und", "gen", "vit"):
        if getattr(need, name) > getattr(budget, name):
            raise InputError(
                f"the documents of one row need {getattr(need, name)} {name} tokens, the budget is "
                f"{getattr(budget, name)}: raise the budget or give fewer, shorter or smaller segments"
            )
    row = _Row(budget, tables)
    for number, document in enumerate(documents):
        row.add(number, document)
    return row.finish()


class _Row:
    """Collects the tokens of a row's documents, stream by stream."""

    def __init__(self, budget: Budget, tables: Tables):
        self.budget, self.tables = budget, tables
        self.und: list[list[np.ndarray]] = []
        self.gen: list[list[np.ndarray]] = []
        self.vit: list[list[np.ndarray]] = []
        self.num_patches = self.num_vit = self.num_vae = self.num_noisy = 0

    def add(self, number: int, document: Packable) -> None:
        layout = document.layout
        und = ~layout.is_gen
        tokens = layout.tokens._replace(document=np.full(len(layout), number, np.int32))
        vit_index, latent_position = self._image_indices(document)
        image = self._vae_images(document)
        self.und.append(
            [a[und] for a in (*tokens, np.maximum(layout.token_ids, 0), vit_index, layout.labels, layout.label_weights)]
        )
        gen = layout.is_gen
        noise_split = self._noise_splits(document)
        self.gen.append([a[gen] for a in (*tokens, latent_position, noise_split, image, layout.cell)])

    def _image_indices(self, document: Packable) -> tuple[np.ndarray, np.ndarray]:
        """Numbers the ViT tokens through the pool, adds their patches to it, and finds the rows of position tables."""
        layout = document.layout
        vit_index = np.full(len(layout), NO_TOKEN, np.int32)
        latent_position = np.zeros(len(layout), np.int32)
        for index, segment in enumerate(document.segments):
            if not isinstance(segment, ImageTokens) or segment.dropped:
                continue
            own = (layout.segment == index) & (layout.cell != NO_TOKEN)
            if segment.role != "vit":
                latent_position[own] = self.tables.latent_positions(segment.grid)
                continue
            count = segment.grid[0] * segment.grid[1]
            vit_index[own] = np.arange(self.num_patches, self.num_patches + count)
            self.vit.append(
                [
                    _patches(segment, self.tables.patch_size),
                    self.tables.vit_positions(segment.grid),
                    np.full(count, self.num_vit, np.int32),
                ]
            )
            self.num_patches += count
            self.num_vit += 1
        return vit_index, latent_position

    def _vae_images(self, document: Packable) -> np.ndarray:
        """Numbers the VAE images of the row."""
        image = np.full(len(document.layout), NO_TOKEN, np.int32)
        for index, segment in enumerate(document.segments):
            if isinstance(segment, ImageTokens) and segment.role != "vit" and not segment.dropped:
                image[document.layout.segment == index] = self.num_vae
                self.num_vae += 1
        return image

    def _noise_splits(self, document: Packable) -> np.ndarray:
        """Numbers the splits of noisy images, by their role: frames of a video are noisy in a split of mode full."""
        layout = document.layout
        out = np.full(len(layout), NO_TOKEN, np.int32)
        noisy = [i for i, s in enumerate(document.segments) if isinstance(s, ImageTokens) and s.role == "noisy"]
        own = np.isin(layout.segment, noisy)
        for split in np.unique(layout.tokens.split[own]):
            out[own & (layout.tokens.split == split)] = self.num_noisy
            self.num_noisy += 1
        return out

    def finish(self) -> Batch:
        budget = self.budget
        und = _fill(self.und, budget.und, [PADDING, 0, 0, 0, 0, 0, NO_TOKEN, NO_TOKEN, 0.0])
        gen = _fill(self.gen, budget.gen, [PADDING, 0, 0, 0, 0, 0, NO_TOKEN, NO_TOKEN, 0])
        vit = _fill(self.vit, budget.vit, [0.0, 0, PADDING], [3 * self.tables.patch_size**2])
        streams = Streams(TokenLayout(*und[:5]), und[5], und[6], TokenLayout(*gen[:5]), gen[5], *vit)
        return Batch(streams, Targets(und[7], und[8], gen[6]), LatentSource(gen[7], gen[8]))


def _patches(segment: ImageTokens, patch_size: int) -> np.ndarray:
    """Patches of a ViT segment [n, 3PP]; zeros where only the layout is wanted and no pixels were given."""
    if segment.pixels is None:
        return np.zeros((segment.grid[0] * segment.grid[1], 3 * patch_size**2), np.float32)
    return unit_range(patchify(segment.pixels, patch_size))


def _fill(
    parts: Sequence[Sequence[np.ndarray]], length: int, fillers: Sequence[float], first_shape: Sequence[int] = ()
) -> list[np.ndarray]:
    """Joins the columns of `parts` and fills each up to `length`; only the first column may have more dimensions."""
    out = []
    for i, filler in enumerate(fillers):
        dtype = np.float32 if isinstance(filler, float) else np.int32
        column = np.full((length, *(first_shape if i == 0 else ())), filler, dtype)
        values = [part[i] for part in parts]
        if values:
            joined = np.concatenate(values)
            column[: len(joined)] = joined
        out.append(column)
    return out
