"""From requests to pictures and texts: any number of requests, of any lengths and sizes, in shared compiled calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from PIL import Image as PILImage

from loom_jax.core import InputError, LoomConfig
from loom_jax.data import Batch, Budget, Packable, Tables, pack, total_need
from loom_jax.document import (
    NO_TOKEN,
    THINK_THEN_ANSWER,
    THINK_THEN_DRAW,
    EncodedSegment,
    Encoder,
    ImageTokens,
    LayoutState,
    Role,
    Segment,
    Text,
    TextTokens,
    lay_out,
    pack_latent,
    unpack_latent,
)
from loom_jax.generate.buckets import bucket
from loom_jax.generate.context import Context
from loom_jax.generate.engine import Denoising, Engine
from loom_jax.generate.guidance import Guidance
from loom_jax.generate.noise import NoiseSource, SeededNoise
from loom_jax.generate.requests import TASK_SETTINGS, ImageSettings, Request, Result, TextSettings
from loom_jax.generate.text import TextControls
from loom_jax.nn import Purpose, denoising_schedule, make_key

OnStep = Callable[[int, int], None]
DEFAULT_SIDE = 1024
SCHEDULE_BUCKET = 64


@dataclasses.dataclass(frozen=True)
class Source:
    """A request with its segments encoded and its clean pictures turned into latent tokens.

    `latents` holds one float32 [cells, C] for every `clean` segment in order; `size` is (height, width) of the output.
    """

    request: Request
    segments: tuple[EncodedSegment, ...]
    latents: tuple[np.ndarray, ...]
    size: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Read:
    """Contexts of some rows, and where each row's next segment begins."""

    context: Context
    ends: tuple[LayoutState, ...]


def branch_segments(source: Source, thought: EncodedSegment | None) -> list[list[EncodedSegment]]:
    """Returns the documents of the three guidance branches: cond, no-text, no-image.

    As in the original: no-text leaves out the last text, but for one that a picture follows; no-image holds all texts
    and no picture; a thought is read by cond alone.
    """
    segments = list(source.segments)
    without_text = segments[:-1] if isinstance(segments[-1], TextTokens) else segments
    without_image: list[EncodedSegment] = [s for s in segments if isinstance(s, TextTokens)]
    return [segments + ([] if thought is None else [thought]), without_text, without_image]


