"""Judges of interleaved sequences whose truth nobody knows: scales of 1 to 5, as the paper of Loom uses them.

`temporal`: do the frames go on from each other? `semantic`: does each show its step, and are they what was asked?
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image as PILImage

from loom_jax.core import InputError, LoomError
from loom_jax.data.world import PLACES, Paint, follow, read_pictures, touched
from loom_jax.document import open_image, to_rgb
from loom_jax.evaluate.metrics import read_plan, shows
from loom_jax.generate import SavedWork

LOWEST, HIGHEST = 1, 5
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


class Judge(Protocol):
    """Whatever gives verdicts."""

    def judge(self, sequence: Sequenced) -> Verdict:
        """Returns a verdict; raises LoomError where it cannot come to one."""
        ...


class WorldJudge:
    """Judges tutorials of the tutorial world by reading their pictures: exact, and without a network.

    The share of what should have stayed and did, and the share of frames that show their step, each laid on 1 to 5.
    """

    def judge(self, sequence: Sequenced) -> Verdict:
        """Returns a verdict.

        Raises:
          InputError: the steps are none of this world, or cannot be done one after the other.
        """
        texts = [step or "" for step, _ in sequence.turns]
        steps = [step for step in read_plan(texts) if step is not None]
        if not steps or len(steps) < len(texts):
            raise InputError(f"the steps {texts} are not all steps of the tutorial world: use another judge")
        pictures = np.stack([np.asarray(to_rgb(picture)) for _, picture in sequence.turns])
        readings = read_pictures(pictures)
        right = [shows(reading, scene) for reading, scene in zip(readings, follow(steps), strict=True)]
        stayed = []
        for step, before, after in zip(steps[1:], readings, readings[1:], strict=False):
            places = [place for place in PLACES if place not in touched(step)]
            stayed += [before.scene.at(place) == after.scene.at(place) for place in places]
            if not isinstance(step, Paint):
                stayed.append(before.scene.background == after.scene.background)
        told = f"{sum(right)} of {len(right)} frames right, {sum(stayed)} of {len(stayed)} parts stayed as they were"
        return Verdict(_on_scale(stayed), _on_scale(right), told)


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
    """

    url: str
    model: str
    key_variable: str = "LOOM_JUDGE_KEY"
    timeout: float = 120.0
    attempts: int = 3
    pause: float = 2.0

    def judge(self, sequence: Sequenced) -> Verdict:
        """Returns the model's verdict.

        Raises:
          LoomError: the endpoint cannot be reached, refuses, or gives no verdict.
        """
        return read_verdict(self._ask({"model": self.model, "temperature": 0, "messages": messages(sequence)}))

    def _ask(self, question: Mapping[str, Any]) -> str:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(question).encode(), headers, method="POST")
        for attempt in range(1, self.attempts + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return _content(answer.read(), address)
            except urllib.error.HTTPError as error:
                fault = f"status {error.code} {error.reason}"
                passing = error.code == 429 or error.code >= 500
            except (OSError, urllib.error.URLError) as error:
                fault, passing = str(error), True
            if not passing or attempt == self.attempts:
                raise LoomError(
                    f"the judge at {address} does not answer ({fault}, try {attempt} of {self.attempts}): "
                    f"check --judge-url, --judge-model and the key in {self.key_variable}"
                )
            time.sleep(self.pause * attempt)
        raise LoomError(f"attempts={self.attempts}: the judge must be asked at least once")


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
    for found in re.findall(r"\{[^{}]*\}", answer):
        try:
            values = json.loads(found)
            return Verdict(values["temporal"], values["semantic"], str(values.get("reason", "")))
        except (ValueError, KeyError, InputError):
            continue
    raise LoomError(f"the judge gave no verdict but {answer[:120]!r}: expected JSON with temporal and semantic, 1 to 5")


def _content(body: bytes, address: str) -> str:
    try:
        return str(json.loads(body)["choices"][0]["message"]["content"])
    except (ValueError, LookupError, TypeError) as error:
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
