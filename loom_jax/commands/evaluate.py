"""`loom evaluate`: scores a model on held-out requests, or lets a judge look at what was generated."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loom_jax.core import ArgumentParser, InputError, LoomError

if TYPE_CHECKING:
    from loom_jax.evaluate import Judge, Measurement, WorldSuite

NAME = "loom evaluate"
SUITES = ("world", "judge")
TASKS = ("tutorial", "image_tutorial", "composition", "decomposition", "style")
SPLITS = ("test", "long", "train", "train_long")
PARTS = ("planning", "time_tokens", "entity_tokens")
FOR_JUDGE = ("work", "judge", "judge_url", "judge_model")
EPILOG = """examples:
  loom evaluate --checkpoint loom_jax/weights/world --steps 16 --cfg-text-scale 2 --cfg-img-scale 1 --out out/scores
  loom evaluate --checkpoint loom_jax/weights/world --task tutorial --split long --count 20 --history "last(1)"
  loom evaluate --suite judge --work out/many --judge chat --judge-url http://127.0.0.1:8000/v1 --judge-model NAME

`world` asks for sequences whose right pictures are known exactly, reads what the model draws, and writes report.html,
scores.json and measurements.jsonl. `judge` gives 1 to 5 points to what `loom generate` saved, in verdicts.json; the
judge `chat` sends the pictures to an endpoint that speaks the OpenAI protocol, with the key in LOOM_JUDGE_KEY, and
`world` reads tutorials of the world without a network.
"""


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog=NAME, description="Score a model on held-out requests.", epilog=EPILOG)
    add = parser.add_argument
    add("--suite", choices=SUITES, default="world", help="what to do [world]")
    add("--checkpoint", type=Path, metavar="DIR", help="folder made by `loom convert`, with a tokenizer of the world")
    add("--out", type=Path, default=Path("out/evaluate"), metavar="DIR", help="where reports go [out/evaluate]")
    add("--task", action="append", choices=TASKS, help="may be repeated [all]")
    add("--split", action="append", choices=SPLITS, help="may be repeated [test and long]")
    add("--count", type=int, default=50, metavar="N", help="requests of each task and split [50]")
    add("--seed", type=int, default=1000, help="of the requests [1000]")
    add("--batch", type=int, default=16, metavar="N", help="requests at once [16]")
    add("--plan", choices=("written", "given"), default="written", help="who writes the plans [written, by the model]")
    add("--history", metavar="POLICY", help="which frames a frame sees: none, all, last(k), uniform(k), random(k)")
    add("--without", action="append", choices=PARTS, help="part of the method that it was trained without; repeatable")
    add("--steps", type=int, metavar="N", help="points of the schedule: N-1 evaluations [50]")
    add("--timestep-shift", type=float, metavar="S", help="more than 1 spends more steps near noise [3]")
    add("--cfg-text-scale", type=float, metavar="A", help="guidance by text; 1 turns all guidance off [4]")
    add("--cfg-img-scale", type=float, metavar="B", help="guidance by pictures [2]")
    add("--samples", type=int, default=4, metavar="N", help="requests shown of each task and split [4]")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="longest plan [128]")
    add("--dtype", choices=("float32", "bfloat16"), help="[float32 on CPU, else bfloat16]")
    add("--quantize", choices=("int8",), help="keep the decoder's weights as int8")
    add("--taylorseer", action="store_true", help="predict most denoising steps from earlier ones")
    add("--attention", default="auto", help="attention backend: auto, dense, blockwise, document, tpu [auto]")
    judge = parser.add_argument_group("suite judge").add_argument
    judge("--work", type=Path, metavar="DIR", help="folder that `loom generate` made for an interleaved task")
    judge("--judge", choices=("world", "chat"), default="world", help="who judges [world]")
    judge("--judge-url", metavar="URL", help="of the endpoint, up to /v1")
    judge("--judge-model", metavar="NAME", help="model behind the endpoint")
    return parser


def main(argv: list[str]) -> int:
    """Runs the command; returns 1 if every request failed, or the judge had a verdict on none.

    Raises:
      InputError: bad usage or bad input; nothing was written.
      LoomError: the report cannot be written.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.suite == "judge":
        return _run_judge(args)
    given = [name for name in FOR_JUDGE if getattr(args, name) != parser.get_default(name)]
    if given:
        raise InputError(f"--{given[0].replace('_', '-')} belongs to --suite judge")
    if args.checkpoint is None:
        raise InputError(f"--checkpoint is required: name a converted folder (see {NAME} --help)")
    return _run_world(args)


