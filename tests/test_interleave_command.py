"""`loom generate` for interleaved work: what it writes, what it refuses with which status, and that it goes on."""

import json
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image as PILImage

from loom_jax import api, cli
from loom_jax.converters.synthetic import write_synthetic_release
from loom_jax.generate import SavedWork
from tests import tiny
from tests.reference import CKPT

PLAN = "Step1: dig, Step2: build, Step3: paint"
QUICK = ("--steps", "3", "--max-new-tokens", "8")
SIZE = ("--height", "24", "--width", "24")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A converted folder of the tiny random model; its tokenizer lacks Loom's tokens."""
    path = tmp_path_factory.mktemp("command")
    write_synthetic_release(path / "release", tiny.CONFIG, seed=5, tokenizer=CKPT)
    api.convert(path / "release", path / "converted")
    return path / "converted"


def loom(*arguments):
    return cli.main(["generate", *map(str, arguments)])


def tutorial(checkpoint, out):
    return loom(
        "--checkpoint",
        checkpoint,
        "--task",
        "tutorial",
        "--prompt",
        "a hut",
        "--plan",
        PLAN,
        *SIZE,
        *QUICK,
        "--out",
        out,
    )


def record(out):
    return json.loads((out / "result.json").read_text(encoding="utf-8"))


def pictures(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("turn_*.png")}


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory):
    """A tutorial of three turns that was never interrupted."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert tutorial(checkpoint, out) == 0
    return out


def test_a_tutorial_gives_frames_a_record_and_a_page(finished, capsys):
    made = record(finished)
    [result] = made["results"]
    assert result["state"] == "finished" and result["steps"] == ["dig", "build", "paint"]
    assert [frame["history"] for frame in result["frames"]] == [[], [1], [1, 2]]
    for frame in result["frames"]:
        assert PILImage.open(finished / frame["image"]).size == (24, 24)
    assert made["image_settings"]["num_timesteps"] == 3 and made["image_settings"]["cfg_img_scale"] == 2.0
    [session] = made["sessions"]
    assert session["generate_seconds"] > 0 and session["compilations"]["steps"] == 1
    assert "data:image/png;base64" in (finished / "gallery.html").read_text(encoding="utf-8")


def test_missing_tokens_are_added_and_told_in_one_line(checkpoint, finished, tmp_path, capsys):
    assert loom("--resume", finished) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "token" in line]
    assert len(told) == 1 and "16 of Loom's 16" in told[0] and "not trained with them" in told[0]


LINES = [
    {"prompt": "a pot", "plan": ["one", "two"], "size": [18, 24], "seed": 4, "history": "last(1)"},
    {"prompt": "broken", "image": "damaged.png"},
    {"task": "compose", "prompt": "<image 1> and <style>", "image": ["a.png", "b.png"], "height": 24, "width": 18},
    {"prompt": "x", "plan": "nothing to do"},
    {"prompt": "x", "plan": ["go on"] * 7},
    {"task": "style", "prompt": "like <hat>", "images": ["a.png"]},
    {"task": "style", "prompt": "like <hat>", "image": ["a.png"]},
    {"prompt": "x", "history": "uniform(-1)"},
    {"prompt": "x", "image": "absent.png"},
    {"prompt": "x", "num_steps": "3"},
    {"prompt": ""},
    {"task": "edit", "prompt": "x"},
    [1],
]
REASONS = {
    1: "damaged.png: not a picture",
    3: "the plan has no steps",
    4: "7 steps.*at most 6",
    5: "unknown key 'images'",
    6: "unknown entity token '<hat>'",
    7: "k must be at least 0",
    8: "absent.png: there is no such file",
    9: 'num_steps: expected a whole number, found "3"',
    10: "prompt is missing or empty",
    11: "task 'edit' is not one of",
    12: "expected a JSON object, found list",
    13: "no valid JSON",
}


@pytest.fixture(scope="module")
def batch(checkpoint, tmp_path_factory):
    """A file of requests most of which are bad."""
    folder = tmp_path_factory.mktemp("batch")
    (folder / "requests").mkdir()
    tiny.picture(30, 24, 1).save(folder / "requests/a.png")
    tiny.picture(24, 24, 2).save(folder / "requests/b.png")
    (folder / "requests/damaged.png").write_bytes(b"nothing")
    lines = "\n".join([*map(json.dumps, LINES), "{broken", "", ""])
    (folder / "requests/file.jsonl").write_text("\ufeff" + lines, encoding="utf-8")
    status = loom(
        "--checkpoint", checkpoint, "--requests", folder / "requests/file.jsonl", *QUICK, "--out", folder / "out"
    )
    return status, folder / "out"


def test_bad_requests_fail_with_their_reason_and_the_others_finish(batch):
    status, out = batch
    results = record(out)["results"]
    assert status == 1 and len(results) == 14
    for number, result in enumerate(results):
        if number in REASONS:
            assert result["state"] == "failed" and re.search(REASONS[number], result["reason"]), result
            assert "\n" not in result["reason"]
        else:
            assert result["state"] == "finished"
    assert [len(results[n]["frames"]) for n in (0, 2)] == [2, 1]
    assert results[0]["frames"][0]["width"] == 24 and results[2]["frames"][0]["height"] == 24
    page = (out / "gallery.html").read_text(encoding="utf-8")
    assert "line 2" in page and "k must be at least 0" in page


def test_failed_requests_are_told_again_and_not_tried_again(batch, capsys):
    _, out = batch
    before = pictures(out)
    assert loom("--resume", out) == 1
    assert pictures(out) == before and len(record(out)["sessions"]) == 1  # nothing was left to do
    assert "line 2 failed: " in capsys.readouterr().err


def test_interrupted_work_goes_on_and_gives_the_same_bytes(checkpoint, finished, tmp_path, monkeypatch, capsys):
    out, take, taken = tmp_path / "out", SavedWork.take, []

    def stop(work, event, number):
        taken.append(event)
        if len(taken) == 6:  # within the second turn
            raise KeyboardInterrupt
        return take(work, event, number)

    with monkeypatch.context() as patch:
        patch.setattr(SavedWork, "take", stop)
        assert tutorial(checkpoint, out) == 130
    assert f"--resume {out}" in capsys.readouterr().err
    assert len(pictures(out)) == 2 and record(out)["results"][0]["state"] == "running"
    assert tutorial(checkpoint, out) == 2 and "unfinished work" in capsys.readouterr().err
    assert loom("--resume", out) == 0
    assert pictures(out) == pictures(finished)


@pytest.mark.slow
def test_killed_work_goes_on_and_gives_the_same_bytes(checkpoint, finished, tmp_path):
    """SIGKILL after the first frame, in a process of its own."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "loom_jax.cli", "generate", "--checkpoint", checkpoint, "--task", "tutorial"]
    command += ["--prompt", "a hut", "--plan", PLAN, *SIZE, *QUICK, "--out", out]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline().strip().endswith("turn_1.png")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert loom("--resume", out) == 0
    assert pictures(out) == pictures(finished)


