"""`loom generate`: pictures from text, edits of pictures, answers about pictures; the rest in `interleave`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loom_jax.core import ArgumentParser, InputError, LoomError

if TYPE_CHECKING:
    from loom_jax.generate import Generator, ImageSettings, Request, Result

NAME = "loom generate"
TASKS = ("image", "edit", "understand")
INTERLEAVED = ("tutorial", "compose", "decompose", "style")
EPILOG = """examples:
  loom generate --checkpoint bagel_7b --prompt "A small boat on a quiet lake" --out out/boat
  loom generate --checkpoint bagel_7b --task edit --image cat.png --prompt "Make it a dog" --seed 7 --out out/dog
  loom generate --checkpoint bagel_7b --task understand --image cat.png --prompt "What is this?" --think --out out/what
  loom generate --checkpoint loom_7b --task tutorial --prompt "How to draw a cat" --num-steps 4 --out out/cat
  loom generate --checkpoint loom_7b --task compose --image a.png --image b.png \\
      --prompt "Dress the person of <image 1> in the coat of <image 2>" --out out/coat
  loom generate --checkpoint loom_7b --requests requests.jsonl --out out/many
  loom generate --resume out/many
  loom generate --resume out/cat --redo-turn 3 --seed 7
"""


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog=NAME, description="Generate pictures or text with a converted model.", epilog=EPILOG)
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="DIR", help="folder made by `loom convert`")
    add("--prompt", help="what to make, or to answer")
    add("--image", type=Path, action="append", default=[], metavar="FILE", help="input picture; may be repeated")
    add("--task", choices=(*TASKS, *INTERLEAVED), help="by default: edit where pictures are given, else image")
    add("--think", action="store_true", help="let the model write down its thoughts first")
    add("--out", type=Path, default=Path("out/generate"), metavar="DIR", help="where results go [out/generate]")
    add("--num-images", type=int, default=1, metavar="N", help="pictures to make, with seeds SEED, SEED+1, ... [1]")
    add("--seed", type=int, help="of all randomness [0]")
    add("--height", type=int, help="of the picture, in pixels; by default that of the last input picture, or 1024")
    add("--width", type=int, help="likewise")
    add("--steps", type=int, metavar="N", help="points of the schedule: N-1 evaluations [50]")
    add("--timestep-shift", type=float, metavar="S", help="more than 1 spends more steps near noise [3]")
    add("--cfg-text-scale", type=float, metavar="A", help="guidance by text; 1 turns all guidance off [4]")
    add("--cfg-img-scale", type=float, metavar="B", help="guidance by the input pictures [2 for edit]")
    add("--cfg-interval", type=float, nargs=2, metavar=("LO", "HI"), help="guide while LO < t <= HI [0.4 1; edit 0 1]")
    add("--cfg-renorm", choices=("global", "channel", "text_channel"), help="[global; edit text_channel]")
    add("--cfg-renorm-min", type=float, metavar="M", help="least factor of the renormalisation [0]")
    add("--taylorseer", action="store_true", help="predict most steps from earlier ones: faster, a little different")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="longest answer or thought [512]")
    add("--temperature", type=float, default=0.0, help="of text; 0 takes the most likely token [0]")
    add("--top-p", type=float, default=1.0, help="draw text from the likeliest tokens that add up to this [1]")
    add("--dtype", choices=("float32", "bfloat16"), help="[float32 on CPU, else bfloat16]")
    add("--quantize", choices=("int8",), help="keep the decoder's weights as int8: half the memory of bfloat16")
    add("--attention", default="auto", help="attention backend: auto, dense, blockwise, document, tpu [auto]")
    add("--sharding", default="single", metavar="PRESET", help="how weights lie on the devices [single]")
    _add_interleaved(parser)
    return parser


def _add_interleaved(parser: ArgumentParser) -> None:
    add = parser.add_argument_group(f"interleaved tasks ({', '.join(INTERLEAVED)})").add_argument
    add("--plan", metavar="TEXT", help='the steps: "Step1: ..., Step2: ..."; by default the model writes them')
    add("--num-steps", type=int, metavar="N", help="how many steps the model is asked for")
    add("--history", metavar="POLICY", help="which frames a frame sees: none, all, last(k), uniform(k), random(k)")
    add("--entity", action="append", default=[], metavar="TOKEN", help="role of each --image, such as '<style>'")
    add("--requests", type=Path, metavar="FILE", help="a JSONL file: each line an object with these flags as keys")
    add("--resume", type=Path, metavar="DIR", help="go on with the unfinished requests of an earlier --out DIR")
    add("--redo-turn", type=int, metavar="K", help="with --resume: make turn K and all after it again, with --seed")
    add("--request", type=int, metavar="N", help="with --redo-turn: of request N alone, from 0; by default of all")
    add("--previews", type=int, default=0, metavar="N", help="save how each picture looks N times on the way [0]")


def main(argv: list[str]) -> int:
    """Runs the command.

    Raises:
      InputError: bad usage or bad input; nothing was written.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.num_images < 1:
        raise InputError(f"--num-images {args.num_images}: must be at least 1")
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    args.seed = args.seed or 0
    if args.resume or args.requests or args.task in INTERLEAVED:
        from loom_jax.commands import interleave

        return interleave.run(args, given)
    require(args, "checkpoint", "prompt")
    only = f"belongs to interleaved work: give --task {', '.join(INTERLEAVED)}, or --resume"
    refuse(given, "plan", "num_steps", "history", "entity", "redo_turn", "request", "previews", reason=only)
    requests = read_requests(args)
    from loom_jax import api
    from loom_jax.generate import TASK_SETTINGS

    settings = read_settings(args, TASK_SETTINGS[requests[0].task])
    make_folder(args.out)
    text = api.TextSettings(args.max_new_tokens, args.temperature, args.top_p)
    started = time.perf_counter()
    generator = api.load(
        args.checkpoint, preset=args.sharding, dtype=args.dtype, attention=args.attention, quantize=args.quantize
    )
    loaded = time.perf_counter()
    with _progress(requests[0].task) as on_step:
        results = generator.generate(requests, settings, text, on_step)
    timings = {"load_seconds": loaded - started, "generate_seconds": time.perf_counter() - loaded}
    for path in write_results(args.out, results, record(args, generator, settings, timings)):
        print(path)
    return 0


