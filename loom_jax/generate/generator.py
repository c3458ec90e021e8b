"""From requests to pictures and texts: any number of requests, of any lengths and sizes, in shared compiled calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from loom_jax.document import (
    THINK_THEN_ANSWER,
    THINK_THEN_DRAW,
    EncodedSegment,
    ImageTokens,
    Role,
    Segment,
    Text,
    TextTokens,
)
from loom_jax.generate.reader import OnStep, Query, Reader, count_branches, text_room
from loom_jax.generate.requests import TASK_SETTINGS, ImageSettings, Request, Result, TextSettings

DEFAULT_SIDE = 1024
PARTS = 10
"""How often progress is told of."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A request with its segments encoded and its clean pictures turned into latent tokens.

    `latents` holds one float32 [cells, C] for every `clean` segment in order; `size` is (height, width) of the output.
    """

    request: Request
    segments: tuple[EncodedSegment, ...]
    latents: tuple[np.ndarray, ...]
    size: tuple[int, int]


def branch_segments(source: Source, thought: EncodedSegment | None) -> list[list[EncodedSegment]]:
    """Returns the documents of the three guidance branches: cond, no-text, no-image.

    As in the original: no-text leaves out the last text, but for one that a picture follows; no-image holds all texts
    and no picture; a thought is read by cond alone.
    """
    segments = list(source.segments)
    without_text = segments[:-1] if isinstance(segments[-1], TextTokens) else segments
    without_image: list[EncodedSegment] = [s for s in segments if isinstance(s, TextTokens)]
    return [segments + ([] if thought is None else [thought]), without_text, without_image]


class Generator(Reader):
    """Generates from requests. Make one with `loom_jax.api.load`, keep it: compiled calls are kept with it."""

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
        answers = self.answer([sources[i] for i in texts], text_settings)
        for i, (text, finished) in zip(texts, answers, strict=True):
            results[i] = Result(requests[i], text=text, finished=finished)
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
        latents = self.latent_tokens(encoded, request.seed)
        return Source(request, tuple(encoded), latents, self._output_size(request, encoded))

    def _output_size(self, request: Request, segments: Sequence[EncodedSegment]) -> tuple[int, int]:
        """The size asked for, else that of the last input picture, else a square as large as the original's."""
        stride = self.config.latent_stride
        size = request.size
        if size is None:
            grids = [s.grid for s in segments if isinstance(s, ImageTokens) and s.role == "clean"]
            side = min(DEFAULT_SIDE // stride, self.config.max_latent_size)
            rows, columns = grids[-1] if grids else (side, side)
            size = rows * stride, columns * stride
        return self.check_size(size)

    def answer(self, sources: Sequence[Source], settings: TextSettings) -> list[tuple[str, bool]]:
        """Returns the text that the model writes after each source, and whether it came to an end by itself."""
        if not sources:
            return []
        read = self.read([s.segments for s in sources], [s.latents for s in sources], room=text_room(settings))
        return self.write(read, [s.request.seed for s in sources], settings)

    def _draw(
        self, sources: Sequence[Source], settings: ImageSettings, text_settings: TextSettings, on_step: OnStep | None
    ) -> list[Result]:
        thinkers = [i for i, source in enumerate(sources) if source.request.think]
        written = self.answer([sources[i] for i in thinkers], text_settings)
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
        branches = count_branches(settings, any(source.latents for source in sources))
        documents = [branch_segments(s, t) for s, t in zip(sources, thoughts, strict=True)]
        latents = [(s.latents, s.latents, ()) for s in sources]
        read = self.read(
            [document[b] for b in range(branches) for document in documents],
            [images[b] for b in range(branches) for images in latents],
        )
        queries = [Query(s.size, s.request.seed, after_pictures=bool(s.latents)) for s in sources]
        made: list[np.ndarray] = []
        for done, tokens in self.denoise(read, queries, settings, branches, chunks=1 if on_step is None else PARTS):
            made = tokens
            if on_step is not None:
                on_step(done, settings.num_timesteps - 1)
        return made
