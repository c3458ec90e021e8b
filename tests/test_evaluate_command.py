"""`loom evaluate` on a converted folder: random weights score next to nothing, and the report says so."""

import json

import pytest
from PIL import Image

from loom_jax import api, cli
from loom_jax.converters.synthetic import write_synthetic_release
from loom_jax.data.world import Scene, render
from loom_jax.generate import FrameMade, InterleavedRequest, PlanWritten, SavedWork
from tests import tiny
from tests.reference import CKPT


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write_world(tmp_path_factory.mktemp("world"))


def evaluate(*arguments):
    return cli.main(["evaluate", *map(str, arguments)])


def test_a_converted_folder_is_scored(checkpoint, tmp_path, capsys):
    chosen = ["--task", "tutorial", "--task", "style", "--split", "test", "--count", 1, "--plan", "given", "--steps", 3]
    chosen += ["--history", "last(1)", "--quantize", "int8"]
    assert evaluate("--checkpoint", checkpoint, *chosen, "--out", tmp_path / "out") == 0
    record = json.loads((tmp_path / "out" / "scores.json").read_text())
    scores = {(s["task"], s["metric"]): s["mean"] for s in record["scores"] if s["turn"] is None}
    assert scores["tutorial", "plan"] == 1 and scores["style", "step"] == 0
    assert record["seconds_per_frame"] > 0 and record["suite"]["history"] == "last(1)"
    assert record["image_settings"]["num_timesteps"] == 3 and record["quantize"] == "int8"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Evaluation on the tutorial world" in page and "plan_step" in capsys.readouterr().out


def test_a_model_without_loom_tokens_is_refused_at_once(checkpoint, tmp_path, capsys):
    write_synthetic_release(tmp_path / "release", tiny.WORLD, seed=3, tokenizer=CKPT)
    api.convert(tmp_path / "release", tmp_path / "converted")
    assert evaluate("--checkpoint", tmp_path / "converted", "--out", tmp_path / "out") == 2
    assert "lacks '<|turn_1|>'" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--checkpoint is required"),
        (["--checkpoint", "x", "--count", 0], "count=0"),
        (["--checkpoint", "x", "--batch", 0], "--batch 0"),
        (["--checkpoint", "x", "--judge-url", "y"], "--judge-url belongs to --suite judge"),
        (["--checkpoint", "x", "--history", "most"], "history policy"),
        (["--suite", "judge"], "--work is required"),
        (["--suite", "judge", "--work", "x", "--judge", "chat"], "--judge-url and --judge-model"),
    ],
)
def test_bad_usage_is_told_in_one_line(arguments, message, capsys):
    assert evaluate(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_saved_work_is_judged(tmp_path, capsys):
    (sea,) = render([Scene("sea")])
    request = InterleavedRequest("Draw it", plan=("paint the sea",), size=(64, 64))
    work = SavedWork.create(tmp_path / "work", [request] * 2, {})
    for number, step in enumerate(("paint the sea", "boil water")):
        work.take(PlanWritten(number, (step,), None), number)
        work.take(FrameMade(number, 1, step, (), 0, Image.fromarray(sea), 1.0), number)
    assert evaluate("--suite", "judge", "--work", tmp_path / "work", "--out", tmp_path / "out") == 0
    said = capsys.readouterr()
    assert "1 of 2 sequences judged, temporal 5.00, semantic 5.00" in said.out and "request 1" in said.err
    verdicts = json.loads((tmp_path / "out" / "verdicts.json").read_text())
    assert verdicts["means"] == {"temporal": 5.0, "semantic": 5.0} and "fault" in verdicts["verdicts"][1]
