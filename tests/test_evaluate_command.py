"""`loom evaluate` on a converted folder: random weights score next to nothing, and the report says so."""

import json

import pytest

from loom_jax import api, cli
from loom_jax.converters.synthetic import write_synthetic_release
from tests import tiny
from tests.reference import CKPT


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write_world(tmp_path_factory.mktemp("world"))


CHAT = ["--suite", "judge", "--work", "x", "--judge", "chat", "--judge-model", "eye"]


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
    assert "lacks '<|turn_1|>'" in capsys.readouterr().err and not any((tmp_path / "out").iterdir())


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(api, "load", lambda *args, **options: pytest.fail("the checkpoint was loaded"))
    (tmp_path / "file").touch()
    assert evaluate("--checkpoint", "x", "--out", tmp_path / "file") == 2
    assert "file: cannot be written to (File exists): choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--checkpoint is required"),
        (["--checkpoint", "x", "--count", 0], "count=0"),
        (["--checkpoint", "x", "--batch", 0], "--batch 0"),
        (["--checkpoint", "x", "--judge-url", "y"], "--judge-url belongs to --suite judge"),
        (["--checkpoint", "x", "--history", "most"], "history policy"),
        (["--suite", "judge"], "--work is required"),
        (["--suite", "judge", "--checkpoint", "x"], "--checkpoint belongs to --suite world"),
        (["--suite", "judge", "--work", "x", "--count", 0], "--count belongs to --suite world"),
        (["--suite", "judge", "--work", "x", "--judge-url", "y"], "--judge-url belongs to --judge chat"),
        (["--suite", "judge", "--work", "x", "--judge", "chat"], "--judge-url and --judge-model"),
        ([*CHAT, "--judge-url", "foo/v1"], "--judge-url 'foo/v1' is no address"),
        (["--suite", "judge", "--work", "x"], "x: no result.json in it"),
    ],
)
def test_bad_usage_is_told_in_one_line(arguments, message, capsys):
    assert evaluate(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
