"""`loom evaluate`: scores a model on held-out requests, or lets a judge look at what was generated."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loom_jax.commands.generate import make_folder, refuse
from loom_jax.core import ArgumentParser, InputError, LoomError

if TYPE_CHECKING:
    from loom_jax.evaluate import Judge, Measurement, Sequenced, Verdict, WorldSuite

NAME = "loom evaluate"
SUITES = ("world", "judge")
TASKS = ("tutorial", "image_tutorial", "composition", "decomposition", "style")
SPLITS = ("test", "long", "train", "train_long")
PARTS = ("planning", "time_tokens", "entity_tokens")
FOR_CHAT = ("judge_url", "judge_model")
FOR_JUDGE = ("work", "judge", *FOR_CHAT)
FOR_BOTH = ("suite", "out")
VERDICTS = "verdicts.json"
EPILOG = """examples:
  loom evaluate --checkpoint loom_jax/weights/world --steps 16 --cfg-text-scale 2 --cfg-img-scale 1 --out out/scores
  loom evaluate --checkpoint loom_jax/weights/world --task tutorial --split long --count 20 --history "last(1)"
  loom evaluate --suite judge --work out/many --judge chat --judge-url http://127.0.0.1:8000/v1 --judge-model NAME

`world` asks for sequences whose right pictures are known exactly, reads what the model draws, and writes report.html,
scores.json and measurements.jsonl. `judge` gives 1 to 5 points to what `loom generate` saved, in verdicts.json; the
judge `chat` sends the pictures to an endpoint that speaks the OpenAI protocol, with the key in LOOM_JUDGE_KEY, and
`world` reads tutorials of the world without a network. What `chat` judged is kept: the same command goes on.
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
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    if args.suite == "judge":
        others = sorted(given - {*FOR_BOTH, *FOR_JUDGE})
        refuse(given, *others, reason="belongs to --suite world: the judge looks at what is in --work")
        return _run_judge(args, given)
    refuse(given, *FOR_JUDGE, reason="belongs to --suite judge")
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
    make_folder(args.out)
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
    tasks = list(dict.fromkeys(task for _, task, _ in scores))
    for split in dict.fromkeys(split for split, _, _ in scores):
        table = Table(split, *(task.replace("_", "\n") for task in tasks))
        for metric in METRICS:
            found = [scores.get((split, task, metric)) for task in tasks]
            cells = ["-" if i is None else f"{100 * i.mean:.1f}\n{100 * i.low:.0f}-{100 * i.high:.0f}" for i in found]
            table.add_row(metric, *cells)
        Console().print(table)


def _run_judge(args: argparse.Namespace, given: set[str]) -> int:
    if args.work is None:
        raise InputError("--work is required with --suite judge: name a folder that `loom generate` made")
    judge = _make_judge(args, given)
    from loom_jax.evaluate import UnreachableError, read_sequences

    sequences = read_sequences(args.work)
    if not sequences:
        raise InputError(f"--work {args.work}: no request in it is finished: go on with `loom generate --resume` first")
    make_folder(args.out)
    path = args.out / VERDICTS
    run = {"judge": args.judge, "model": args.judge_model, "work": str(args.work.resolve())}
    entries = _enter(args.work, sequences, _earlier_verdicts(path, run))
    try:
        for number, sequence in sequences.items():
            if "fault" in entries[number]:
                _judge_one(judge, sequence, entries[number])
                _write_verdicts(path, run, entries)
    except (KeyboardInterrupt, UnreachableError):
        print(f"{NAME}: what is judged stays in {args.out}: the same command goes on", file=sys.stderr)
        raise
    record = _write_verdicts(path, run, entries)
    told = ", ".join(f"{name} {value:.2f}" for name, value in record["means"].items()) or "no verdict"
    print(f"{path}: {record['judged']} of {record['of']} sequences judged, {told}")
    return 0 if record["judged"] else 1


def _make_judge(args: argparse.Namespace, given: set[str]) -> Judge:
    from loom_jax.evaluate import ChatJudge, WorldJudge

    if args.judge == "world":
        refuse(given, *FOR_CHAT, reason="belongs to --judge chat")
        return WorldJudge()
    if not (args.judge_url and args.judge_model):
        raise InputError("--judge chat needs --judge-url and --judge-model")
    return ChatJudge(args.judge_url, args.judge_model)


def _earlier_verdicts(path: Path, run: dict[str, Any]) -> dict[tuple[int, str], Verdict]:
    """Returns what an earlier run of the same command left: a verdict by request and by what the judge was shown.

    Raises:
      InputError: the file is of another run, which is not to be lost, or cannot be read.
    """
    from loom_jax.evaluate import Verdict

    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        other = [f"{name} {record[name]}" for name in run if record[name] != run[name]]
        entries = [entry for entry in record["verdicts"] if "fault" not in entry]
        found = {(e["request"], e["shown"]): Verdict(e["temporal"], e["semantic"], e["reason"]) for e in entries}
    except (OSError, ValueError, LookupError, TypeError, InputError) as error:
        raise InputError(f"{path} cannot be gone on with ({error!r}): remove it, or choose another --out") from error
    if other:
        raise InputError(f"{path} holds verdicts of another run ({', '.join(other)}): choose another --out")
    return found if run["judge"] == "chat" else {}  # `world` costs nothing, and may have learnt to read better


def _enter(
    work: Path, sequences: Mapping[int, Sequenced], earlier: Mapping[tuple[int, str], Verdict]
) -> dict[int, dict[str, Any]]:
    """Returns an entry for each request, with the verdict that it has already, or why it has none."""
    from loom_jax.evaluate import fingerprint
    from loom_jax.generate import SavedWork

    entries: dict[int, dict[str, Any]] = {}
    for result in SavedWork.open(work).results:
        number = result["number"]
        entries[number] = entry = {"request": number, "instruction": result["instruction"]}
        if number not in sequences:
            entry["fault"] = f"nothing to judge: {result['reason'] or 'it is not finished'}"
            continue
        entry["shown"] = fingerprint(sequences[number])
        verdict = earlier.get((number, entry["shown"]))
        entry |= dataclasses.asdict(verdict) if verdict else {"fault": "not judged yet"}
    return entries


def _judge_one(judge: Judge, sequence: Sequenced, entry: dict[str, Any]) -> None:
    from loom_jax.evaluate import UnreachableError

    try:
        entry |= dataclasses.asdict(judge.judge(sequence))
        del entry["fault"]
    except UnreachableError:
        raise
    except LoomError as error:
        entry["fault"] = str(error)
        print(f"{NAME}: request {entry['request']}: {error}", file=sys.stderr)


def _write_verdicts(path: Path, run: dict[str, Any], entries: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """Writes the file whole, with the means over what is judged; returns what it holds."""
    from loom_jax.generate import write_whole

    judged = [entry for entry in entries.values() if "fault" not in entry]
    means = {name: sum(e[name] for e in judged) / len(judged) for name in ("temporal", "semantic") if judged}
    record = {**run, "judged": len(judged), "of": len(entries), "means": means, "verdicts": list(entries.values())}
    write_whole(path, (json.dumps(record, indent=1) + "\n").encode())
    return record
