"""Interleaved work on disk: everything that was made, after every turn, in a form that can be gone on with.

A folder holds `result.json` and, for each request, `request_N/` with its pictures. A picture is complete before
`result.json` names it, and both are written beside their place and then moved there: whenever a process dies, the
folder says what is finished, and that is there.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from PIL import Image as PILImage

from loom_jax.core import ImageError, InputError, LoomError
from loom_jax.document import PLANNED, HistoryPolicy, InterleavedTask, Method, open_image, to_rgb
from loom_jax.generate.interleave import Done, Event, FrameMade, InterleavedRequest, PlanWritten, Preview, RequestFailed

RECORD = "result.json"
KIND = "interleaved"
SCHEMA = 1
PART = ".part"
"""Ends the name of a file that is being written."""
_Check = Callable[[Any], bool]


def _is(*types: type) -> _Check:
    return lambda value: isinstance(value, types) and not (isinstance(value, bool) and bool not in types)


def _listed(check: _Check) -> _Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _either(*checks: _Check) -> _Check:
    return lambda value: any(check(value) for check in checks)


_text, _number, _nothing = _is(str), _is(int), _is(type(None))
_FIELDS: dict[str, _Check] = {
    "number": _number,
    "source": _is(str, type(None)),
    "task": _either(_nothing, lambda task: task in get_args(InterleavedTask)),
    "images": _listed(_text),
    "entities": _either(_nothing, _listed(_is(str, type(None)))),
    "instruction": _text,
    "state": lambda state: state in ("running", "finished", "failed"),
    "reason": _is(str, type(None)),
    "steps": _listed(_text),
    "plan_text": _is(str, type(None)),
    "seeds": lambda seeds: isinstance(seeds, dict) and all(k.isdecimal() and _number(v) for k, v in seeds.items()),
    "frames": _listed(lambda frame: isinstance(frame, dict) and _wrong(frame, _FRAME) is None),
}
"""What an entry holds, and whether a value may stand there."""
_PARTS = {field.name: bool for field in dataclasses.fields(Method)}
_ASKED: dict[str, _Check] = {
    "plan": _either(_nothing, _listed(_text)),
    "num_steps": _is(int, type(None)),
    "size": _either(_nothing, lambda size: _listed(_number)(size) and len(size) == 2),
    "seed": _number,
    "history": _is(str, type(None)),
    "policy": _text,
    "method": lambda method: isinstance(method, dict) and {k: type(v) for k, v in method.items()} == _PARTS,
}
"""What an entry holds besides, if its request could be read."""
_FRAME: dict[str, _Check] = {
    "turn": _number,
    "step": _is(str, type(None)),
    "history": _listed(_number),
    "seed": _number,
    "image": _text,
    "width": _number,
    "height": _number,
    "seconds": _is(int, float),
}


@dataclasses.dataclass(frozen=True)
class Refused:
    """A request that could not even be read: where it stands, what it says, and why."""

    source: str
    instruction: str
    reason: str


class SavedWork:
    """The requests of one call and what was made of them, kept in a folder. Use `create` or `open`.

    Attributes:
      folder: where it is kept.
      record: what `result.json` holds: settings of the run, and under `results` an entry for each request.
    """

    def __init__(self, folder: Path, record: dict[str, Any]):
        self.folder, self.record = folder, record

    @classmethod
    def create(
        cls, folder: Path, requests: Sequence[InterleavedRequest | Refused], run: Mapping[str, Any]
    ) -> SavedWork:
        """Begins a new record.

        Args:
          folder: is made, if it is not there.
          requests: with those that were refused, in order.
          run: settings of the run, as JSON.

        Raises:
          InputError: the folder holds unfinished work, or cannot be written to.
        """
        if (folder / RECORD).exists():
            _clear(folder)
        work = cls(folder, {"kind": KIND, "schema": SCHEMA, **run, "sessions": [], "results": []})
        try:
            for number, request in enumerate(requests):
                work.record["results"].append(work._enter(number, request))
            work.write()
        except LoomError as error:
            raise InputError(f"{error}: choose another folder") from error
        return work

    @classmethod
    def open(cls, folder: Path) -> SavedWork:
        """Reads a record again.

        Raises:
          InputError: there is none in the folder, or not one of this kind.
        """
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(
                f"{folder}: no {RECORD} in it, so nothing was saved there: give a folder that "
                "`loom generate` made for interleaved tasks"
            ) from error
        except (OSError, ValueError) as error:
            raise InputError(f"{folder / RECORD} cannot be read ({error}): restore it, or generate anew") from error
        if not isinstance(record, dict) or record.get("kind") != KIND:
            raise InputError(f"{folder / RECORD} does not belong to interleaved work: only that can be resumed")
        if record.get("schema") != SCHEMA:
            raise InputError(
                f"{folder / RECORD} has schema {record.get('schema')}, this version reads {SCHEMA}: "
                "resume it with the version that made it"
            )
        _check_record(folder / RECORD, record)
        return cls(folder, record)

    @property
    def results(self) -> list[dict[str, Any]]:
        """An entry for each request; its `state` is `running`, `finished` or `failed`."""
        return self.record["results"]

    def _enter(self, number: int, request: InterleavedRequest | Refused) -> dict[str, Any]:
        made: dict[str, Any] = {
            "state": "running",
            "reason": None,
            "steps": [],
            "plan_text": None,
            "seeds": {},
            "frames": [],
        }
        if isinstance(request, Refused):
            asked: dict[str, Any] = {"source": request.source, "instruction": request.instruction, "task": None}
            asked |= {"images": [], "entities": None}
            return {"number": number, **asked, **made, "state": "failed", "reason": request.reason}
        names = [f"request_{number}/condition_{i}.png" for i in range(len(request.images))]
        for name, image in zip(names, request.images, strict=True):
            self._write_picture(name, to_rgb(image))
        asked = {"source": None} | {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
        history = None if request.history is None else str(request.history)
        asked |= {"images": names, "history": history, "policy": str(request.policy)}
        asked |= {"method": dataclasses.asdict(request.method)}
        return {"number": number, **asked, **made}

    def requests(self) -> tuple[list[int], list[InterleavedRequest], dict[int, Done]]:
        """Returns what `interleave` takes to go on: the numbers of the requests, the requests, and what is done.

        Those that were refused have no part in it; those that failed keep their places in the batch, so that the others
        come out as if it had never been interrupted. What a killed process left half written is removed.
        """
        for part in self.folder.rglob(f"*{PART}"):
            part.unlink()
        numbers: list[int] = []
        requests: list[InterleavedRequest] = []
        done: dict[int, Done] = {}
        for entry in self.results:
            if entry["task"] is None:
                continue
            try:
                request = self._read_request(entry)
            except InputError as error:
                entry |= {"state": "failed", "reason": str(error)}
                continue
            done[len(requests)] = self._read_done(entry)
            numbers.append(entry["number"])
            requests.append(request)
        return numbers, requests, done

    def _read_request(self, entry: Mapping[str, Any]) -> InterleavedRequest:
        def listed(name: str) -> Any:
            return None if entry[name] is None else tuple(entry[name])

        return InterleavedRequest(
            instruction=entry["instruction"],
            task=entry["task"],
            images=tuple(open_image(self.folder / name) for name in entry["images"]),
            entities=listed("entities"),
            plan=listed("plan"),
            num_steps=entry["num_steps"],
            size=listed("size"),
            seed=entry["seed"],
            history=None if entry["history"] is None else HistoryPolicy.parse(entry["history"]),
            method=Method(**entry["method"]),
        )

    def _read_done(self, entry: dict[str, Any]) -> Done:
        """Takes up the frames of a request, as far as their pictures can be read."""
        images: list[PILImage.Image] = []
        for frame in entry["frames"]:
            try:
                images.append(open_image(self.folder / frame["image"]))
            except ImageError:  # lost or damaged by others: it is made again, with all that followed
                entry["frames"] = entry["frames"][: len(images)]
                self._settle(entry)
                break
        seeds = {int(turn): seed for turn, seed in entry["seeds"].items()}
        return Done(tuple(entry["steps"]), tuple(images), seeds, failed=entry["state"] == "failed")

    def take(self, event: Event, number: int) -> Path | None:
        """Saves what an event brings to request `number`; returns the path of its picture, if it has one.

        The record names the frames alone: previews are there to be looked at, and no part of what is gone on with.

        Raises:
          LoomError: it cannot be written, for want of room or rights.
        """
        entry, path = self.results[number], None
        if isinstance(event, PlanWritten):
            entry |= {"steps": list(event.steps), "plan_text": event.text}
        elif isinstance(event, FrameMade):
            name = _frame_name(number, event.turn)
            path = self._write_picture(name, event.image)
            frame = {"turn": event.turn, "step": event.step, "history": list(event.history), "seed": event.seed}
            frame |= {"image": name, "width": event.image.width, "height": event.image.height}
            entry["frames"] = [*entry["frames"][: event.turn - 1], {**frame, "seconds": event.seconds}]
        elif isinstance(event, Preview):
            return self._write_picture(_preview_name(number, event.turn, event.done), event.image)
        elif isinstance(event, RequestFailed):
            entry |= {"state": "failed", "reason": event.reason}
        else:
            return None
        self._settle(entry)
        self.write()
        return path

    def redo(self, turn: int, seed: int, request: int | None = None) -> None:
        """Forgets `turn` and all after it, to be made again with `seed`.

        Args:
          turn: counts from 1.
          seed: of that turn and the later ones.
          request: number of the request; by default, every one that has the turn and did not fail.

        Raises:
          InputError: no request has such a turn, there is no such request, or the seed is out of range.
        """
        if request is not None and not 0 <= request < len(self.results):
            raise InputError(f"request {request}: there is none, they have the numbers 0 to {len(self.results) - 1}")
        asked = self.results if request is None else [self.results[request]]
        chosen = [entry for entry in asked if entry["state"] != "failed" and 1 <= turn <= _turns(entry)]
        if not chosen:
            which = f"no request has it, the longest has {max(map(_turns, asked), default=0)}"
            if request is not None:
                which = f"request {request} has {_turns(asked[0])}" + (", and failed" * (asked[0]["state"] == "failed"))
            raise InputError(f"turn {turn}: {which}")
        if not 0 <= seed < 2**32:
            raise InputError(f"seed={seed}: must be at least 0 and below 2^32 = {2**32}")
        stale = [
            _frame_name(entry["number"], frame["turn"]) for entry in chosen for frame in entry["frames"][turn - 1 :]
        ]
        for entry in chosen:
            entry["frames"] = entry["frames"][: turn - 1]
            entry["seeds"] = {k: v for k, v in entry["seeds"].items() if int(k) < turn} | {str(turn): seed}
            self._settle(entry)
        self.write()  # first: from now on nobody asks for the old pictures
        for name in stale:
            (self.folder / name).unlink(missing_ok=True)

    def _settle(self, entry: dict[str, Any]) -> None:
        if entry["state"] != "failed":
            finished = 0 < _turns(entry) <= len(entry["frames"])
            entry["state"] = "finished" if finished else "running"

    def write(self) -> None:
        """Writes `result.json`.

        Raises:
          LoomError: it cannot be written.
        """
        text = json.dumps(self.record, indent=2, ensure_ascii=False) + "\n"
        # Half a surrogate pair, which a JSONL may hold, is written as the escape that JSON has for it.
        write_whole(self.folder / RECORD, text.encode("utf-8", "backslashreplace"))

    def _write_picture(self, name: str, image: PILImage.Image) -> Path:
        file = io.BytesIO()
        image.save(file, "PNG")
        write_whole(self.folder / name, file.getvalue())
        return self.folder / name


def _check_record(path: Path, record: Mapping[str, Any]) -> None:
    """Raises InputError where a record lacks something, or holds what cannot stand there."""
    results = record.get("results")
    if not isinstance(results, list) or not isinstance(record.get("sessions"), list):
        raise InputError(f"{path} lacks its results or sessions: restore it, or generate anew")
    for number, entry in enumerate(results):
        if not isinstance(entry, dict) or entry.get("number") != number:
            raise InputError(f"{path}: results {number} is not request {number}: restore it, or generate anew")
        wrong = _wrong(entry, _FIELDS | ({} if entry.get("task") is None else _ASKED))
        if wrong is None:
            names = [(turn, _frame_name(number, turn)) for turn in range(1, len(entry["frames"]) + 1)]
            wrong = None if names == [(frame["turn"], frame["image"]) for frame in entry["frames"]] else "frames"
        if wrong is not None:
            raise InputError(f"{path}: request {number} has no valid {wrong!r}: restore it, or generate anew")


def _wrong(values: Mapping[str, Any], checks: Mapping[str, _Check]) -> str | None:
    """Returns the first name that is missing or holds what it must not."""
    return next((name for name, check in checks.items() if name not in values or not check(values[name])), None)


def _frame_name(number: int, turn: int) -> str:
    return f"request_{number}/turn_{turn}.png"


def _preview_name(number: int, turn: int, done: int) -> str:
    return f"request_{number}/previews/turn_{turn}_step_{done}.png"


def _turns(entry: Mapping[str, Any]) -> int:
    """Turns of a request; 0 while they are not known."""
    return len(entry["steps"]) if entry["task"] in PLANNED else int(entry["task"] is not None)


def _clear(folder: Path) -> None:
    """Removes finished work, to make room for new work."""
    try:
        old = SavedWork.open(folder)
    except InputError:
        return  # not ours: it is overwritten, like the results of other tasks
    if any(entry["state"] == "running" for entry in old.results):
        raise InputError(f"{folder} holds unfinished work: go on with --resume {folder}, or choose another --out")
    (folder / RECORD).unlink()
    for pattern in ("request_*/condition_*.png", "request_*/turn_*.png", "request_*/previews/turn_*.png"):
        for picture in folder.glob(pattern):
            picture.unlink()


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file, whole or not at all, also if the process is killed meanwhile.

    Raises:
      LoomError: it cannot be written.
    """
    part = path.with_name(path.name + PART)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise LoomError(f"{path}: cannot be written ({error.strerror})") from error
