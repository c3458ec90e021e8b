"""The page: what it shows, that it needs nothing but itself, and how it looks in a browser."""

import base64
import functools
import html.parser
import io
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image as PILImage

from loom_jax.generate import (
    FrameMade,
    InterleavedRequest,
    PlanWritten,
    Refused,
    RequestFailed,
    SavedWork,
    render_gallery,
    write_gallery,
)
from tests import tiny

STEPS = ("dig <i>deep</i>", "build & paint", "move in")
EVIL = "a hut <script>alert(1)</script> \"'&"
CHROMIUM = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)


def frame(request, turn, history=(), size=24):
    step = STEPS[turn - 1] if request == 0 else None
    return FrameMade(request, turn, step, history, 3, tiny.picture(size, size, 10 * request + turn), turn / 2)


@functools.cache
def page(tmp):
    requests = [
        InterleavedRequest(EVIL, images=(tiny.picture(20, 30, 1),), num_steps=3, seed=3),
        InterleavedRequest(
            "the <image 1> like <style>", "style", (tiny.picture(30, 20, 2), tiny.picture(20, 20, 3)), seed=4
        ),
        Refused("line 3", "broken \ud800", "cannot be read: <b>damaged</b>"),
        InterleavedRequest("too hard", plan=STEPS),
    ]
    work = SavedWork.create(tmp, requests, {"checkpoint": "bagel_7b", "image_settings": {"num_timesteps": 50}})
    work.record["sessions"].append({"load_seconds": 1.25})
    for number, event in (
        (0, PlanWritten(0, STEPS, "Step1: ...")),
        (3, RequestFailed(2, "seven steps")),
        (0, frame(0, 1)),
        (1, frame(1, 1)),
        (0, frame(0, 2, (1,))),
    ):
        work.take(event, number)
    return work, render_gallery(work)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return page(tmp_path_factory.getbasetemp() / "gallery")[0]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return page(tmp_path_factory.getbasetemp() / "gallery")[1]


class Reader(html.parser.HTMLParser):
    """Collects tags with their attributes, and checks that they are closed in turn."""

    VOID = {"meta", "img", "br", "link", "hr", "input"}

    def __init__(self, text):
        super().__init__()
        self.tags, self._open, self.said = [], [], ""
        self.feed(text)
        assert not self._open, self._open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if not self._open or self._open[-1] not in ("script", "style"):
            self.said += data


