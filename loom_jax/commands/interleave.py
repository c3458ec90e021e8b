"""Interleaved work of `loom generate`: requests from flags or a JSONL file, saved after every turn, resumed, shown."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from loom_jax.commands.generate import INTERLEAVED, NAME, read_settings, read_size, refuse, require
from loom_jax.core import InputError

if TYPE_CHECKING:
    from loom_jax.generate import (
        Done,
        Event,
        Generator,
        ImageSettings,
        InterleavedRequest,
        Refused,
        SavedWork,
        TextSettings,
    )

    Todo = tuple[list[int], list[InterleavedRequest], dict[int, Done]]

KEPT = {"resume", "redo_turn", "request", "seed", "checkpoint", "sharding", "previews"}
"""What may be given with --resume; everything else is as it was."""
KEYS = {"prompt", "task", "image", "entity", "plan", "num_steps", "history", "size", "height", "width", "seed"}
"""What a line of a JSONL file may hold."""


def run(args: argparse.Namespace, given: set[str]) -> int:
    """Does what the flags ask for; returns 1 if a request failed, else 0.

    Args:
      args: the flags of `loom generate`.
      given: names of those that differ from their defaults.

    Raises:
      InputError: bad usage or bad input; nothing was made.
      LoomError: the results cannot be written.
    """
    refuse(given, "think", reason="belongs to the tasks image, edit and understand: here the plan is what is thought")
    if args.previews < 0:
        raise InputError(f"--previews {args.previews}: must be at least 0")
    work = _resume(args, given) if args.resume else _begin(args, given)
    todo = work.requests()
    if any(entry["state"] == "running" for entry in work.results):
        try:
            _generate(work, todo, args)
        except KeyboardInterrupt:
            print(f"{NAME}: what is finished is saved: go on with --resume {work.folder}", file=sys.stderr)
            raise
    from loom_jax.generate import RECORD, write_gallery

    print(write_gallery(work))
    print(work.folder / RECORD)
    failed = [entry for entry in work.results if entry["state"] == "failed"]
    for entry in failed:
        name = entry["source"] if entry["task"] is None else f"request {entry['number']}"
        print(f"{NAME}: {name} failed: {' '.join(entry['reason'].split())}", file=sys.stderr)
    return 1 if failed else 0


def _begin(args: argparse.Namespace, given: set[str]) -> SavedWork:
    """Reads all requests, checks what they need, and makes the folder."""
    from loom_jax.generate import LOOM_SETTINGS, SavedWork, TextSettings

    refuse(given, "redo_turn", "request", reason="makes turns of earlier work again: name it with --resume DIR")
    require(args, "checkpoint")
    requests: Sequence[InterleavedRequest | Refused]
    if args.requests:
        in_lines = ("prompt", "image", "entity", "plan", "num_images")
        refuse(given, *in_lines, reason="does not go with --requests: say it in the lines of the file")
        requests = read_file(args)
    else:
        require(args, "prompt")
        requests = read_flags(args)
    settings = read_settings(args, LOOM_SETTINGS)
    text = TextSettings(args.max_new_tokens, args.temperature, args.top_p)
    _check_checkpoint(args.checkpoint)
    facts = {
        "checkpoint": str(args.checkpoint.resolve()),
        "image_settings": dataclasses.asdict(settings),
        "text_settings": dataclasses.asdict(text),
        "dtype": args.dtype,
        "attention": args.attention,
        "quantize": args.quantize,
    }
    return SavedWork.create(args.out, requests, facts)


def _resume(args: argparse.Namespace, given: set[str]) -> SavedWork:
    """Opens earlier work, and forgets the turns that are to be made again."""
    from loom_jax.generate import SavedWork

    refuse(given, *sorted(given - KEPT), reason="does not go with --resume, which goes on as the work was begun")
    if ("redo_turn" in given) != ("seed" in given):
        raise InputError("--redo-turn and --seed go together: with the same seed a turn would come out as it is")
    if "request" in given and "redo_turn" not in given:
        raise InputError("--request says whose turn is made again: give --redo-turn as well")
    work = SavedWork.open(args.resume)
    if args.checkpoint is not None:
        work.record["checkpoint"] = str(args.checkpoint.resolve())
    _settings(work)
    _check_checkpoint(Path(work.record["checkpoint"]))
    if args.redo_turn is not None:
        work.redo(args.redo_turn, args.seed, args.request)
    return work


def _settings(work: SavedWork) -> tuple[ImageSettings, TextSettings]:
    """Returns the settings of earlier work; raises InputError where the record lacks some or they cannot be used."""
    from loom_jax.generate import RECORD, ImageSettings, TextSettings

    run = work.record
    try:
        image = {**run["image_settings"], "cfg_interval": tuple(run["image_settings"]["cfg_interval"])}
        settings = ImageSettings(**image), TextSettings(**run["text_settings"])
        _ = Path(run["checkpoint"]), run["dtype"], run["attention"]
    except (KeyError, TypeError) as error:
        path = work.folder / RECORD
        raise InputError(f"{path} lacks settings of the run, or has other ones ({error}): restore it") from error
    return settings


def _check_checkpoint(path: Path) -> None:
    """Raises InputError where the model cannot be loaded, before anything is written; warns of missing tokens."""
    from loom_jax import api
    from loom_jax.checkpoint import read_folder
    from loom_jax.document import Tokenizer

    folder = read_folder(path)
    tokenizer = Tokenizer.from_folder(folder.path)
    api.add_tokens(tokenizer, api.LOOM_TOKENS, folder.config)
    missing = [token for token in api.LOOM_TOKENS if not tokenizer.has_token(token)]
    if missing:
        print(
            f"{NAME}: the tokenizer lacks {len(missing)} of Loom's {len(api.LOOM_TOKENS)} tokens, so they are added: "
            "this checkpoint was not trained with them",
            file=sys.stderr,
        )


def _generate(work: SavedWork, todo: Todo, args: argparse.Namespace) -> None:
    """Loads the model, makes what is unfinished, and saves it as it comes."""
    from loom_jax import api

    started = time.perf_counter()
    run, settings = work.record, _settings(work)
    kinds = {
        "preset": args.sharding,
        "dtype": run["dtype"],
        "attention": run["attention"],
        "quantize": run.get("quantize"),
    }
    generator = api.load(run["checkpoint"], **kinds, tokens=api.LOOM_TOKENS)
    loaded = time.perf_counter()
    numbers, requests, done = todo
    for event in api.interleave(generator, requests, *settings, previews=args.previews, done=done):
        number = numbers[event.request]
        path = work.take(event, number)
        if path is not None:
            print(path, flush=True)
        if sys.stderr.isatty() or args.previews:
            _tell(event, number)
    timings = {"load_seconds": loaded - started, "generate_seconds": time.perf_counter() - loaded}
    run["sessions"].append({**_machine(generator), **timings})
    work.write()


def _tell(event: Event, number: int) -> None:
    """Says on the terminal what is going on."""
    from loom_jax.generate import FrameMade, PlanWritten, Preview, TurnStarted

    if isinstance(event, PlanWritten):
        said = f"plan of {len(event.steps)} steps"
    elif isinstance(event, TurnStarted):
        seen = ", ".join(map(str, event.history)) or "no earlier frame"
        said = f"turn {event.turn} (sees {seen}): {event.step or ''}"
    elif isinstance(event, Preview):
        said = f"turn {event.turn}: {event.done} of {event.of} steps"
    elif isinstance(event, FrameMade):
        said = f"turn {event.turn} made in {event.seconds:.1f} s"
    else:
        return
    print(f"request {number}: {said}", file=sys.stderr, flush=True)


def _machine(generator: Generator) -> dict[str, Any]:
    import jax

    import loom_jax

    return {
        "loom_jax": loom_jax.__version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "dtype": jax.numpy.dtype(generator.engine.dtype).name,
        "compilations": generator.engine.compilations(),
    }


def read_flags(args: argparse.Namespace) -> Sequence[InterleavedRequest]:
    """Returns the requests that the flags describe, one for each of --num-images seeds.

    Raises:
      InputError: one of them cannot be used.
    """
    if args.entity and len(args.entity) != len(args.image):
        raise InputError(f"--entity was given {len(args.entity)} times for {len(args.image)} pictures: once for each")
    names = ("prompt", "task", "plan", "num_steps", "history", "seed")
    fields = {name: getattr(args, name) for name in names} | {"size": read_size(args), "entity": args.entity or None}
    request = read_request({**fields, "image": [str(path) for path in args.image]}, Path())
    return [dataclasses.replace(request, seed=args.seed + i) for i in range(args.num_images)]


def read_file(args: argparse.Namespace) -> list[InterleavedRequest | Refused]:
    """Returns the requests of a JSONL file in order, refused ones among them; flags fill in what a line leaves out.

    Raises:
      InputError: the file cannot be read, or holds no request.
    """
    from loom_jax.generate import Refused

    try:
        lines = args.requests.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--requests {args.requests}: cannot be read ({error}): expected a JSONL file") from error
    defaults = {name: getattr(args, name) for name in ("task", "num_steps", "history", "seed")}
    defaults["size"] = read_size(args)
    requests: list[InterleavedRequest | Refused] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        fields: Any = None
        try:
            fields = _parse(line)
            requests.append(read_request({**defaults, **fields}, args.requests.parent))
        except InputError as error:
            prompt = fields.get("prompt") if isinstance(fields, dict) else None
            requests.append(Refused(f"line {number}", prompt if isinstance(prompt, str) else line[:80], str(error)))
    if not requests:
        raise InputError(f"--requests {args.requests}: the file holds no request: give each a line of its own")
    return requests


def _parse(line: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"no valid JSON ({error})") from error
    if not isinstance(fields, dict):
        raise InputError(f"expected a JSON object, found {type(fields).__name__}")
    fields = {key.replace("-", "_"): value for key, value in fields.items()}
    unknown = fields.keys() - KEYS
    if unknown:
        raise InputError(f"unknown key {min(unknown)!r}: expected some of {', '.join(sorted(KEYS))}")
    if "size" not in fields and fields.keys() & {"height", "width"}:
        fields["size"] = [fields.pop("height", None), fields.pop("width", None)]
    return fields


def read_request(fields: Mapping[str, Any], folder: Path) -> InterleavedRequest:
    """Returns the request that some fields describe; those that are None are left to their defaults.

    Args:
      fields: with the names of KEYS; `image` is a path or a list of them, `plan` a text or a list of steps.
      folder: that the paths are relative to.

    Raises:
      InputError: a field is of the wrong type, a picture cannot be read, the plan has no steps, or the like.
    """
    from loom_jax.document import HistoryPolicy, parse_steps
    from loom_jax.generate import InterleavedRequest

    task = _text(fields, "task") or "tutorial"
    if task not in INTERLEAVED:
        raise InputError(f"task {task!r} is not one of {', '.join(INTERLEAVED)}")
    prompt, plan = _text(fields, "prompt"), fields.get("plan")
    if prompt is None or not prompt.strip():
        raise InputError("the prompt is missing or empty: say what to make")
    if plan is not None:
        plan = parse_steps(cast(str, _text(fields, "plan"))) if isinstance(plan, str) else _texts(fields, "plan")
        if not plan or not all(step.strip() for step in plan):
            raise InputError("the plan has no steps, or an empty one: expected Step1: ..., Step2: ...")
    entities = fields.get("entity")
    history = _text(fields, "history")
    return InterleavedRequest(
        instruction=prompt,
        task=cast(Any, task),
        images=tuple(_pictures(_texts(fields, "image"), folder)),
        entities=None if entities is None else tuple(_texts(fields, "entity")),
        plan=None if plan is None else tuple(plan),
        num_steps=_number(fields, "num_steps"),
        size=_size(fields.get("size")),
        seed=_number(fields, "seed") or 0,
        history=None if history is None else HistoryPolicy.parse(history),
    )


def _pictures(names: Sequence[str], folder: Path) -> list[Any]:
    from loom_jax.document import open_image

    return [open_image(folder / os.path.expanduser(name), name) for name in names]  # noqa: PTH111


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{name}: expected a text, found {json.dumps(value)[:60]}")
    return value


def _texts(fields: Mapping[str, Any], name: str) -> list[str]:
    value = fields.get(name)
    listed = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed):
        raise InputError(f"{name}: expected a text or a list of texts, found {json.dumps(value)[:60]}")
    return listed


def _number(fields: Mapping[str, Any], name: str) -> int | None:
    value = fields.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise InputError(f"{name}: expected a whole number, found {json.dumps(value)[:60]}")
    return value


def _size(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    sides = list(value) if isinstance(value, (list, tuple)) else []
    if len(sides) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) for side in sides):
        raise InputError(f"size: expected height and width in pixels, such as [512, 768], found {value!r}")
    return sides[0], sides[1]
