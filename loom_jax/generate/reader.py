"""What all generation shares: documents into contexts, forks of them, text and pictures after them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from PIL import Image as PILImage

from loom_jax.core import InputError, LoomConfig
from loom_jax.data import Batch, Budget, Packable, Tables, pack, total_need
from loom_jax.document import (
    NO_TOKEN,
    EncodedSegment,
    Encoder,
    ImageTokens,
    LayoutState,
    lay_out,
    pack_latent,
    unpack_latent,
)
from loom_jax.generate.buckets import bucket
from loom_jax.generate.context import Context
from loom_jax.generate.engine import Denoising, Engine
from loom_jax.generate.guidance import Guidance
from loom_jax.generate.noise import NoiseSource, SeededNoise
from loom_jax.generate.requests import ImageSettings, TextSettings
from loom_jax.generate.text import TextControls
from loom_jax.nn import Purpose, denoising_schedule, make_key

OnStep = Callable[[int, int], None]
SCHEDULE_BUCKET = 64
NOTHING = Budget(0, 0, 0)


@dataclasses.dataclass(frozen=True)
class Read:
    """Contexts of some rows, and where each row's next segment begins."""

    context: Context
    ends: tuple[LayoutState, ...]

    @property
    def room(self) -> int:
        """Free slots of the fullest row."""
        return self.context.capacity - max(end.order for end in self.ends)


@dataclasses.dataclass(frozen=True)
class Query:
    """A picture to be made: (height, width), seed and number within the request, and whether pictures precede it."""

    size: tuple[int, int]
    seed: int
    number: int = 0
    after_pictures: bool = True