def test_it_needs_no_network_and_no_other_file(text):
    reader = Reader(text)
    for tag, attributes in reader.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "data", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#")), (tag, name, value[:60])
    assert not re.search(r"url\(|@import|fetch\(|XMLHttp|import\(", text)
    assert set(re.findall(r"https?://[^\"'\s<]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address


def test_pictures_are_inside_bit_for_bit(text, work):
    sources = [attributes["src"] for tag, attributes in Reader(text).tags if tag == "img" and "src" in attributes]
    assert len(sources) == 3 + 3  # conditions and frames
    shown = [np.asarray(PILImage.open(io.BytesIO(base64.b64decode(s.partition(",")[2])))) for s in sources]
    kept = np.asarray(PILImage.open(work.folder / "request_0/turn_2.png"))
    assert any(image.shape == kept.shape and (image == kept).all() for image in shown)


def test_small_pictures_show_their_pixels_and_others_do_not(tmp_path):
    work = SavedWork.create(tmp_path, [InterleavedRequest("x", "compose", (tiny.picture(64, 128),))], {})
    work.take(frame(1, 1, size=129), 0)
    shown = [
        attributes for tag, attributes in Reader(render_gallery(work)).tags if tag == "img" and "src" in attributes
    ]
    assert [attributes.get("class") for attributes in shown] == ["small", None]


def test_large_pictures_become_jpeg(tmp_path):
    work = SavedWork.create(tmp_path, [InterleavedRequest("x", "compose", (tiny.picture(9, 9),))], {})
    work.take(frame(1, 1, size=700), 0)
    assert "data:image/jpeg;base64," in render_gallery(work)


def test_what_users_wrote_is_text_and_never_markup(text):
    reader = Reader(text)
    assert EVIL in reader.said and STEPS[0] in reader.said and "<b>damaged</b>" in reader.said
    assert sum(tag == "script" for tag, _ in reader.tags) == 1
    assert not {"i", "b"} & {tag for tag, attributes in reader.tags if not attributes and tag == "b"}


def test_plan_frames_history_settings_timings_and_failures_are_told(text):
    reader = Reader(text)
    said = re.sub(r"\s+", " ", reader.said)
    for told in (
        "2 failed",
        "1 finished",
        "1 running",
        "seven steps",
        "line 3",
        "bagel_7b",
        "num_timesteps",
        "50",
        "1.25",
    ):
        assert told in said, told
    frames = {a["id"]: a for tag, a in reader.tags if tag == "figure" and "id" in a}
    assert frames["r0t2"]["data-history"] == "1" and frames["r0t1"]["data-history"] == ""
    assert ("a", {"class": "chip", "href": "#r0t1"}) in reader.tags
    assert "turn 3 is not made yet" in said and "1.00 s" in said and "history uniform(2)" in said
    assert "<image 1>" in said and "<style>" in said  # the roles of condition pictures


def test_a_picture_that_is_gone_leaves_its_place(tmp_path):
    work = SavedWork.create(tmp_path, [InterleavedRequest("x", "compose", (tiny.picture(9, 9),))], {})
    (tmp_path / "request_0/condition_0.png").unlink()
    assert "not readable" in render_gallery(work)


def test_a_wrong_number_of_entity_tokens_leaves_the_page_whole(tmp_path):
    request = InterleavedRequest("x", "style", (tiny.picture(9, 9),), ("<style>", "<model>"))
    work = SavedWork.create(tmp_path, [request], {})
    work.take(RequestFailed(0, "2 entity tokens for 1 pictures"), 0)
    assert "2 entity tokens for 1 pictures" in render_gallery(work)


def test_it_is_written_whole_with_half_characters_replaced(work):
    path = write_gallery(work)
    assert path.name == "gallery.html" and "broken ?" in path.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: install it to look at the page (apt-get install chromium)"
)
@pytest.mark.parametrize("width", [1400, 420])
def test_it_looks_right_in_a_browser(work, tmp_path, width):
    """Pictures are drawn, threads join frames to their history, and nothing is wider than the window."""
    probe = (
        "<script>addEventListener('load', () => { document.title = [document.documentElement.scrollWidth,"
        "document.querySelectorAll('svg.threads path').length,"
        "[...document.images].filter(i => i.src && !i.naturalWidth).length].join(' '); });</script></body>"
    )
    page = tmp_path / "page.html"
    page.write_text(
        render_gallery(work).encode("utf-8", "replace").decode().replace("</body>", probe), encoding="utf-8"
    )
    flags = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "hide-scrollbars"]
    flags += ["disable-background-networking", "disable-component-update", "disable-sync"]
    command = [
        CHROMIUM,
        *(f"--{flag}" for flag in flags),
        f"--user-data-dir={tmp_path / 'user'}",
        f"--window-size={max(width, 500)},1200",
    ]
    shot = tmp_path / "shot.png"
    subprocess.run([*command, f"--screenshot={shot}", page.as_uri()], check=True, capture_output=True, timeout=120)
    seen = np.asarray(PILImage.open(shot).convert("RGB"))
    assert len(np.unique(seen.reshape(-1, 3), axis=0)) > 200  # there are pictures on it
    dumped = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], check=True, capture_output=True, timeout=120, text=True
    )
    wide, threads, broken = map(int, re.search(r"<title>(\d+) (\d+) (\d+)</title>", dumped.stdout).groups())
    assert wide <= max(width, 500) and threads == 1 and broken == 0


def test_finished_and_failed_work_needs_no_frames(tmp_path):
    work = SavedWork.create(tmp_path, [Refused("line 1", "x", "no")], {})
    assert "Failed." in render_gallery(work)
