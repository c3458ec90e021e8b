"""Judges of interleaved sequences whose truth nobody knows: scales of 1 to 5, as the paper of Loom uses them.

`temporal`: do the frames go on from each other? `semantic`: does each show its step, and are they what was asked?
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image as PILImage

from loom_jax.core import InputError, LoomError
from loom_jax.data.world import PLACES, Paint, Scene, Step, apply, read_pictures, touched
from loom_jax.document import open_image, to_rgb
from loom_jax.evaluate.metrics import read_plan, shows
from loom_jax.generate import SavedWork

LOWEST, HIGHEST = 1, 5
HUNG_UP = (BrokenPipeError, ConnectionAbortedError, ConnectionResetError)
"""Somebody was there while the question was sent; whatever else urllib wraps then says that nobody can be."""
REFUSALS = (401, 403, 404)
"""Statuses of an endpoint that wants another key or has no such model: it refuses every sequence alike."""
RUBRIC = """You judge a sequence of pictures that was made for an instruction, one picture for each step.
Give two whole numbers from 1 (bad) to 5 (excellent).
temporal: the pictures go on from each other; what a step does not change stays as it was, and the order makes sense.
semantic: each picture shows its step, and together they do what the instruction asks.
Answer with JSON alone: {"temporal": N, "semantic": N, "reason": "one sentence"}"""


@dataclasses.dataclass(frozen=True)
class Sequenced:
    """An instruction and what was made of it: (step text or None, picture) for each turn."""

    instruction: str
    turns: tuple[tuple[str | None, PILImage.Image], ...]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a judge says: two numbers from 1 to 5, and why.

    Raises:
      InputError: a number is out of range.
    """

    temporal: int
    semantic: int
    reason: str = ""

    def __post_init__(self) -> None:
        for name in ("temporal", "semantic"):
            value = getattr(self, name)
            if type(value) is not int or not LOWEST <= value <= HIGHEST:
                raise InputError(f"{name}={value!r}: expected a whole number from {LOWEST} to {HIGHEST}")


class UnreachableError(LoomError):
    """Nobody is there to judge: no other sequence would fare better."""


class Judge(Protocol):
    """Whatever gives verdicts."""

    def judge(self, sequence: Sequenced) -> Verdict:
        """Returns a verdict; raises LoomError where it cannot come to one, UnreachableError where it never will."""
        ...


class WorldJudge:
    """Judges tutorials of the tutorial world by reading their pictures: exact, and without a network.

    The share of what should have stayed and did, and the share of frames that show their step, each laid on 1 to 5. A
    step that cannot be done, or is none of this world, is the fault of who wrote it: neither its frame nor any after it
    is right. Where the step is none of this world, nothing counts as having stayed either.
    """

    def judge(self, sequence: Sequenced) -> Verdict:
        """Returns a verdict.

        Raises:
          InputError: no step is of this world, or a picture has another size.
        """
        texts = [step or "" for step, _ in sequence.turns]
        steps = read_plan(texts)
        if not any(steps):
            raise InputError(f"none of the steps {texts} is a step of the tutorial world: use another judge")
        readings = [read_pictures(np.asarray(to_rgb(picture))[None])[0] for _, picture in sequence.turns]
        expected = zip(readings, _expect(steps), strict=True)
        right = [scene is not None and shows(reading, scene) for reading, scene in expected]
        stayed: list[bool] = []
        for step, before, after in zip(steps[1:], readings, readings[1:], strict=False):
            stayed += _stayed(step, before.scene, after.scene)
        told = f"{sum(right)} of {len(right)} frames right, {sum(stayed)} of {len(stayed)} parts stayed as they were"
        return Verdict(_on_scale(stayed), _on_scale(right), told)


def _expect(steps: Sequence[Step | None]) -> list[Scene | None]:
    """Returns what each frame should show; None from the first step on that cannot be done."""
    scenes: list[Scene | None] = []
    scene: Scene | None = Scene()
    for step in steps:
        try:
            scene = None if scene is None or step is None else apply(scene, step)
        except InputError:
            scene = None
        scenes.append(scene)
    return scenes


def _stayed(step: Step | None, before: Scene, after: Scene) -> list[bool]:
    """Returns whether each part that a step should leave alone stayed as it was; none did, if nobody knows the step."""
    if step is None:
        return [False] * (len(PLACES) + 1)
    same = [before.at(place) == after.at(place) for place in PLACES if place not in touched(step)]
    return same if isinstance(step, Paint) else [*same, before.background == after.background]


def _on_scale(good: Sequence[bool]) -> int:
    return LOWEST + round((HIGHEST - LOWEST) * (sum(good) / len(good) if good else 1))


