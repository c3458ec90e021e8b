"""The interleaved driver: an instruction becomes a plan and then its frames, turn by turn, for many requests at once.

Each turn forks the contexts of the shared prologue, reads the frames that the history policy chose and the heading of
the turn, and denoises the frame: its cost depends on the size of the history, not on the number of turns.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from PIL import Image as PILImage

from loom_jax.core import InputError
from loom_jax.data import Budget
from loom_jax.document import (
    ENTITY_TOKENS,
    PLANNED,
    Branch,
    Condition,
    EncodedSegment,
    Encoder,
    HistoryPolicy,
    InterleavedTask,
    Method,
    Segment,
    Shown,
    TextTokens,
    Turn,
    assign_entities,
    branch,
    count_time_tokens,
    format_plan,
    heading,
    history,
    parse_steps,
    plan_prompt,
    prologue,
    time_token,
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
      method: parts of Loom's method that it is made with: those that the model was trained with. Without planning
        `num_steps` says how many frames there are.
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
    method: Method = Method()

    @property
    def policy(self) -> HistoryPolicy:
        """The history policy, with its default filled in."""
        return self.history or HistoryPolicy(*(("none", 0) if self.task == "decompose" else ("uniform", 2)))


@dataclasses.dataclass(frozen=True)
class PlanWritten:
    """The steps of a request are known, or changed: written by the model (`text` as it wrote it) or given."""

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
    """What an earlier run made of a request.

    Attributes:
      steps: none if they were not written yet.
      frames: the finished ones, in order.
      seeds: turn -> the seed from there on, in place of the request's.
      failed: it failed, and is not tried again.
    """

    steps: tuple[str, ...] = ()
    frames: tuple[PILImage.Image, ...] = ()
    seeds: Mapping[int, int] = dataclasses.field(default_factory=dict)
    failed: bool = False


@dataclasses.dataclass
class _Story:
    """A request on its way. `opening`: condition pictures and prompt; `encoded`: the frames of the last history."""

    number: int
    request: InterleavedRequest
    size: tuple[int, int]
    conditions: list[Condition]
    opening: list[EncodedSegment]
    steps: list[str | None]
    earlier: Done
    turns: list[Turn] = dataclasses.field(default_factory=list)
    encoded: dict[int, tuple[list[EncodedSegment], tuple[np.ndarray, ...]]] = dataclasses.field(default_factory=dict)
    failed: bool = False

    @property
    def planned(self) -> bool:
        return self.request.task in PLANNED

    @property
    def has_plan(self) -> bool:
        return self.planned and self.request.method.planning

    @property
    def asks_for_plan(self) -> bool:
        return self.has_plan and self.request.plan is None

    def has(self, turn: int) -> bool:
        """Whether the request has such a turn, made or not."""
        return not self.failed and turn <= len(self.steps)

    def live(self, turn: int) -> bool:
        """Whether the request makes a frame in this turn."""
        return self.has(turn) and len(self.turns) < turn

    def heading(self, turn: int) -> Turn:
        return Turn(turn if self.planned else None, self.steps[turn - 1])

    def seed(self, turn: int) -> int:
        """The seed of a turn's frame."""
        from_turn = max((first for first in self.earlier.seeds if first <= turn), default=None)
        return self.request.seed if from_turn is None else self.earlier.seeds[from_turn]

    def texts(self) -> tuple[str, ...]:
        return tuple(step or "" for step in self.steps)

    def prologue(self) -> list[Segment]:
        """What stands before the first frame; with the plan, if it is known."""
        request = self.request
        if not self.planned:
            return prologue(self.conditions, request.instruction, method=request.method)
        prompt = plan_prompt(request.task, request.instruction, request.num_steps)
        plan = format_plan(self.texts()) if self.steps else None
        return prologue(self.conditions, prompt, plan, method=request.method)

    def choose(self, turn: int) -> list[int]:
        """The frames before `turn` that it sees, as indices; drawn from the request's seed and the turn alone."""
        return self.request.policy.choose(turn - 1, np.random.default_rng([self.request.seed, turn]))