def make_folder(out: Path) -> None:
    """Makes the folder of results, before any work is done that could be lost.

    Raises:
      InputError: it cannot be made or written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written to ({error.strerror}): choose another folder") from error


def require(args: argparse.Namespace, *flags: str) -> None:
    """Raises InputError where one of the flags is missing."""
    for flag in flags:
        if getattr(args, flag) is None:
            raise InputError(f"--{flag} is required (see {NAME} --help)")


def refuse(given: set[str], *flags: str, reason: str) -> None:
    """Raises InputError where one of the flags was given, with the reason why it does not belong there."""
    for flag in flags:
        if flag in given:
            raise InputError(f"--{flag.replace('_', '-')} {reason}")


def read_requests(args: argparse.Namespace) -> list[Request]:
    """Returns one request for each picture to make; pictures stand before the prompt, in the order given."""
    from loom_jax.document import open_image
    from loom_jax.generate import Request, Task

    size = read_size(args)
    task: Task = args.task or ("edit" if args.image else "image")
    items = (*(open_image(path) for path in args.image), args.prompt)
    seeds = range(args.seed, args.seed + args.num_images)
    return [Request(items, task, args.think, size, seed) for seed in seeds]


def read_size(args: argparse.Namespace) -> tuple[int, int] | None:
    """Returns the (height, width) asked for, if any."""
    if (args.height is None) != (args.width is None):
        raise InputError("--height and --width go together: give both or neither")
    return None if args.height is None else (args.height, args.width)


def read_settings(args: argparse.Namespace, defaults: ImageSettings) -> ImageSettings:
    """Returns the task's settings with those that were given."""
    given = {
        "num_timesteps": args.steps,
        "timestep_shift": args.timestep_shift,
        "cfg_text_scale": args.cfg_text_scale,
        "cfg_img_scale": args.cfg_img_scale,
        "cfg_interval": None if args.cfg_interval is None else tuple(args.cfg_interval),
        "cfg_renorm_type": args.cfg_renorm,
        "cfg_renorm_min": args.cfg_renorm_min,
        "taylorseer": args.taylorseer or None,
    }
    return dataclasses.replace(defaults, **{k: v for k, v in given.items() if v is not None})


def record(
    args: argparse.Namespace, generator: Generator, settings: ImageSettings, timings: dict[str, float]
) -> dict[str, Any]:
    """Returns what result.json says of a run: everything that is needed to make the same again."""
    import jax

    import loom_jax

    return {
        "loom_jax": loom_jax.__version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "checkpoint": str(args.checkpoint),
        "prompt": args.prompt,
        "images": [str(path) for path in args.image],
        "image_settings": dataclasses.asdict(settings),
        "text_settings": {
            "max_new_tokens": args.max_new_tokens,
            "temperature": args.temperature,
            "top_p": args.top_p,
        },
        "dtype": args.dtype or jax.numpy.dtype(generator.engine.dtype).name,
        "quantize": args.quantize,
        "attention": args.attention,
        "timings": timings,
        "compilations": generator.engine.compilations(),
    }


def write_results(out: Path, results: Sequence[Result], run: dict[str, Any]) -> list[Path]:
    """Writes pictures, texts and result.json into `out`; returns their paths.

    Raises:
      LoomError: `out` cannot be written to any more.
    """
    paths, entries = [], []
    try:
        for number, result in enumerate(results):
            request = result.request
            entry: dict[str, Any] = {"task": request.task, "think": request.think, "seed": request.seed}
            if result.image is not None:
                path = out / f"image_{number}.png"
                result.image.save(path)
                paths.append(path)
                entry |= {"image": path.name, "height": result.image.height, "width": result.image.width}
            if result.text is not None:
                path = out / f"text_{number}.txt"
                path.write_text(result.text + "\n", encoding="utf-8")
                paths.append(path)
                entry |= {"text": result.text}
            if result.thought is not None:
                entry["thought"] = result.thought
            entries.append({**entry, "text_finished": result.finished})
        path = out / "result.json"
        path.write_text(json.dumps({**run, "results": entries}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise LoomError(f"{out} cannot be written to any more ({error.strerror})") from error
    return [*paths, path]


@contextmanager
def _progress(task: str) -> Iterator[Any]:
    """Shows a bar of denoising steps on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    shown = task != "understand" and sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        denoising = bar.add_task("denoising", total=None)
        yield (lambda done, of: bar.update(denoising, completed=done, total=of)) if shown else None