@dataclasses.dataclass(frozen=True)
class ChatJudge:
    """Asks a model that sees pictures, behind an endpoint that speaks the OpenAI chat completions protocol.

    Every picture is sent there. One POST to `{url}/chat/completions` for each sequence, with the rubric and the
    pictures as PNG data URLs; the answer must hold the JSON that the rubric asks for.

    Attributes:
      url: of the endpoint, such as http://127.0.0.1:8000/v1.
      model: as the endpoint names it.
      key_variable: the environment variable that holds the key; none is sent where it is not set.
      timeout: seconds for one answer.
      attempts: tries, where the endpoint is busy or out of order, with pauses of `pause`, 2 `pause`, ... seconds.

    Raises:
      InputError: the url or the key cannot be used, or there are no attempts.
    """

    url: str
    model: str
    key_variable: str = "LOOM_JUDGE_KEY"
    timeout: float = 120.0
    attempts: int = 3
    pause: float = 2.0

    def __post_init__(self) -> None:
        _check_url(self.url)
        self._headers()  # says now that the key cannot be sent, and not for every sequence
        if self.attempts < 1:
            raise InputError(f"attempts={self.attempts}: the judge must be asked at least once")

    def judge(self, sequence: Sequenced) -> Verdict:
        """Returns the model's verdict.

        Raises:
          UnreachableError: there is nothing at the url, or what is there knows neither this key nor this model.
          LoomError: the endpoint refuses, gives no verdict, or none that can be read after all attempts.
        """
        return read_verdict(self._ask({"model": self.model, "temperature": 0, "messages": messages(sequence)}))

    def _headers(self) -> dict[str, str]:
        key = os.environ.get(self.key_variable)
        if key and not (key.isascii() and key.isprintable()):
            raise InputError(f"the key in {self.key_variable} holds a line break or no ASCII: set the key alone")
        return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def _ask(self, question: Mapping[str, Any]) -> str:
        address = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(question).encode(), self._headers(), method="POST")
        failure = LoomError
        for attempt in range(1, self.attempts + 1):
            time.sleep(self.pause * (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return _content(answer.read(), address)
            except urllib.error.HTTPError as error:
                fault = f"status {error.code} {error.reason}"
                if error.code != 429 and error.code < 500:
                    failure = UnreachableError if error.code in REFUSALS else LoomError
                    break
            except urllib.error.URLError as error:
                fault = str(error.reason)
                if not isinstance(error.reason, HUNG_UP):
                    raise UnreachableError(
                        f"the judge at {address} cannot be reached ({fault}): check --judge-url, and that it runs"
                    ) from error
            except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: redirected to nonsense
                fault = repr(error)
        raise failure(
            f"the judge at {address} does not answer ({fault}, try {attempt} of {self.attempts}): "
            f"check --judge-url, --judge-model and the key in {self.key_variable}"
        )


def _check_url(url: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.port != 0 and "@" not in parts.netloc
        known = known and len((parts.hostname or "").encode("idna")) > 0
    except ValueError:  # the port is no number, or the host no name
        known = False
    if not (known and url.isascii() and url.isprintable()) or any(mark in url for mark in " ?#"):
        raise InputError(
            f"--judge-url {url!r} is no address of an endpoint: expected one such as http://127.0.0.1:8000/v1, "
            "without a key or a query"
        )


def messages(sequence: Sequenced) -> list[dict[str, Any]]:
    """Returns the messages of a chat that shows a sequence to a model: the rubric, then texts and pictures in order."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": f"Instruction: {sequence.instruction}"}]
    for number, (step, picture) in enumerate(sequence.turns, 1):
        parts.append({"type": "text", "text": f"Picture {number}" + (f", step: {step}" if step else "")})
        file = io.BytesIO()
        to_rgb(picture).save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return [{"role": "system", "content": RUBRIC}, {"role": "user", "content": parts}]


def read_verdict(answer: str) -> Verdict:
    """Returns the verdict in a model's answer, which may have other text around it.

    Raises:
      LoomError: there is none.
    """
    decoder = json.JSONDecoder()
    for start, mark in enumerate(answer):
        if mark != "{":
            continue
        try:
            values, _ = decoder.raw_decode(answer, start)
            return Verdict(_whole(values["temporal"]), _whole(values["semantic"]), str(values.get("reason", "")))
        except (ValueError, KeyError, RecursionError, InputError):
            continue
    raise LoomError(f"the judge gave no verdict but {answer[:120]!r}: expected JSON with temporal and semantic, 1 to 5")


def _whole(value: Any) -> Any:
    """Returns 4 for 4.0, which is how some models write whole numbers, and anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def fingerprint(sequence: Sequenced) -> str:
    """Returns a digest of all that a judge is shown, the rubric too: where it is the same, so is the question."""
    return hashlib.sha256(json.dumps(messages(sequence)).encode()).hexdigest()


def _content(body: bytes, address: str) -> str:
    try:
        return str(json.loads(body)["choices"][0]["message"]["content"])
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise LoomError(
            f"{address} gave {body[:120]!r}: expected a chat completion with choices[0].message.content"
        ) from error


def read_sequences(folder: str | Path) -> dict[int, Sequenced]:
    """Returns the finished sequences of a folder that `loom generate` made for interleaved tasks, by request.

    Raises:
      InputError: it is no such folder, or a picture in it cannot be read.
    """
    work = SavedWork.open(Path(folder))
    finished = [entry for entry in work.results if entry["state"] == "finished"]
    return {
        entry["number"]: Sequenced(
            entry["instruction"],
            tuple((frame["step"], open_image(work.folder / frame["image"])) for frame in entry["frames"]),
        )
        for entry in finished
    }
