"""`loom demo`: what it draws, reads back, trains and prints; with a tiny random model, and with the shipped weights."""

import contextlib
import io
import json
import re
import shlex
import shutil

import pytest
from PIL import Image

from loom_jax import cli
from loom_jax.checkpoint import shipped_folder
from loom_jax.commands import demo
from loom_jax.core import STOPPED, CheckpointError, to_mapping
from loom_jax.data.world import render
from loom_jax.evaluate import WorldSuite
from loom_jax.generate import FrameMade, PlanWritten, RequestFailed, SavedWork
from tests import tiny

FRAMES = {"tutorial": 4, "image_tutorial": 4, "composition": 1, "style": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write_world(tmp_path_factory.mktemp("world"))


def loom_demo(*arguments):
    return cli.main(["demo", *map(str, arguments)])


def right_of(printed):
    """Right frames of each task, and all of them, as they were printed."""
    found = re.findall(r"^(\w+) +(\d) of (\d) frames show just what they should", printed, re.MULTILINE)
    return {task: (int(right), int(frames)) for task, right, frames in found}


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory):
    """A demonstration made small: few points, two steps of training, and the recipe for the tiny model."""
    out = tmp_path_factory.mktemp("demo") / "out"
    changes = ["total_steps=2", "mesh.preset=single", "data.rows=1", "watch.log_every=1"]
    changes.append(f"model={to_mapping(tiny.WORLD)}")
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(demo, "SAMPLING", ("--steps", "3", "--max-new-tokens", "8"))
        patch.setattr(demo, "TRAINING", tuple(f"--config.{change}" for change in changes))
        assert loom_demo("--out", out, "--checkpoint", checkpoint) == 0
    return out, said.getvalue()


def test_it_draws_reads_back_and_trains_on(finished, checkpoint):
    out, printed = finished
    assert {task: frames for task, (_, frames) in right_of(printed).items()} == FRAMES
    assert printed.count(": it failed") == 2  # the random model writes no plans
    assert f"look at {out / 'generated' / 'gallery.html'}" in printed and (out / "generated/gallery.html").is_file()
    assert re.search(r"^loss from [\d.]+ at step 1 to [\d.]+ at step 2, [\d,]+ tokens/s$", printed, re.MULTILINE)
    assert re.search(r"done in \d+ s\n$", printed) and (out / "training/checkpoints/2").is_dir()
    generate, train = (shlex.split(line)[2:] for line in printed.splitlines() if line.startswith("$ "))
    assert generate[0] == "generate" and train[0] == "train" and f"--config.init_from={checkpoint}" in train


def test_the_next_one_finds_room_though_this_one_was_stopped(finished, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "out")
    record = json.loads((out / "generated/result.json").read_text())
    record["results"][2] |= {"state": "running", "frames": []}
    (out / "generated/result.json").write_text(json.dumps(record))
    (out / "training/run.json").unlink()
    (out / "mine.txt").write_text("stays")
    demo.make_room(out)
    assert sorted(path.name for path in out.iterdir()) == ["demo.jsonl", "mine.txt"]


def save_truth(folder, outcomes, failed=None):
    """Saves the right pictures, as if a model had drawn them."""
    work = SavedWork.create(folder, [WorldSuite().request(outcome) for outcome in outcomes], {})
    for outcome in outcomes:
        number, example = outcome.number, outcome.example
        if number == failed:
            work.take(RequestFailed(number, "no plan"), number)
            continue
        if example.steps:
            work.take(PlanWritten(number, example.plan, None), number)
        for turn, picture in enumerate(render(example.frames), 1):
            work.take(FrameMade(number, turn, None, (), 0, Image.fromarray(picture), 1.0), number)


def test_right_pictures_are_found_to_be_right(tmp_path):
    outcomes = demo.draw_chosen()
    assert {o.example.task: len(o.example.frames) for o in outcomes} == FRAMES
    save_truth(tmp_path / "all", outcomes)
    found = right_of("\n".join(demo.read_back(tmp_path / "all", outcomes)))
    assert found == {task: (frames, frames) for task, frames in FRAMES.items()}
    save_truth(tmp_path / "most", outcomes, failed=1)
    lines = demo.read_back(tmp_path / "most", outcomes)
    assert right_of("\n".join(lines)) == found | {"image_tutorial": (0, 4)} and lines[1].endswith(": it failed")


def test_requests_show_what_the_demonstration_is_about():
    tutorial, image_tutorial, composition, style = (outcome.example for outcome in demo.draw_chosen())
    assert not tutorial.conditions and len(image_tutorial.conditions) == 1
    assert {token for token, _ in composition.conditions} == {"<object>", "<original_image>"}
    assert {token for token, _ in style.conditions} == {"<style>", "<original_image>"}


def test_missing_weights_are_told_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("loom_jax.checkpoint.folder.SHIPPED", tmp_path / "weights")
    assert loom_demo("--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path / "weights") in error and "configs/world_tiny.py" in error
    assert loom_demo("--out", tmp_path / "out", "--checkpoint", tmp_path / "nowhere") == 2
    assert "nowhere" in capsys.readouterr().err and not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="from-run"):
        shipped_folder()


def test_a_training_that_was_stopped_is_not_done(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("loom_jax.commands.generate.main", lambda _: 1)  # which may fail
    monkeypatch.setattr(demo, "read_back", lambda *_: [])
    monkeypatch.setattr("loom_jax.commands.train.main", lambda _: STOPPED)
    assert loom_demo("--out", tmp_path / "out", "--checkpoint", checkpoint) == STOPPED
    assert "done in" not in capsys.readouterr().out


def test_the_results_of_others_stay(checkpoint, tmp_path, capsys):
    (tmp_path / "training").mkdir()
    assert loom_demo("--out", tmp_path, "--checkpoint", checkpoint) == 2
    assert "choose another --out" in capsys.readouterr().err and (tmp_path / "training").is_dir()