def _run_world(args: argparse.Namespace) -> int:
    suite = _suite(args)
    if args.batch < 1 or args.samples < 0:
        raise InputError(f"--batch {args.batch} must be at least 1, --samples {args.samples} at least 0")
    from loom_jax import api
    from loom_jax.evaluate import measure, run_suite, write_report

    changes = {
        "num_timesteps": args.steps,
        "timestep_shift": args.timestep_shift,
        "cfg_text_scale": args.cfg_text_scale,
        "cfg_img_scale": args.cfg_img_scale,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    settings = dataclasses.replace(api.LOOM_SETTINGS, taylorseer=args.taylorseer, **given)
    text = api.TextSettings(max_new_tokens=args.max_new_tokens)
    kinds = {"dtype": args.dtype, "attention": args.attention, "quantize": args.quantize}
    generator = api.load(args.checkpoint, **kinds)
    _check_tokenizer(generator.encoder.tokenizer, args.checkpoint)
    started = time.perf_counter()
    outcomes = run_suite(suite, lambda requests: api.interleave(generator, requests, settings, text), args.batch, _tell)
    seconds = time.perf_counter() - started
    measurements = measure(outcomes)
    frames = sum(len(outcome.frames) for outcome in outcomes)
    run = {
        "checkpoint": str(args.checkpoint),
        **kinds,
        "image_settings": dataclasses.asdict(settings),
        "seconds": seconds,
        "seconds_per_frame": seconds / frames if frames else None,
        "compilations": generator.engine.compilations(),
    }
    paths = write_report(args.out, suite, outcomes, measurements, run, args.samples)
    _print_table(measurements)
    for path in paths:
        print(path)
    failed = [outcome for outcome in outcomes if outcome.failure]
    if failed:
        reason = " ".join((failed[0].failure or "").split())
        print(f"{NAME}: {len(failed)} of {len(outcomes)} requests failed, the first: {reason}", file=sys.stderr)
    return 1 if len(failed) == len(outcomes) else 0


def _suite(args: argparse.Namespace) -> WorldSuite:
    from loom_jax.document import HistoryPolicy, Method
    from loom_jax.evaluate import WorldSuite

    chosen = {"tasks": tuple(args.task or TASKS), "splits": tuple(args.split or SPLITS[:2])}
    history = None if args.history is None else HistoryPolicy.parse(args.history)
    method = Method(**dict.fromkeys(args.without or (), False))
    return WorldSuite(**chosen, count=args.count, seed=args.seed, plan=args.plan, history=history, method=method)


def _check_tokenizer(tokenizer: Any, checkpoint: Path) -> None:
    """Says at once what would otherwise make every request fail."""
    from loom_jax.document import LOOM_TOKENS

    missing = [token for token in LOOM_TOKENS if not tokenizer.has_token(token)]
    if missing:
        raise InputError(
            f"{checkpoint}: its tokenizer lacks {missing[0]!r} and {len(missing) - 1} more of Loom's tokens: "
            "evaluate a model that was trained with them"
        )


def _tell(done: int, of: int) -> None:
    print(f"{NAME}: {done} of {of} requests", file=sys.stderr)


def _print_table(measurements: Sequence[Measurement]) -> None:
    from rich.console import Console
    from rich.table import Table

    from loom_jax.evaluate import METRICS, summarise

    scores = {(s.split, s.task, s.metric): s.interval for s in summarise(measurements) if s.turn is None}
    columns = list(dict.fromkeys((split, task) for split, task, _ in scores))
    table = Table("metric", *(f"{task}\n{split}" for split, task in columns))
    for metric in METRICS:
        found = [scores.get((*column, metric)) for column in columns]
        cells = ["-" if i is None else f"{100 * i.mean:.1f}\n{100 * i.low:.0f}-{100 * i.high:.0f}" for i in found]
        table.add_row(metric, *cells)
    Console().print(table)


def _run_judge(args: argparse.Namespace) -> int:
    if args.work is None:
        raise InputError("--work is required with --suite judge: name a folder that `loom generate` made")
    from loom_jax.evaluate import ChatJudge, WorldJudge, read_sequences

    if args.judge == "chat" and not (args.judge_url and args.judge_model):
        raise InputError("--judge chat needs --judge-url and --judge-model")
    judge: Judge = ChatJudge(args.judge_url, args.judge_model) if args.judge == "chat" else WorldJudge()
    entries: list[dict[str, Any]] = []
    for number, sequence in read_sequences(args.work).items():
        entry: dict[str, Any] = {"request": number, "instruction": sequence.instruction}
        try:
            entries.append(entry | dataclasses.asdict(judge.judge(sequence)))
        except LoomError as error:
            entries.append(entry | {"fault": str(error)})
            print(f"{NAME}: request {number}: {error}", file=sys.stderr)
    judged = [entry for entry in entries if "fault" not in entry]
    means = {name: sum(e[name] for e in judged) / len(judged) for name in ("temporal", "semantic") if judged}
    path = args.out / "verdicts.json"
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"judge": args.judge, "means": means, "verdicts": entries}, indent=1) + "\n")
    except OSError as error:
        raise LoomError(f"--out {args.out}: cannot be written to ({error.strerror}): choose another folder") from error
    told = ", ".join(f"{name} {value:.2f}" for name, value in means.items()) or "no verdict"
    print(f"{path}: {len(judged)} of {len(entries)} sequences judged, {told}")
    return 0 if judged else 1
