"""Interleaved work on disk: whenever a process dies, what is finished is there and the rest can be gone on with."""

import json

import numpy as np
import pytest
from PIL import Image as PILImage

from loom_jax.core import InputError, LoomError
from loom_jax.document import HistoryPolicy
from loom_jax.generate import (
    RECORD,
    FrameMade,
    InterleavedRequest,
    PlanWritten,
    Preview,
    Refused,
    RequestFailed,
    SavedWork,
    saved,
    write_whole,
)
from tests import tiny

STEPS = ("dig", "build", "paint")
REQUESTS = [
    InterleavedRequest("a hut", images=(tiny.picture(20, 30, 1),), size=(24, 24), seed=3),
    Refused("line 2", "broken", "no picture there"),
    InterleavedRequest(
        "a <style>", "style", (tiny.picture(9, 9),), ("<style>",), seed=4, history=HistoryPolicy("last", 1)
    ),
    InterleavedRequest("never", plan=STEPS),
]


def frame(request, turn, seed=3):
    picture = tiny.picture(24, 24, 100 * seed + 10 * request + turn)
    return FrameMade(request, turn, STEPS[turn - 1], tuple(range(1, turn)), seed, picture, 0.5)


EVENTS = [
    (0, PlanWritten(0, STEPS, "Step1: dig, ...")),
    (3, RequestFailed(2, "too hard")),
    (0, frame(0, 1)),
    (2, frame(1, 1)),
    (0, frame(0, 2)),
    (0, frame(0, 3)),
]


def pixels(images):
    return [np.asarray(image).tolist() for image in images]


def begin(folder):
    return SavedWork.create(folder, REQUESTS, {"checkpoint": "c"})


def replay(work, events=EVENTS):
    for number, event in events:
        work.take(event, number)
    return work


def test_work_is_read_as_it_was_written(tmp_path):
    replay(begin(tmp_path / "out"))
    numbers, requests, done = SavedWork.open(tmp_path / "out").requests()
    assert numbers == [0, 2, 3]
    for number, request in zip(numbers, requests, strict=True):
        before = REQUESTS[number]
        assert pixels(request.images) == pixels(before.images)
        for name in ("instruction", "task", "entities", "plan", "num_steps", "size", "seed", "history"):
            assert getattr(request, name) == getattr(before, name)
    assert done[0].steps == STEPS and not done[0].failed and done[2].failed
    assert pixels(done[0].frames) == pixels(
        event.image for n, event in EVENTS if isinstance(event, FrameMade) and n == 0
    )
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert [entry["state"] for entry in record["results"]] == ["finished", "failed", "finished", "failed"]
    assert record["results"][1]["reason"] == "no picture there" and record["results"][3]["reason"] == "too hard"
    assert record["checkpoint"] == "c"
    [first, *_] = record["results"][0]["frames"]
    assert first["image"] == "request_0/turn_1.png" and first["history"] == [] and first["seed"] == 3


class Killed(BaseException):
    """Stands for the end of the process: nothing may catch it."""