class Generator:
    """Generates from requests. Make one with `loom_jax.api.load`, keep it: compiled calls are kept with it.

    Args:
      config: of the model.
      engine: weights and compiled calls.
      encoder: tokenizer and image transforms.
      noise: where draws come from.
    """

    def __init__(self, config: LoomConfig, engine: Engine, encoder: Encoder, noise: NoiseSource | None = None):
        self.config, self.engine, self.encoder = config, engine, encoder
        self.noise: NoiseSource = SeededNoise() if noise is None else noise
        self._tables = Tables.of(config)

    def generate(
        self,
        requests: Sequence[Request],
        image_settings: ImageSettings | None = None,
        text_settings: TextSettings | None = None,
        on_step: OnStep | None = None,
    ) -> list[Result]:
        """Answers all requests, in their order; each result is what the request would give alone.

        Args:
          requests: any mix of tasks, lengths and sizes.
          image_settings: for pictures; by default those of each request's task.
          text_settings: for answers and thoughts; greedy by default.
          on_step: hears of denoising progress as (steps done, steps in all).

        Raises:
          InputError: a request cannot be met; nothing was generated.
        """
        text_settings = text_settings or TextSettings()
        sources = [self.read_request(request) for request in requests]
        results: dict[int, Result] = {}
        texts = [i for i, request in enumerate(requests) if request.task == "understand"]
        for i, result in zip(texts, self._answer([sources[i] for i in texts], text_settings), strict=True):
            results[i] = result
        groups: dict[ImageSettings, list[int]] = {}
        for i, request in enumerate(requests):
            if request.task != "understand":
                groups.setdefault(image_settings or TASK_SETTINGS[request.task], []).append(i)
        for settings, members in groups.items():
            made = self._draw([sources[i] for i in members], settings, text_settings, on_step)
            results.update(zip(members, made, strict=True))
        return [results[i] for i in range(len(requests))]

    def read_request(self, request: Request) -> Source:
        """Encodes the texts and pictures of a request; pictures become latents with the noise of its seed."""
        understand = request.task == "understand"
        segments: list[Segment] = []
        if request.think:
            segments.append(Text(THINK_THEN_ANSWER if understand else THINK_THEN_DRAW))
        for item in request.items:
            if isinstance(item, str):
                segments.append(Text(item))
            else:
                roles: tuple[Role, ...] = ("vit",) if understand else ("clean", "vit")
                segments.extend(self.encoder.condition_pictures(item, roles))
        encoded = self.encoder.encode(segments)
        latents: list[np.ndarray] = []
        for segment in encoded:
            if isinstance(segment, ImageTokens) and segment.role == "clean":
                latents.append(self._latent_tokens(segment, request.seed, len(latents)))
        return Source(request, tuple(encoded), tuple(latents), self._output_size(request, encoded))

    def _output_size(self, request: Request, segments: Sequence[EncodedSegment]) -> tuple[int, int]:
        stride, limit = self.config.latent_stride, self.config.max_latent_size
        size = request.size
        if size is None:
            grids = [s.grid for s in segments if isinstance(s, ImageTokens) and s.role == "clean"]
            side = min(DEFAULT_SIDE // stride, limit)
            rows, columns = grids[-1] if grids else (side, side)
            size = rows * stride, columns * stride
        if any(side <= 0 or side % stride for side in size):
            raise InputError(
                f"size {size[0]} x {size[1]} (height x width): both must be positive multiples of {stride}"
            )
        if max(size) > limit * stride:
            raise InputError(
                f"size {size[0]} x {size[1]} (height x width): this model draws at most {limit * stride} pixels a side"
            )
        return size

    def _latent_tokens(self, segment: ImageTokens, seed: int, number: int) -> np.ndarray:
        """Returns the latent tokens [cells, C] of an input picture."""
        assert segment.pixels is not None
        patch, channels = self.config.latent_patch_size, self.config.vae.z_channels
        grid = segment.grid[0] * patch, segment.grid[1] * patch
        noise = self.noise.posterior(seed, number, grid, channels)
        return pack_latent(self.engine.encode_image(segment.pixels, noise), patch)

    def read(
        self, documents: Sequence[Sequence[EncodedSegment]], latents: Sequence[Sequence[np.ndarray]], room: int = 0
    ) -> Read:
        """Reads documents into contexts, one row each, with `room` slots to spare.

        Args:
          latents: for each document the latent tokens [cells, C] of its `clean` segments.
        """
        rows = [[Packable(d, lay_out(d, self.encoder.special))] for d in documents]
        needs = [total_need(row) for row in rows]
        budget = Budget(
            max(1, bucket(max(n.und for n in needs))),
            bucket(max(n.gen for n in needs)),
            bucket(max(n.vit for n in needs)),
        )
        batch = pack(rows, budget, self._tables)
        ends = tuple(row[0].layout.end for row in rows)
        capacity = bucket(max(end.order for end in ends) + room)
        position, split = (np.asarray([getattr(e, f) for e in ends], np.int32) for f in ("position", "split"))
        context = self.engine.start(batch.streams, self._fill(batch, latents), position, split, max(1, capacity))
        return Read(context, ends)

    def _fill(self, batch: Batch, latents: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
        """Lays latent tokens of every row's images where the gen stream wants them, [B, G, C]."""
        image, cell = batch.latents
        out = np.zeros((*image.shape, self.config.latent_dim), np.float32)
        for row, images in enumerate(latents):
            for number, tokens in enumerate(images):
                own = image[row] == number
                out[row, own] = tokens[cell[row, own]]
        return out

    def _answer(self, sources: Sequence[Source], settings: TextSettings) -> list[Result]:
        return [
            Result(source.request, text=text, finished=finished)
            for source, (text, finished) in zip(sources, self.write(sources, settings), strict=True)
        ]

    def write(self, sources: Sequence[Source], settings: TextSettings) -> list[tuple[str, bool]]:
        """Returns the text that the model writes after each source, and whether it came to an end by itself."""
        if not sources:
            return []
        buffer = bucket(settings.max_new_tokens)
        read = self.read([s.segments for s in sources], [s.latents for s in sources], room=buffer + 1)
        keys = jnp.stack([make_key(s.request.seed, Purpose.TEXT_SAMPLING) for s in sources])
        controls = TextControls(jnp.float32(settings.temperature), jnp.float32(settings.top_p))
        decoded = self.engine.decode_text(read.context, keys, controls, settings.max_new_tokens, buffer)
        tokens, finished = np.asarray(decoded.tokens), np.asarray(decoded.finished)
        return [
            (self.encoder.tokenizer.decode(row[row != NO_TOKEN].tolist()), bool(end))
            for row, end in zip(tokens, finished, strict=True)
        ]

    def _draw(
        self, sources: Sequence[Source], settings: ImageSettings, text_settings: TextSettings, on_step: OnStep | None
    ) -> list[Result]:
        thinkers = [i for i, source in enumerate(sources) if source.request.think]
        written = self.write([sources[i] for i in thinkers], text_settings)
        thoughts = dict(zip(thinkers, written, strict=True))
        encoded = [
            TextTokens(self.encoder.tokenizer.encode(thoughts[i][0])) if i in thoughts else None
            for i in range(len(sources))
        ]
        latents = self.draw(sources, encoded, settings, on_step)
        results = []
        for i, (source, tokens) in enumerate(zip(sources, latents, strict=True)):
            thought, finished = thoughts.get(i, (None, True))
            image = self.picture(tokens, source.size)
            results.append(Result(source.request, image, tokens, thought=thought, finished=finished))
        return results

    def draw(
        self,
        sources: Sequence[Source],
        thoughts: Sequence[EncodedSegment | None],
        settings: ImageSettings,
        on_step: OnStep | None = None,
    ) -> list[np.ndarray]:
        """Denoises one picture for each source; returns their latent tokens, float32 [cells, C]."""
        stride = self.config.latent_stride
        grids = [(s.size[0] // stride, s.size[1] // stride) for s in sources]
        branches = self._branches(sources, settings)
        read = self._read_branches(sources, thoughts, branches)
        queries = [ImageTokens("noisy", grid) for grid in grids] * branches
        rows = [
            [Packable([q], lay_out([q], self.encoder.special, start))]
            for q, start in zip(queries, read.ends, strict=True)
        ]
        cells = [rows_ * columns for rows_, columns in grids]
        batch = pack(rows, Budget(2, bucket(max(cells)), 0), self._tables)
        noise = np.zeros((len(sources), batch.latents.cell.shape[1], self.config.latent_dim), np.float32)
        for row, (source, count) in enumerate(zip(sources, cells, strict=True)):
            noise[row, :count] = self.noise.initial(source.request.seed, count, self.config.latent_dim)
        schedule = jnp.asarray(_padded_schedule(settings))
        work = Denoising(read.context, batch.streams, self._guidance(sources, settings), schedule)
        final = self.engine.denoise(
            work, noise, settings.num_timesteps - 1, branches, settings.cfg_renorm_type, on_step
        )
        return [final[row, :count] for row, count in enumerate(cells)]

    def _branches(self, sources: Sequence[Source], settings: ImageSettings) -> int:
        """How many guidance branches a batch needs: without input pictures there is none to leave out."""
        if settings.cfg_text_scale <= 1:
            return 1
        with_images = settings.cfg_img_scale > 1 and any(source.latents for source in sources)
        return 3 if with_images else 2

    def _read_branches(
        self, sources: Sequence[Source], thoughts: Sequence[EncodedSegment | None], branches: int
    ) -> Read:
        """Reads the documents of all branches: branch by branch, in each the sources in order."""
        documents = [branch_segments(s, t) for s, t in zip(sources, thoughts, strict=True)]
        latents = [(s.latents, s.latents, ()) for s in sources]
        return self.read(
            [document[b] for b in range(branches) for document in documents],
            [images[b] for b in range(branches) for images in latents],
        )

    def _guidance(self, sources: Sequence[Source], settings: ImageSettings) -> Guidance:
        image_scale = [settings.cfg_img_scale if source.latents else 1.0 for source in sources]
        return make_guidance(settings, image_scale)

    def picture(self, tokens: np.ndarray, size: tuple[int, int]) -> PILImage.Image:
        """Returns the picture of (height, width) `size` that latent tokens [cells, C] hold."""
        stride = self.config.latent_stride
        grid = size[0] // stride, size[1] // stride
        latents = unpack_latent(tokens, grid, self.config.latent_patch_size)
        return PILImage.fromarray(self.engine.decode_image(latents))


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