def test_a_turn_is_made_again_with_all_that_follows(checkpoint, finished, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    assert loom("--resume", out, "--redo-turn", 2, "--seed", 7, "--checkpoint", checkpoint) == 0
    before, after = pictures(finished), pictures(out)
    assert [before[name] == after[name] for name in sorted(before)] == [True, False, False]
    assert [frame["seed"] for frame in record(out)["results"][0]["frames"]] == [0, 7, 7]
    assert loom("--resume", out, "--redo-turn", 2, "--seed", 0) == 0
    assert pictures(out) == before  # the old seed gives the old frames


def test_a_lost_picture_is_made_again_from_the_command_line(finished, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    (out / "request_0/turn_3.png").unlink()
    assert loom("--resume", out) == 0
    assert pictures(out) == pictures(finished)


def test_previews_are_saved_and_told_while_a_turn_is_made_again(finished, tmp_path, capsys):
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    assert loom("--resume", out, "--redo-turn", 3, "--request", 0, "--seed", 7, "--previews", 1) == 0
    assert PILImage.open(out / "request_0/previews/turn_3_step_1.png").size == (24, 24)
    told = capsys.readouterr()
    assert "request 0: turn 3: 1 of 2 steps" in told.err and "previews/turn_3_step_1.png" in told.out


@pytest.mark.parametrize("change", ["image_settings", "text_settings", "checkpoint", "dtype", "attention"])
def test_work_without_its_settings_is_refused(change, finished, tmp_path, capsys):
    made = record(finished)
    del made[change]
    (tmp_path / "result.json").write_text(json.dumps(made))
    assert loom("--resume", tmp_path) == 2
    assert f"lacks settings of the run, or has other ones ('{change}')" in capsys.readouterr().err


BAD_USAGE = {
    "no checkpoint": (("--task", "tutorial", "--prompt", "x"), "--checkpoint is required"),
    "no prompt": (("--checkpoint", "C", "--task", "tutorial"), "--prompt is required"),
    "no model": (("--checkpoint", "nowhere", "--task", "tutorial", "--prompt", "x"), "nowhere"),
    "history": (
        ("--checkpoint", "C", "--task", "tutorial", "--prompt", "x", "--history", "last(-2)"),
        "k must be at least",
    ),
    "unknown history": (("--checkpoint", "C", "--task", "tutorial", "--prompt", "x", "--history", "some"), "'some'"),
    "plan": (("--checkpoint", "C", "--task", "tutorial", "--prompt", "x", "--plan", "hm"), "no steps"),
    "picture": (("--checkpoint", "C", "--task", "style", "--prompt", "x", "--image", "absent.png"), "absent.png"),
    "entity": (
        ("--checkpoint", "C", "--task", "style", "--prompt", "x", "--entity", "<style>"),
        "1 times for 0 pictures",
    ),
    "think": (("--checkpoint", "C", "--task", "tutorial", "--prompt", "x", "--think"), "--think belongs to"),
    "one side": (("--checkpoint", "C", "--task", "tutorial", "--prompt", "x", "--height", "24"), "go together"),
    "plan of an image": (("--checkpoint", "C", "--prompt", "x", "--plan", PLAN), "--plan belongs to interleaved work"),
    "no file": (("--checkpoint", "C", "--requests", "absent.jsonl"), "absent.jsonl: cannot be read"),
    "file and prompt": (
        ("--checkpoint", "C", "--requests", "f", "--prompt", "x"),
        "--prompt does not go with --requests",
    ),
    "nothing saved": (("--resume", "nowhere"), "nothing was saved there"),
    "resume with settings": (("--resume", "F", "--steps", "9"), "--steps does not go with --resume"),
    "redo without resume": (
        ("--checkpoint", "C", "--task", "tutorial", "--prompt", "x", "--redo-turn", "1"),
        "--resume DIR",
    ),
    "redo without seed": (("--resume", "F", "--redo-turn", "1"), "--redo-turn and --seed go together"),
    "seed without redo": (("--resume", "F", "--seed", "1"), "--redo-turn and --seed go together"),
    "request without redo": (("--resume", "F", "--request", "0"), "--redo-turn as well"),
    "no such request": (("--resume", "F", "--redo-turn", "1", "--seed", "1", "--request", "4"), "request 4: there is"),
    "previews": (("--checkpoint", "C", "--task", "tutorial", "--prompt", "x", "--previews", "-1"), "--previews -1"),
    "previews of an image": (("--checkpoint", "C", "--prompt", "x", "--previews", "1"), "--previews belongs to"),
    "no such turn": (("--resume", "F", "--redo-turn", "9", "--seed", "1"), "turn 9: no request has it"),
}


@pytest.mark.parametrize("case", BAD_USAGE)
def test_bad_usage_is_one_clear_line_and_status_2(case, checkpoint, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD_USAGE[case]
    places = {"C": checkpoint, "F": finished}
    assert loom(*(places.get(argument, argument) for argument in arguments)) == 2
    complaints = [line for line in capsys.readouterr().err.splitlines() if "tokenizer lacks" not in line]
    assert len(complaints) == 1 and message in complaints[0]
    assert not list(tmp_path.iterdir())


def test_an_empty_file_is_bad_usage_and_one_without_a_good_line_has_failed(checkpoint, tmp_path, capsys):
    empty, bad = tmp_path / "empty.jsonl", tmp_path / "bad.jsonl"
    empty.write_text("\n\n")
    bad.write_text('{"prompt": " "}\n')
    assert loom("--checkpoint", checkpoint, "--requests", empty, "--out", tmp_path / "a") == 2
    assert loom("--checkpoint", checkpoint, "--requests", bad, "--out", tmp_path / "b") == 1
    assert record(tmp_path / "b")["results"][0]["state"] == "failed" and (tmp_path / "b/gallery.html").exists()
    assert not (tmp_path / "a").exists()


def test_several_seeds_of_one_request(checkpoint, tmp_path):
    out = tmp_path / "out"
    tiny.picture(24, 24).save(tmp_path / "a.png")
    flags = ("--task", "style", "--prompt", "like this", "--image", tmp_path / "a.png", "--entity", "<style>")
    assert loom("--checkpoint", checkpoint, *flags, "--num-images", 2, "--seed", 5, *QUICK, "--out", out) == 0
    results = record(out)["results"]
    assert [r["seed"] for r in results] == [5, 6] and results[0]["entities"] == ["<style>"]
    first, second = (np.asarray(PILImage.open(out / r["frames"][0]["image"])) for r in results)
    assert (first != second).mean() > 0.5