class Reader:
    """Reads documents and writes after them, for batches of rows.

    Args:
      config: of the model.
      engine: weights and compiled calls.
      encoder: tokenizer and image transforms.
      noise: where draws come from; by default each request's seed.
    """

    def __init__(self, config: LoomConfig, engine: Engine, encoder: Encoder, noise: NoiseSource | None = None):
        self.config, self.engine, self.encoder = config, engine, encoder
        self.noise: NoiseSource = SeededNoise() if noise is None else noise
        self.tables = Tables.of(config)

    def check_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Returns the size (height, width) of a picture to be made.

        Raises:
          InputError: the model cannot make such a picture.
        """
        stride, limit = self.config.latent_stride, self.config.max_latent_size
        named = f"size {size[0]} x {size[1]} (height x width)"
        if any(side <= 0 or side % stride for side in size):
            raise InputError(f"{named}: both must be positive multiples of {stride}")
        if max(size) > limit * stride:
            raise InputError(f"{named}: this model draws at most {limit * stride} pixels a side")
        return size

    def latent_tokens(self, segments: Sequence[EncodedSegment], seed: int, first: int = 0) -> tuple[np.ndarray, ...]:
        """Returns the latent tokens, float32 [cells, C], of every `clean` segment that is not dropped.

        Args:
          first: number of the first of these pictures within its request: it decides the posterior noise.
        """
        patch, channels = self.config.latent_patch_size, self.config.vae.z_channels
        out: list[np.ndarray] = []
        for segment in segments:
            if isinstance(segment, ImageTokens) and segment.role == "clean" and not segment.dropped:
                assert segment.pixels is not None
                grid = segment.grid[0] * patch, segment.grid[1] * patch
                noise = self.noise.posterior(seed, first + len(out), grid, channels)
                out.append(pack_latent(self.engine.encode_image(segment.pixels, noise), patch))
        return tuple(out)

    def read(
        self, documents: Sequence[Sequence[EncodedSegment]], latents: Sequence[Sequence[np.ndarray]], room: int = 0
    ) -> Read:
        """Reads documents into new contexts, one row each, with `room` slots to spare.

        Args:
          latents: for each document the latent tokens [cells, C] of its `clean` segments.
        """
        batch, ends, position, split = self._pack(documents, [LayoutState()] * len(documents))
        capacity = bucket(max(end.order for end in ends) + room)
        filled = self.fill(batch, latents)
        context = self.engine.start(batch.streams, filled, position, split, max(1, capacity))
        return Read(context, ends)

    def extend(
        self,
        read: Read,
        documents: Sequence[Sequence[EncodedSegment]],
        latents: Sequence[Sequence[np.ndarray]],
        least: Budget = NOTHING,
    ) -> Read:
        """Reads more after contexts, which stay as they are: a fork. A row may get nothing.

        Args:
          least: lengths that rows are filled up to, so that calls with shorter documents share what is compiled.

        Raises:
          InputError: the contexts have no room for it.
        """
        batch, ends, position, split = self._pack(documents, read.ends, least)
        longest = max(end.order for end in ends)
        if longest > read.context.capacity:
            raise InputError(f"a context of {read.context.capacity} tokens cannot hold {longest}: read with more room")
        context, _ = self.engine.extend(read.context, batch.streams, self.fill(batch, latents), position, split)
        return Read(context, ends)

    def _pack(
        self, documents: Sequence[Sequence[EncodedSegment]], starts: Sequence[LayoutState], least: Budget = NOTHING
    ) -> tuple[Batch, tuple[LayoutState, ...], np.ndarray, np.ndarray]:
        """Lays documents out from `starts`; also returns where they end, as layout states and as arrays [B]."""
        rows = [
            [Packable(document, lay_out(document, self.encoder.special, start))]
            for document, start in zip(documents, starts, strict=True)
        ]
        needs = [total_need(row) for row in rows]
        und, gen, vit = (bucket(max(getattr(n, name) for n in [least, *needs])) for name in ("und", "gen", "vit"))
        ends = tuple(row[0].layout.end for row in rows)
        position, split = (np.asarray([getattr(e, f) for e in ends], np.int32) for f in ("position", "split"))
        return pack(rows, Budget(max(1, und), gen, vit), self.tables), ends, position, split

    def fill(self, batch: Batch, latents: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
        """Lays latent tokens of every row's images where the gen stream wants them, [B, G, C]."""
        image, cell = batch.latents
        out = np.zeros((*image.shape, self.config.latent_dim), np.float32)
        for row, images in enumerate(latents):
            for number, tokens in enumerate(images):
                own = image[row] == number
                out[row, own] = tokens[cell[row, own]]
        return out

    def write(self, read: Read, seeds: Sequence[int], settings: TextSettings) -> list[tuple[str, bool]]:
        """Returns the text that the model writes after each row, and whether it came to an end by itself.

        The contexts need `text_room(settings)` free slots.
        """
        keys = jnp.stack([make_key(seed, Purpose.TEXT_SAMPLING) for seed in seeds])
        controls = TextControls(jnp.float32(settings.temperature), jnp.float32(settings.top_p))
        buffer = bucket(settings.max_new_tokens)
        decoded = self.engine.decode_text(read.context, keys, controls, settings.max_new_tokens, buffer)
        tokens, finished = np.asarray(decoded.tokens), np.asarray(decoded.finished)
        return [
            (self.encoder.tokenizer.decode(row[row != NO_TOKEN].tolist()), bool(end))
            for row, end in zip(tokens, finished, strict=True)
        ]

    def denoise(
        self,
        read: Read,
        queries: Sequence[Query | None],
        settings: ImageSettings,
        branches: int,
        chunks: int = 1,
        least: int = 0,
    ) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Makes one picture a query; yields (steps done, latent tokens float32 [cells, C] of each), the last when done.

        Args:
          read: contexts of branches * B rows: branch by branch, in each the queries' rows in order.
          queries: B of them; None for a row that makes nothing (it only keeps its place in the batch).
          chunks: in about how many parts, for progress and previews.
          least: latent tokens that rows are filled up to, so that calls with smaller pictures share what is compiled.
        """
        stride, width = self.config.latent_stride, self.config.latent_dim
        images = [
            [] if query is None else [ImageTokens("noisy", (query.size[0] // stride, query.size[1] // stride))]
            for query in queries
        ]
        rows = [
            [Packable(segments, lay_out(segments, self.encoder.special, start))]
            for segments, start in zip(images * branches, read.ends, strict=True)
        ]
        cells = [sum(image.grid[0] * image.grid[1] for image in segments) for segments in images]
        batch = pack(rows, Budget(2, bucket(max(least, *cells)), 0), self.tables)
        noise = np.zeros((len(queries), batch.latents.cell.shape[1], width), np.float32)
        for row, (query, count) in enumerate(zip(queries, cells, strict=True)):
            if query is not None:
                noise[row, :count] = self.noise.initial(query.seed, query.number, count, width)
        scales = [settings.cfg_img_scale if query and query.after_pictures else 1.0 for query in queries]
        guidance, schedule = make_guidance(settings, scales), jnp.asarray(_padded_schedule(settings))
        work = Denoising(read.context, batch.streams, guidance, schedule)
        steps, renorm = settings.num_timesteps - 1, settings.cfg_renorm_type
        for done, state in self.engine.denoise(work, noise, steps, branches, renorm, chunks, settings.taylorseer):
            latents = np.asarray(state)
            yield done, [latents[row, :count] for row, count in enumerate(cells)]

    def picture(self, tokens: np.ndarray, size: tuple[int, int]) -> PILImage.Image:
        """Returns the picture of (height, width) `size` that latent tokens [cells, C] hold."""
        stride = self.config.latent_stride
        grid = size[0] // stride, size[1] // stride
        latents = unpack_latent(tokens, grid, self.config.latent_patch_size)
        return PILImage.fromarray(self.engine.decode_image(latents))


def text_room(settings: TextSettings) -> int:
    """Returns how many slots a context must have free for a text."""
    return bucket(settings.max_new_tokens) + 1


def count_branches(settings: ImageSettings, pictures: bool) -> int:
    """Returns how many guidance branches a batch needs; where no row has pictures there are none to leave out."""
    if settings.cfg_text_scale <= 1:
        return 1
    return 3 if pictures and settings.cfg_img_scale > 1 else 2


def make_guidance(settings: ImageSettings, image_scales: Sequence[float]) -> Guidance:
    """Returns the guidance of a batch; the image scale row by row, since a row without pictures has none."""
    return Guidance(
        text_scale=jnp.full(len(image_scales), settings.cfg_text_scale, jnp.float32),
        image_scale=jnp.asarray(image_scales, jnp.float32),
        start=jnp.float32(settings.cfg_interval[0]),
        end=jnp.float32(settings.cfg_interval[1]),
        renorm_min=jnp.float32(settings.cfg_renorm_min),
    )


def _padded_schedule(settings: ImageSettings) -> np.ndarray:
    """The schedule, filled up so that its length, and with it what is compiled, hardly ever changes."""
    schedule = denoising_schedule(settings.num_timesteps, settings.timestep_shift)
    return np.pad(schedule, (0, -len(schedule) % SCHEDULE_BUCKET))