def dying(monkeypatch, at, stage):
    """Lets the process die in the `at`-th write: before it, in the middle of the bytes, or before it is moved."""
    count = 0

    def write(path, data):
        nonlocal count
        count += 1
        if count < at:
            return write_whole(path, data)
        part = path.with_name(path.name + saved.PART)
        path.parent.mkdir(parents=True, exist_ok=True)
        if stage != "before":
            part.write_bytes(data[: len(data) // 2] if stage == "within" else data)
        raise Killed

    monkeypatch.setattr(saved, "write_whole", write)


@pytest.mark.parametrize("stage", ["before", "within", "after"])
@pytest.mark.parametrize("at", range(4, 13))
def test_a_process_that_dies_in_any_write_leaves_a_folder_that_can_be_resumed(tmp_path, monkeypatch, at, stage):
    """The first three writes begin the record; before them there is nothing to lose."""
    work = begin(tmp_path)
    with monkeypatch.context() as patch:
        dying(patch, at - 3, stage)
        with pytest.raises(Killed):
            replay(work)
    again = SavedWork.open(tmp_path)
    left = list(tmp_path.rglob("*.part"))
    assert len(left) == (stage != "before")  # who only looks takes nothing from a process that may still write
    _, _, done = again.requests()
    assert not list(tmp_path.rglob("*.part"))
    for index, number in ((0, 0), (1, 2)):
        made = [event for n, event in EVENTS if n == number and isinstance(event, FrameMade)]
        assert pixels(done[index].frames) == pixels(e.image for e in made[: len(done[index].frames)])
    left = [
        (number, event)
        for number, event in EVENTS
        if not (isinstance(event, PlanWritten) and done[0].steps)
        and not (isinstance(event, FrameMade) and event.turn <= len(done[{0: 0, 2: 1}[number]].frames))
    ]
    replay(again, left)
    assert [entry["state"] for entry in SavedWork.open(tmp_path).results] == [
        "finished",
        "failed",
        "finished",
        "failed",
    ]


def test_a_process_that_dies_while_beginning_can_begin_again(tmp_path, monkeypatch):
    for at in range(1, 4):
        with monkeypatch.context() as patch:
            dying(patch, at, "within")
            with pytest.raises(Killed):
                begin(tmp_path)
        with pytest.raises(InputError, match="nothing was saved there"):
            SavedWork.open(tmp_path)
    assert begin(tmp_path).results[0]["state"] == "running"


def test_making_turns_again_forgets_them_and_what_follows(tmp_path):
    replay(begin(tmp_path)).redo(2, seed=7)
    again = SavedWork.open(tmp_path)
    _, _, done = again.requests()
    assert len(done[0].frames) == 1 and done[0].seeds == {2: 7} and done[0].steps == STEPS
    assert not (tmp_path / "request_0/turn_2.png").exists() and (tmp_path / "request_2/turn_1.png").exists()
    assert [entry["state"] for entry in again.results] == ["running", "failed", "finished", "failed"]
    replay(again, [(0, frame(0, 2, 7)), (0, frame(0, 3, 7))]).redo(1, seed=8)
    _, _, done = SavedWork.open(tmp_path).requests()
    assert done[0].seeds == {1: 8} and not done[0].frames and not done[1].frames


def test_a_process_that_dies_while_it_makes_turns_again_leaves_no_old_frame(tmp_path, monkeypatch):
    for stage in ("before", "within", "after"):
        folder = tmp_path / stage
        work = replay(begin(folder))
        with monkeypatch.context() as patch:
            dying(patch, 1, stage)
            with pytest.raises(Killed):
                work.redo(2, seed=7)
        assert len(SavedWork.open(folder).requests()[2][0].frames) == 3  # nothing was forgotten yet
        work = SavedWork.open(folder)
        work.redo(2, seed=7)
        with monkeypatch.context() as patch:
            dying(patch, 2, stage)  # the picture is there, the record does not name it yet
            with pytest.raises(Killed):
                work.take(frame(0, 2, 7), 0)
        assert len(SavedWork.open(folder).requests()[2][0].frames) == 1


@pytest.mark.parametrize(("turn", "message"), [(0, "turn 0"), (4, "the longest has 3"), (-1, "turn -1")])
def test_a_turn_that_is_not_there_cannot_be_made_again(tmp_path, turn, message):
    with pytest.raises(InputError, match=message):
        replay(begin(tmp_path)).redo(turn, 7)


def test_a_seed_out_of_range_is_refused(tmp_path):
    with pytest.raises(InputError, match="seed=-1"):
        replay(begin(tmp_path)).redo(1, -1)


def test_a_lost_picture_is_made_again_with_what_followed(tmp_path):
    replay(begin(tmp_path))
    (tmp_path / "request_0/turn_2.png").write_bytes(b"damaged")
    again = SavedWork.open(tmp_path)
    assert len(again.requests()[2][0].frames) == 1 and again.results[0]["state"] == "running"


def test_a_lost_condition_picture_fails_its_request_alone(tmp_path):
    begin(tmp_path)
    (tmp_path / "request_0/condition_0.png").unlink()
    again = SavedWork.open(tmp_path)
    assert again.requests()[0] == [2, 3]
    assert again.results[0]["state"] == "failed" and "condition_0.png" in again.results[0]["reason"]


def test_unfinished_work_is_not_written_over_and_finished_work_is(tmp_path):
    work = begin(tmp_path)
    with pytest.raises(InputError, match="unfinished work: go on with --resume"):
        begin(tmp_path)
    replay(work)
    begin(tmp_path)
    assert not (tmp_path / "request_0/turn_1.png").exists()
    (tmp_path / RECORD).write_text('{"results": []}')  # that of another task
    begin(tmp_path)


def test_previews_lie_beside_the_frames_and_not_in_the_record(tmp_path):
    work = begin(tmp_path)
    before = (tmp_path / RECORD).read_bytes()
    path = work.take(Preview(0, 1, 2, 3, tiny.picture(9, 9)), 0)
    assert path == tmp_path / "request_0/previews/turn_1_step_2.png" and path.exists()
    assert (tmp_path / RECORD).read_bytes() == before
    replay(work)
    begin(tmp_path)  # new work in the place of the old one
    assert not path.exists()


def test_a_turn_of_one_request_alone_is_made_again(tmp_path):
    work = replay(begin(tmp_path))
    work.redo(1, seed=7, request=2)
    assert [len(entry["frames"]) for entry in work.results] == [3, 0, 0, 0]
    for request, message in ((4, "they have the numbers 0 to 3"), (-1, "request -1"), (3, "request 3 has 0, and fail")):
        with pytest.raises(InputError, match=message):
            work.redo(1, seed=7, request=request)


CHANGES = {
    "steps": lambda entry: entry.update(steps=None),
    "frames": lambda entry: entry.update(frames=[1]),
    "task": lambda entry: entry.update(task="dance"),
    "seeds": lambda entry: entry.update(seeds={"x": 1}),
    "seed": lambda entry: entry.pop("seed"),
    "size": lambda entry: entry.update(size=[True, 24]),
    "number": lambda entry: entry.update(number=5),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_record_with_a_damaged_field_is_refused_by_its_name(tmp_path, name):
    work = replay(begin(tmp_path))
    CHANGES[name](work.results[0])
    work.write()
    with pytest.raises(InputError, match=f"no valid '{name}'" if name != "number" else "is not request 0") as caught:
        SavedWork.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_record_names_no_picture_outside_its_folder(tmp_path):
    work = replay(begin(tmp_path))
    work.results[0]["frames"][0]["image"] = "../elsewhere.png"
    work.write()
    with pytest.raises(InputError, match="no valid 'frames'"):
        SavedWork.open(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "does not belong to interleaved work"),
        ('{"results": []}', "does not belong to interleaved work"),
        ('{"kind": "interleaved", "schema": 99}', "schema 99, this version reads 1"),
        ('{"kind": "interleaved", "schema": 1, "results": [{}]}', "lacks its results or sessions"),
        ('{"kind": "interleaved", "schema": 1, "sessions": [], "results": [{}]}', "results 0 is not request 0"),
    ],
)
def test_a_record_that_cannot_be_used_is_one_clear_line(tmp_path, content, message):
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        SavedWork.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="choose another folder"):
        begin(tmp_path / "file" / "out")
    with pytest.raises(LoomError, match="cannot be written"):
        write_whole(tmp_path / "file" / "x", b"")


def test_half_characters_survive(tmp_path):
    SavedWork.create(tmp_path, [Refused("line 1", "a \ud800 b", "bad")], {})
    assert SavedWork.open(tmp_path).results[0]["instruction"] == "a \ud800 b"


def test_transparent_pictures_are_kept_as_they_are_read(tmp_path):
    clear = PILImage.new("RGBA", (8, 8), (10, 20, 30, 0))
    SavedWork.create(tmp_path, [InterleavedRequest("x", images=(clear,))], {})
    [request] = SavedWork.open(tmp_path).requests()[1]
    assert request.images[0].getpixel((0, 0)) == (255, 255, 255)
