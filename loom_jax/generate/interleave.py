"""The interleaved driver: an instruction becomes a plan and then its frames, turn by turn, for many requests at once.

Each turn forks the contexts of the shared prologue, reads the frames that the history policy chose and the heading of
the turn, and denoises the frame: its cost depends on the size of the history, not on the number of turns.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from PIL import Image as PILImage

from loom_jax.core import InputError
from loom_jax.document import (
    PLANNED,
    Branch,
    Condition,
    EncodedSegment,
    Encoder,
    HistoryPolicy,
    ImageTokens,
    InterleavedTask,
    Segment,
    Shown,
    Turn,
    assign_entities,
    branch,
    count_time_tokens,
    find_entities,
    format_plan,
    heading,
    history,
    parse_steps,
    plan_prompt,
    prologue,
    to_rgb,
)
from loom_jax.generate.reader import Query, Read, Reader, count_branches, text_room
from loom_jax.generate.requests import ImageSettings, TextSettings

LOOM_SETTINGS = ImageSettings(cfg_text_scale=4.0, cfg_img_scale=2.0, cfg_interval=(0.0, 1.0), cfg_renorm_type="global")
"""Guidance of the Loom tasks (spec of Loom, the method, 8)."""

BRANCHES: tuple[Branch, ...] = ("cond", "no_text", "no_image")
DEFAULT_SIDE = 1024


@dataclasses.dataclass(frozen=True)
class InterleavedRequest:
    """An instruction, pictures in roles, and how the sequence is to be made.

    Attributes:
      instruction: what the tutorial, picture or decomposition is to show.
      task: `tutorial` (from text, or to a picture that is given), `compose`, `style`, `decompose`.
      images: condition pictures.
      entities: entity token of each condition picture; by default as the instruction mentions them.
      plan: texts of the steps; by default the model writes them. Compositions have none.
      num_steps: how many steps the model is asked for.
      size: (height, width) of every frame; by default that of the last condition picture, or 1024 x 1024.
      seed: of all randomness.
      history: which earlier frames a frame sees; by default uniform(2), for decompositions none.
    """

    instruction: str
    task: InterleavedTask = "tutorial"
    images: tuple[PILImage.Image, ...] = ()
    entities: tuple[str | None, ...] | None = None
    plan: tuple[str, ...] | None = None
    num_steps: int | None = None
    size: tuple[int, int] | None = None
    seed: int = 0
    history: HistoryPolicy | None = None

    @property
    def policy(self) -> HistoryPolicy:
        """The history policy, with its default filled in."""
        return self.history or HistoryPolicy(*(("none", 0) if self.task == "decompose" else ("uniform", 2)))


@dataclasses.dataclass(frozen=True)
class PlanWritten:
    """The steps of a request are known: written by the model (`text` as it wrote it) or given."""

    request: int
    steps: tuple[str, ...]
    text: str | None


@dataclasses.dataclass(frozen=True)
class TurnStarted:
    """A frame is about to be made; `history` holds the numbers of the frames that it sees, from 1."""

    request: int
    turn: int
    step: str | None
    history: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Preview:
    """How a frame looks after `done` of `of` steps of denoising."""

    request: int
    turn: int
    done: int
    of: int
    image: PILImage.Image


@dataclasses.dataclass(frozen=True)
class FrameMade:
    """A frame is finished. `seconds` is the time of the turn, shared by the requests of the batch."""

    request: int
    turn: int
    step: str | None
    history: tuple[int, ...]
    seed: int
    image: PILImage.Image
    seconds: float


@dataclasses.dataclass(frozen=True)
class RequestFailed:
    """A request cannot be met; the others go on."""

    request: int
    reason: str


Event = PlanWritten | TurnStarted | Preview | FrameMade | RequestFailed
Revise = Callable[[int, int, tuple[str, ...]], Sequence[str] | None]
"""(request, turn about to be made, steps) -> other steps, or None to leave them."""


@dataclasses.dataclass(frozen=True)
class Done:
    """What an earlier run made of a request: its steps, its frames in order and their seeds."""

    steps: tuple[str, ...]
    frames: tuple[PILImage.Image, ...]
    seeds: tuple[int, ...]


@dataclasses.dataclass
class _Story:
    """A request on its way."""

    number: int
    request: InterleavedRequest
    size: tuple[int, int]
    steps: list[str | None]
    turns: list[Turn] = dataclasses.field(default_factory=list)
    seeds: list[int] = dataclasses.field(default_factory=list)
    encoded: dict[int, tuple[list[EncodedSegment], tuple[np.ndarray, ...]]] = dataclasses.field(default_factory=dict)
    failed: bool = False

    @property
    def planned(self) -> bool:
        return self.request.task in PLANNED

    def live(self, turn: int) -> bool:
        """Whether the request makes a frame in this turn."""
        return not self.failed and len(self.turns) < turn <= len(self.steps)

    def heading(self, turn: int) -> Turn:
        return Turn(turn if self.planned else None, self.steps[turn - 1])

    def conditions(self) -> list[Condition]:
        request = self.request
        tokens = request.entities
        if tokens is None:
            many = request.task in ("compose", "style")
            tokens = tuple(assign_entities(request.instruction, len(request.images))) if many else ()
        padded = [*tokens, *[None] * len(request.images)][: len(request.images)]
        return [Condition(Shown(to_rgb(image)), token) for image, token in zip(request.images, padded, strict=True)]

    def prompt(self) -> str:
        request = self.request
        if not self.planned:
            return request.instruction
        return plan_prompt(request.task, request.instruction, request.num_steps)

    def prologue(self) -> list[Segment]:
        """What stands before the first frame, with the plan."""
        plan = format_plan([step or "" for step in self.steps]) if self.planned else None
        return prologue(self.conditions(), self.prompt(), plan)


class Interleaver:
    """Runs requests through plan and turns; see `interleave`."""

    def __init__(
        self,
        reader: Reader,
        image_settings: ImageSettings = LOOM_SETTINGS,
        text_settings: TextSettings | None = None,
        revise: Revise | None = None,
        previews: int = 0,
    ):
        self.reader, self.image_settings = reader, image_settings
        self.text_settings = text_settings or TextSettings()
        self.revise, self._parts = revise, previews + 1
        self.num_turns = count_time_tokens(reader.encoder.tokenizer)
        self._prologues: Read | None = None

    def run(self, requests: Sequence[InterleavedRequest], done: Mapping[int, Done] | None = None) -> Iterator[Event]:
        """Yields events until every request is finished or has failed."""
        self._prologues = None
        stories: list[_Story] = []
        for number, request in enumerate(requests):
            try:
                stories.append(self._begin(number, request, (done or {}).get(number)))
            except InputError as error:
                yield RequestFailed(number, str(error))
        yield from self._write_plans([s for s in stories if s.planned and not s.steps])
        for story in stories:
            if story.planned and not story.failed:
                written = None if story.request.plan or (done or {}).get(story.number) else self._texts[story.number]
                yield PlanWritten(story.number, tuple(step or "" for step in story.steps), written)
        stories = [s for s in stories if not s.failed]
        turn = 1
        while any(turn <= len(story.steps) for story in stories):
            if any(story.live(turn) for story in stories):
                yield from self._make_turn(stories, turn)
            turn += 1

    def _begin(self, number: int, request: InterleavedRequest, done: Done | None) -> _Story:
        """Checks a request."""
        if not request.instruction.strip():
            raise InputError("the instruction is empty: say what to make")
        if request.task != "tutorial" and not request.images:
            raise InputError(f"task {request.task!r} needs at least one picture")
        if request.task in ("compose", "style"):
            find_entities(request.instruction)
        for token in request.entities or ():
            if token is not None and not self.reader.encoder.tokenizer.has_token(token):
                raise InputError(f"unknown entity token {token!r}: the tokenizer of this model does not have it")
        size = self.reader.check_size(request.size or self._default_size(request))
        steps: list[str | None] = [None] if request.task not in PLANNED else list(request.plan or ())
        story = _Story(number, request, size, steps)
        if done is not None:
            story.steps = list(done.steps) if story.planned else [None]
            for turn, image in enumerate(done.frames, 1):
                story.turns.append(dataclasses.replace(story.heading(turn), picture=Shown(image)))
            story.seeds = list(done.seeds)
        if story.planned and (request.plan is not None or done is not None):
            self._check_steps([step or "" for step in story.steps])
        return story

    def _default_size(self, request: InterleavedRequest) -> tuple[int, int]:
        encoder: Encoder = self.reader.encoder
        if request.images:
            width, height = encoder.vae_transform.size(*request.images[-1].size)
            return height, width
        side = min(DEFAULT_SIDE, self.reader.config.max_latent_size * self.reader.config.latent_stride)
        return side, side

    def _check_steps(self, steps: Sequence[str]) -> None:
        if not steps or not all(step.strip() for step in steps):
            raise InputError("the plan has no steps, or an empty one: expected Step1: ..., Step2: ...")
        if len(steps) > self.num_turns:
            raise InputError(
                f"the plan has {len(steps)} steps, this model has time tokens for {self.num_turns}: plan fewer steps"
            )

    def _write_plans(self, stories: Sequence[_Story]) -> Iterator[Event]:
        """Lets the model write the plans of all stories that have none, in one batch."""
        self._texts: dict[int, str] = {}
        if not stories:
            return
        documents, latents = [], []
        for story in stories:
            document = self.reader.encoder.encode(prologue(story.conditions(), story.prompt()))
            documents.append(document)
            latents.append(self.reader.latent_tokens(document, story.request.seed))
        read = self.reader.read(documents, latents, room=text_room(self.text_settings))
        written = self.reader.write(read, [s.request.seed for s in stories], self.text_settings)
        for story, (text, _) in zip(stories, written, strict=True):
            self._texts[story.number] = text
            story.steps = list(parse_steps(text))
            try:
                self._check_steps([step or "" for step in story.steps])
            except InputError as error:
                story.failed = True
                yield RequestFailed(story.number, f"{error}; the model wrote {text[:120]!r}")

    def _make_turn(self, stories: Sequence[_Story], turn: int) -> Iterator[Event]:
        started = time.perf_counter()
        self._revise(stories, turn)
        settings = self.image_settings
        branches = count_branches(settings, pictures=True)
        chosen = {s.number: self._choose(s, turn) for s in stories}
        documents = [self._turn_document(s, chosen[s.number], turn) for s in stories]
        contexts = self._fork(stories, documents, branches)
        queries = [self._query(s, chosen[s.number], turn) for s in stories]
        shown: dict[int, Sequence[int]] = {n: tuple(k + 1 for k in c) for n, c in chosen.items()}
        for story in stories:
            if story.live(turn):
                yield TurnStarted(story.number, turn, story.steps[turn - 1], tuple(shown[story.number]))
        steps = settings.num_timesteps - 1
        pictures: list[PILImage.Image | None] = []
        for done, latents in self.reader.denoise(contexts, queries, settings, branches, chunks=self._parts):
            pictures = [
                self.reader.picture(tokens, story.size) if story.live(turn) else None
                for story, tokens in zip(stories, latents, strict=True)
            ]
            for story, picture in zip(stories, pictures, strict=True):
                if picture is not None and done < steps:
                    yield Preview(story.number, turn, done, steps, picture)
        seconds = time.perf_counter() - started
        for story, query, picture in zip(stories, queries, pictures, strict=True):
            if picture is None or query is None:
                continue
            story.turns.append(dataclasses.replace(story.heading(turn), picture=Shown(picture)))
            step, seen = story.steps[turn - 1], tuple(shown[story.number])
            yield FrameMade(story.number, turn, step, seen, query.seed, picture, seconds)

    def _revise(self, stories: Sequence[_Story], turn: int) -> None:
        """Lets the caller change the steps that are still to come."""
        if self.revise is None:
            return
        for story in stories:
            if not story.live(turn) or not story.planned:
                continue
            steps = self.revise(story.number, turn, tuple(step or "" for step in story.steps))
            if steps is not None and list(steps) != story.steps:
                self._check_steps(steps)
                story.steps = list(steps)
                self._prologues = None

    def _choose(self, story: _Story, turn: int) -> list[int]:
        """The frames before `turn` that it sees, as indices; drawn from the seed and the turn alone."""
        if not story.live(turn):
            return []
        rng = np.random.default_rng([story.request.seed, turn])
        return story.request.policy.choose(turn - 1, rng)

    def _turn_document(
        self, story: _Story, chosen: Sequence[int], turn: int
    ) -> tuple[list[EncodedSegment], tuple[np.ndarray, ...]]:
        """The chosen frames and the heading of a turn, with the latents of the frames; nothing if there is no turn."""
        if not story.live(turn):
            return [], ()
        segments: list[EncodedSegment] = []
        latents: tuple[np.ndarray, ...] = ()
        for index in chosen:
            if index not in story.encoded:
                document = self.reader.encoder.encode(history([story.turns[index]]))
                # Frames are numbered after the condition pictures: each has its own posterior noise.
                first = len(story.request.images) + index
                story.encoded[index] = document, self.reader.latent_tokens(document, story.request.seed, first)
            segments += story.encoded[index][0]
            latents += story.encoded[index][1]
        return segments + self.reader.encoder.encode(heading(story.heading(turn))), latents

    def _fork(
        self,
        stories: Sequence[_Story],
        documents: Sequence[tuple[list[EncodedSegment], tuple[np.ndarray, ...]]],
        branches: int,
    ) -> Read:
        """Extends the prologues' contexts, which are read once, and again only where they lack room."""
        longest = max(_length(document) for document, _ in documents)
        if self._prologues is None or self._prologues.room < longest:
            self._prologues = self._read_prologues(stories, branches, longest)
        names = BRANCHES[:branches]
        return self.reader.extend(
            self._prologues,
            [branch(document, name) for name in names for document, _ in documents],
            [() if name == "no_image" else latents for name in names for _, latents in documents],
        )

    def _read_prologues(self, stories: Sequence[_Story], branches: int, room: int) -> Read:
        documents, latents = [], []
        for story in stories:
            document = self.reader.encoder.encode(story.prologue())
            documents.append(document)
            latents.append(self.reader.latent_tokens(document, story.request.seed))
        names = BRANCHES[:branches]
        return self.reader.read(
            [branch(document, name) for name in names for document in documents],
            [() if name == "no_image" else images for name in names for images in latents],
            room=room,
        )

    def _query(self, story: _Story, chosen: Sequence[int], turn: int) -> Query | None:
        if not story.live(turn):
            return None
        seed = story.seeds[turn - 1] if turn <= len(story.seeds) else story.request.seed
        return Query(story.size, seed, turn, after_pictures=bool(chosen or story.request.images))


def _length(document: Sequence[EncodedSegment]) -> int:
    """Tokens of a document at most."""
    return sum(2 + (s.grid[0] * s.grid[1] if isinstance(s, ImageTokens) else len(s.ids)) for s in document)


def interleave(
    reader: Reader,
    requests: Sequence[InterleavedRequest],
    image_settings: ImageSettings = LOOM_SETTINGS,
    text_settings: TextSettings | None = None,
    revise: Revise | None = None,
    previews: int = 0,
    done: Mapping[int, Done] | None = None,
) -> Iterator[Event]:
    """Makes the sequences of all requests at once, and yields what happens as it happens.

    Args:
      reader: a Generator from `loom_jax.api.load`; its tokenizer must have Loom's tokens.
      requests: any mix of tasks, sizes and numbers of turns.
      image_settings, text_settings: how frames are denoised and plans are written.
      revise: is asked before every turn whether the plan is to change.
      previews: how often a frame is shown while it is denoised.
      done: what an earlier run made, by request: the sequence goes on after it, as if it had never stopped.

    Yields:
      PlanWritten, then for each turn TurnStarted, Preview, FrameMade; RequestFailed where a request cannot be met.
    """
    return Interleaver(reader, image_settings, text_settings, revise, previews).run(requests, done)