class Interleaver:
    """Runs requests through plan and turns; see `interleave`.

    What is computed in a turn, down to the shapes, depends on the requests alone: a run that goes on after another one
    takes every request of the batch along in the turns that it makes, also those that have their frame already.
    """

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
            earlier = (done or {}).get(number, Done())
            try:
                stories.append(self._begin(number, request, earlier))
            except InputError as error:
                if not earlier.failed:
                    yield RequestFailed(number, str(error))
        yield from self._write_plans(stories)
        stories = [s for s in stories if not s.failed]
        turn = 1
        while any(story.has(turn) for story in stories):
            yield from self._revise(stories, turn)
            if any(story.live(turn) for story in stories):
                yield from self._make_turn(stories, turn)
            turn += 1

    def _begin(self, number: int, request: InterleavedRequest, earlier: Done) -> _Story:
        """Checks a request, and takes up what was made of it."""
        conditions = self._conditions(request)
        size = self.reader.check_size(request.size or self._default_size(request))
        for seed in (request.seed, *earlier.seeds.values()):
            if not 0 <= seed < 2**32:
                raise InputError(f"seed={seed}: must be at least 0 and below 2^32 = {2**32}")
        if request.num_steps is not None and not 1 <= request.num_steps <= self.num_turns:
            raise InputError(f"num_steps={request.num_steps}: must be at least 1, and {self._at_most()}")
        story = _Story(number, request, size, conditions, [], [], earlier)
        story.opening = self.reader.encoder.encode(story.prologue())
        if request.task not in PLANNED:
            story.steps = [None]
            if request.plan is not None or request.num_steps is not None:
                raise InputError(f"task {request.task!r} makes one picture: it takes neither a plan nor num_steps")
        elif not request.method.planning:
            if request.plan is not None or request.num_steps is None:
                raise InputError("without planning a request takes no plan, and num_steps says how many frames it has")
            story.steps = [None] * request.num_steps
        elif request.plan is not None or earlier.steps:
            story.steps = list(earlier.steps or request.plan or ())
            self._check_steps(story.texts())
            if request.plan is not None and request.num_steps not in (None, len(request.plan)):
                raise InputError(f"num_steps={request.num_steps}, but the plan has {len(request.plan)} steps")
        for turn, image in enumerate(earlier.frames[: len(story.steps)], 1):
            story.turns.append(dataclasses.replace(story.heading(turn), picture=Shown(image)))
        story.failed = earlier.failed
        return story

    def _conditions(self, request: InterleavedRequest) -> list[Condition]:
        """The condition pictures of a request with their entity tokens."""
        if not request.instruction.strip():
            raise InputError("the instruction is empty: say what to make")
        if request.task != "tutorial" and not request.images:
            raise InputError(f"task {request.task!r} needs at least one picture")
        known, count = self.reader.encoder.tokenizer.has_token, len(request.images)
        tokens: Sequence[str | None] = [None] * count
        if request.entities is not None:
            if len(request.entities) != count:
                raise InputError(
                    f"{len(request.entities)} entity tokens for {count} pictures: give one for each, or none"
                )
            tokens = request.entities
            for token in tokens:
                if token is not None and not known(token):
                    raise InputError(f"unknown entity token {token!r}: expected one of {', '.join(ENTITY_TOKENS)}")
        elif request.task in ("compose", "style"):
            tokens = assign_entities(request.instruction, count, known)
        return [Condition(Shown(to_rgb(image)), token) for image, token in zip(request.images, tokens, strict=True)]

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
            raise InputError(f"the plan has {len(steps)} steps, more than there are time tokens: {self._at_most()}")
        for step in steps:
            self.reader.encoder.tokenizer.encode(step)

    def _at_most(self) -> str:
        return f"at most {self.num_turns}, since the tokenizer has {time_token(1)} to {time_token(self.num_turns)}"

    def _write_plans(self, stories: Sequence[_Story]) -> Iterator[Event]:
        """Tells of the plans that were given, and lets the model write the others in one batch."""
        for story in stories:
            if story.request.plan is not None and not story.earlier.steps and not story.failed:
                yield PlanWritten(story.number, story.texts(), None)
        writing = [story for story in stories if story.asks_for_plan]
        if all(story.steps or story.failed for story in writing):
            return
        documents = [story.opening for story in writing]
        latents = [self.reader.latent_tokens(story.opening, story.request.seed) for story in writing]
        read = self.reader.read(documents, latents, room=text_room(self.text_settings))
        written = self.reader.write(read, [story.request.seed for story in writing], self.text_settings)
        for story, (text, _) in zip(writing, written, strict=True):
            if story.steps or story.failed:
                continue
            story.steps = list(parse_steps(text))
            try:
                self._check_steps(story.texts())
            except InputError as error:
                story.failed = True
                yield RequestFailed(story.number, f"{error}; the model wrote {text[:120]!r}")
            else:
                yield PlanWritten(story.number, story.texts(), text)

    def _revise(self, stories: Sequence[_Story], turn: int) -> Iterator[Event]:
        """Lets the caller change the steps that are still to come."""
        if self.revise is None:
            return
        for story in stories:
            if not story.live(turn) or not story.has_plan:
                continue
            steps = self.revise(story.number, turn, story.texts())
            revised = story.texts() if steps is None else (*story.texts()[: turn - 1], *steps[turn - 1 :])
            if revised == story.texts():
                continue
            self._prologues = None
            try:
                self._check_steps(revised)
            except InputError as error:
                story.failed = True
                yield RequestFailed(story.number, f"{error}; it was revised before turn {turn}")
            else:
                story.steps = list(revised)
                yield PlanWritten(story.number, revised, None)

    def _make_turn(self, stories: Sequence[_Story], turn: int) -> Iterator[Event]:
        started, settings = time.perf_counter(), self.image_settings
        branches = count_branches(settings, pictures=True)
        chosen = [story.choose(turn) if story.has(turn) else [] for story in stories]
        seen = [tuple(index + 1 for index in indices) for indices in chosen]
        queries = [self._query(story, indices, turn) for story, indices in zip(stories, chosen, strict=True)]
        for story, numbers in zip(stories, seen, strict=True):
            if story.live(turn):
                yield TurnStarted(story.number, turn, story.steps[turn - 1], numbers)
        documents = [self._turn_document(s, indices, turn) for s, indices in zip(stories, chosen, strict=True)]
        contexts = self._fork(stories, documents, branches, turn)
        steps = settings.num_timesteps - 1
        pictures: list[PILImage.Image | None] = []
        largest = max(math.prod(story.size) for story in stories) // self.reader.config.latent_stride**2
        for done, latents in self.reader.denoise(contexts, queries, settings, branches, self._parts, largest):
            pictures = [
                self.reader.picture(tokens, story.size) if story.live(turn) else None
                for story, tokens in zip(stories, latents, strict=True)
            ]
            for story, picture in zip(stories, pictures, strict=True):
                if picture is not None and done < steps:
                    yield Preview(story.number, turn, done, steps, picture)
        seconds = time.perf_counter() - started
        for story, numbers, picture in zip(stories, seen, pictures, strict=True):
            if picture is not None:
                story.turns.append(dataclasses.replace(story.heading(turn), picture=Shown(picture)))
                yield FrameMade(story.number, turn, story.steps[turn - 1], numbers, story.seed(turn), picture, seconds)

    def _turn_document(
        self, story: _Story, chosen: Sequence[int], turn: int
    ) -> tuple[list[EncodedSegment], tuple[np.ndarray, ...]]:
        """The chosen frames and the heading of a turn, with the latents of the frames; nothing if there is no turn."""
        if not story.has(turn):
            return [], ()
        encode = self.reader.encoder.encode
        kept, story.encoded = story.encoded, {}  # of the frames of the last turn only: memory stays flat
        for index in chosen:
            if index not in kept:
                document = encode(history([story.turns[index]], story.request.method))
                # Frames are numbered after the condition pictures: each has its own posterior noise.
                first = len(story.request.images) + index
                kept[index] = document, self.reader.latent_tokens(document, story.request.seed, first)
            story.encoded[index] = kept[index]
        segments = [segment for index in chosen for segment in kept[index][0]]
        latents = tuple(tokens for index in chosen for tokens in kept[index][1])
        return segments + encode(heading(story.heading(turn), story.request.method)), latents

    def _fork(
        self,
        stories: Sequence[_Story],
        documents: Sequence[tuple[list[EncodedSegment], tuple[np.ndarray, ...]]],
        branches: int,
        turn: int,
    ) -> Read:
        """Extends the prologues' contexts, which are read once, and again only where they lack room."""
        needs = [self._need(story, turn) for story in stories]
        least = Budget(*(max(getattr(need, name) for need in needs) for name in ("und", "gen", "vit")))
        room = max(need.und + need.gen for need in needs)
        if self._prologues is None or self._prologues.room < room:
            self._prologues = None  # frees its memory before the larger ones are made
            self._prologues = self._read_prologues(stories, branches, room)
        names = BRANCHES[:branches]
        return self.reader.extend(
            self._prologues,
            [branch(document, name) for name in names for document, _ in documents],
            [() if name == "no_image" else latents for name in names for _, latents in documents],
            least,
        )

    def _need(self, story: _Story, turn: int) -> Budget:
        """Returns what the largest documents of a request take, among its first 4, 8, 16, ... turns with this one.

        The same whether earlier turns were made in this run or not, and whether the request has ended: so a run that
        goes on has contexts and calls of the same shapes, the end of a request changes none, and histories that grow
        with the turns are compiled for log2 of their number.
        """
        encoder, (height, width) = self.reader.encoder, story.size
        clean, vit = (
            math.prod(side // cell for side in transform.size(width, height))
            for transform, cell in (
                (encoder.vae_transform, encoder.latent_stride),
                (encoder.vit_transform, encoder.vit_patch),
            )
        )
        turns = range(1, min(max(4, 1 << (turn - 1).bit_length()), len(story.steps)) + 1)
        texts = [
            sum(len(text.ids) + 2 for text in encoder.encode(heading) if isinstance(text, TextTokens))
            for heading in (heading(story.heading(t), story.request.method) for t in turns)
        ]
        chosen = [story.choose(t) for t in turns]
        # The markers of a picture are und tokens, like what the ViT sees of it.
        und = [texts[t] + sum(texts[i] + vit + 4 for i in seen) for t, seen in enumerate(chosen)]
        frames = max(map(len, chosen), default=0)
        return Budget(max(und, default=0), frames * clean, frames * vit)

    def _read_prologues(self, stories: Sequence[_Story], branches: int, room: int) -> Read:
        documents, latents = [], []
        for story in stories:
            plan = self.reader.encoder.encode(story.prologue()[len(story.opening) :])
            documents.append([*story.opening, *plan])
            latents.append(self.reader.latent_tokens(story.opening, story.request.seed))
        names = BRANCHES[:branches]
        return self.reader.read(
            [branch(document, name) for name in names for document in documents],
            [() if name == "no_image" else images for name in names for images in latents],
            room=room,
        )

    def _query(self, story: _Story, chosen: Sequence[int], turn: int) -> Query | None:
        if not story.has(turn):
            return None
        return Query(story.size, story.seed(turn), turn, after_pictures=bool(chosen or story.request.images))


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
