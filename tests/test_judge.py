"""Judges of saved work, and `loom evaluate --suite judge`: a bad endpoint costs no verdict that was given."""

import base64
import http.server
import io
import json
import threading

import numpy as np
import pytest
from PIL import Image

from loom_jax import cli
from loom_jax.core import InputError, LoomError
from loom_jax.data.world import Scene, Thing, render
from loom_jax.evaluate import ChatJudge, Sequenced, UnreachableError, Verdict, WorldJudge, read_sequences, read_verdict
from loom_jax.generate import FrameMade, InterleavedRequest, PlanWritten, RequestFailed, SavedWork

CROSS = Thing("small", "red", "cross", "top left")
SEA = Scene("sea")
CROSSED = Scene("sea", frozenset({CROSS}))
PAINT, DRAW = "paint the sea", "draw a small red cross at the top left"


def sequence(*scenes, steps=(PAINT, DRAW)):
    pictures = [Image.fromarray(picture) for picture in render(list(scenes))]
    return Sequenced("Draw it", tuple(zip(steps, pictures, strict=True)))


def test_the_world_judge_reads_pictures():
    judge = WorldJudge()
    right = judge.judge(sequence(SEA, CROSSED))
    assert (right.temporal, right.semantic) == (5, 5)
    jump = judge.judge(sequence(SEA, Scene("dusk", frozenset({CROSS}))))
    assert (jump.temporal, jump.semantic) == (5 - round(4 / 9), 3) and "1 of 2 frames" in jump.reason
    with pytest.raises(InputError, match="another judge"):
        judge.judge(sequence(SEA, SEA, steps=("boil water", "add salt")))


@pytest.mark.parametrize(
    ("steps", "points", "right"),
    [
        ((PAINT, DRAW, DRAW), (5, 4), "2 of 3"),  # the place is taken
        ((PAINT, "erase the small red cross at the top right", DRAW), (5, 2), "1 of 3"),  # there is none
        ((PAINT, DRAW, "boil water"), (3, 4), "2 of 3"),
        (("boil water", DRAW, DRAW), (5, 1), "0 of 3"),
    ],
)
def test_steps_that_cannot_be_done_are_wrong_and_not_left_out(steps, points, right):
    verdict = WorldJudge().judge(sequence(SEA, CROSSED, CROSSED, steps=steps))
    assert (verdict.temporal, verdict.semantic) == points and f"{right} frames right" in verdict.reason


def test_the_world_judge_refuses_pictures_of_another_size():
    made = Sequenced("Draw it", ((PAINT, Image.new("RGB", (64, 64))), (DRAW, Image.new("RGB", (64, 48)))))
    with pytest.raises(InputError, match="expected uint8"):
        WorldJudge().judge(made)


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ('Well: {"temporal": 4, "semantic": 2, "reason": "late"} ok', Verdict(4, 2, "late")),
        ('{"temporal": 4, "semantic": 2, "reason": "uses {x} and }{"}', Verdict(4, 2, "uses {x} and }{")),
        ('{"temporal": 4.0, "semantic": 2e0}', Verdict(4, 2)),
        ('{no} {"verdict": {"temporal": 1, "semantic": 5}}', Verdict(1, 5)),
    ],
)
def test_verdicts_are_found_in_answers(answer, verdict):
    found = read_verdict(answer)
    assert found == verdict and type(found.temporal) is type(found.semantic) is int


@pytest.mark.parametrize("value", ["4.5", "true", "0", "6", "9.0", '"4"', "null", "[4]", "NaN", "Infinity"])
def test_what_is_no_number_of_points_is_no_verdict(value):
    with pytest.raises(LoomError, match="no verdict"):
        read_verdict(f'{{"temporal": {value}, "semantic": 2}}')


@pytest.mark.parametrize("answer", ["none", '{"semantic": 2}', '{"temporal": 4, "semantic": 2', '{"a": ' * 10_000])
def test_answers_without_a_verdict(answer):
    with pytest.raises(LoomError, match="no verdict"):
        read_verdict(answer)


class Endpoint(http.server.BaseHTTPRequestHandler):
    """Answers with what the test put into `replies`, and keeps what it was asked; bare bytes are sent as they are."""

    def do_POST(self):
        self.server.asked.append((self.path, dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
        reply = self.server.replies.pop(0)
        if isinstance(reply, bytes):
            self.wfile.write(reply)
            return
        status, body = reply
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Says nothing."""


@pytest.fixture
def endpoint():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.asked, server.replies = [], []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def chat(text):
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


GOOD = (200, chat('{"temporal": 5, "semantic": 3, "reason": "fine"}'))
CUT_OFF = b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"
NO_HTTP = b"SSH-2.0-OpenSSH_9.6\r\n"


def judge_of(endpoint, **options):
    return ChatJudge(f"http://127.0.0.1:{endpoint.server_port}/v1/", "eye", **{"pause": 0.0, **options})


def test_the_chat_judge_sends_pictures_and_reads_the_verdict(endpoint, monkeypatch):
    monkeypatch.setenv("LOOM_JUDGE_KEY", "secret")
    endpoint.replies = [(503, b"busy"), GOOD]
    assert judge_of(endpoint).judge(sequence(SEA, SEA)) == Verdict(5, 3, "fine")
    path, headers, body = endpoint.asked[1]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    asked = json.loads(body)
    assert asked["model"] == "eye" and "temporal" in asked["messages"][0]["content"]
    parts = asked["messages"][1]["content"]
    assert [part["type"] for part in parts] == ["text", "text", "image_url", "text", "image_url"]
    picture = Image.open(io.BytesIO(base64.b64decode(parts[2]["image_url"]["url"].split(",")[1])))
    np.testing.assert_array_equal(np.asarray(picture), render([SEA])[0])


def test_the_chat_judge_says_why_it_has_no_verdict(endpoint, monkeypatch):
    monkeypatch.delenv("LOOM_JUDGE_KEY", raising=False)
    endpoint.replies = [(400, b"too large"), (200, b"no JSON"), *[(500, b"")] * 2]
    with pytest.raises(LoomError, match=r"status 400 .*try 1 of 3"):
        judge_of(endpoint).judge(sequence(SEA, SEA))
    assert "Authorization" not in endpoint.asked[0][1] and len(endpoint.asked) == 1
    with pytest.raises(LoomError, match="expected a chat completion"):
        judge_of(endpoint).judge(sequence(SEA, SEA))
    with pytest.raises(LoomError, match="try 2 of 2"):
        judge_of(endpoint, attempts=2).judge(sequence(SEA, SEA))


@pytest.mark.parametrize("status", [401, 403, 404])
def test_an_endpoint_that_refuses_every_sequence_alike_is_not_asked_for_the_next(endpoint, status):
    endpoint.replies = [(status, b"who?")]
    with pytest.raises(UnreachableError, match=rf"status {status} .*check --judge-url, --judge-model and the key"):
        judge_of(endpoint).judge(sequence(SEA, SEA))


@pytest.mark.parametrize(
    ("reply", "message"), [(CUT_OFF, "IncompleteRead"), (NO_HTTP, "BadStatusLine"), (b"", "RemoteDisconnected")]
)
def test_broken_answers_are_asked_for_again(endpoint, reply, message):
    endpoint.replies = [reply, GOOD, *[reply] * 3]
    assert judge_of(endpoint).judge(sequence(SEA, SEA)) == Verdict(5, 3, "fine")
    with pytest.raises(LoomError, match=rf"{message}.*try 3 of 3"):
        judge_of(endpoint).judge(sequence(SEA, SEA))


URLS = (
    "foo/v1",
    "ftp://here/v1",
    "http://",
    "http:///v1",
    "http://here:port/v1",
    "http://here:99999/v1",
    "http://[::1",
)
URLS += ("http://a b/v1", "http://a..b/v1", "http://here/v1\n", "http://me:key@here/v1", "http://here/v1?key=x", "")


@pytest.mark.parametrize("url", URLS)
def test_urls_that_nobody_can_be_asked_at_are_refused(url):
    with pytest.raises(InputError, match="expected one such as http"):
        ChatJudge(url, "eye")


def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(monkeypatch):
    monkeypatch.setenv("LOOM_JUDGE_KEY", "secret\n")
    with pytest.raises(InputError, match="LOOM_JUDGE_KEY") as caught:
        ChatJudge("http://127.0.0.1:8000/v1", "eye")
    assert "secret" not in str(caught.value)


@pytest.fixture
def work(tmp_path):
    """Three requests: two that are finished, one that failed."""
    request = InterleavedRequest("Draw it", plan=(PAINT,), size=(64, 64))
    work = SavedWork.create(tmp_path / "work", [request] * 3, {})
    for number, step in enumerate((PAINT, "boil water")):
        add_turn(work, number, step)
    work.take(RequestFailed(2, "no plan"), 2)
    return work


def add_turn(work, number, step, scene=SEA):
    work.take(PlanWritten(number, (step,), None), number)
    work.take(FrameMade(number, 1, step, (), 0, Image.fromarray(render([scene])[0]), 1.0), number)


def run(work, tmp_path, *arguments):
    """Judges the work; returns the exit status and what verdicts.json holds, if it is there."""
    command = ["evaluate", "--suite", "judge", "--work", work.folder, "--out", tmp_path / "out", *arguments]
    status, path = cli.main(list(map(str, command))), tmp_path / "out" / "verdicts.json"
    return status, json.loads(path.read_text()) if path.exists() else None


def by_chat(endpoint):
    return "--judge", "chat", "--judge-model", "eye", "--judge-url", f"http://127.0.0.1:{endpoint.server_port}/v1"


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def test_saved_work_is_read_for_judging(work):
    found = read_sequences(work.folder)
    assert list(found) == [0, 1] and found[0].instruction == "Draw it" and found[0].turns[0][0] == PAINT
    assert WorldJudge().judge(found[0]) == Verdict(5, 5, "1 of 1 frames right, 0 of 0 parts stayed as they were")


def test_the_means_say_over_how_many_they_are(work, tmp_path, capsys):
    status, record = run(work, tmp_path)
    said = capsys.readouterr()
    assert status == 0 and "1 of 3 sequences judged, temporal 5.00, semantic 5.00" in said.out
    assert "request 1: none of the steps" in said.err
    assert record["means"] == {"temporal": 5.0, "semantic": 5.0} and (record["judged"], record["of"]) == (1, 3)
    assert "another judge" in record["verdicts"][1]["fault"] and "no plan" in record["verdicts"][2]["fault"]


def test_a_broken_answer_costs_its_own_verdict_alone_and_is_made_up_for(work, tmp_path, endpoint, no_pauses, capsys):
    endpoint.replies = [GOOD, *[CUT_OFF] * 3]
    status, record = run(work, tmp_path, *by_chat(endpoint))
    assert status == 0 and record["judged"] == 1 and "IncompleteRead" in record["verdicts"][1]["fault"]
    assert "request 1: the judge at" in capsys.readouterr().err
    endpoint.replies = [GOOD]
    status, record = run(work, tmp_path, *by_chat(endpoint))
    assert status == 0 and len(endpoint.asked) == 5 and not endpoint.replies and record["judged"] == 2
    assert run(work, tmp_path, *by_chat(endpoint)) == (0, record) and len(endpoint.asked) == 5


def test_pictures_that_changed_are_judged_again(work, tmp_path, endpoint):
    endpoint.replies = [GOOD, GOOD, (200, chat('{"temporal": 1, "semantic": 1}'))]
    run(work, tmp_path, *by_chat(endpoint))
    add_turn(work, 1, "boil water", Scene("dusk"))
    _, record = run(work, tmp_path, *by_chat(endpoint))
    assert [entry.get("semantic") for entry in record["verdicts"]] == [3, 1, None] and len(endpoint.asked) == 3


def test_a_judge_that_goes_away_ends_the_run_at_once(work, tmp_path, endpoint, monkeypatch, capsys):
    endpoint.replies = [GOOD]
    asked = ChatJudge.judge

    def leave(judge, made):
        verdict = asked(judge, made)
        endpoint.shutdown()
        endpoint.server_close()
        return verdict

    monkeypatch.setattr(ChatJudge, "judge", leave)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it is tried again") if seconds else None)
    status, record = run(work, tmp_path, *by_chat(endpoint))
    assert status == 1 and record["judged"] == 1 and record["verdicts"][1]["fault"] == "not judged yet"
    assert "cannot be reached" in (error := capsys.readouterr().err) and "the same command goes on" in error
    assert run(work, tmp_path, *by_chat(endpoint)) == (1, record)


def test_an_interrupt_keeps_what_was_judged(work, tmp_path, endpoint, monkeypatch, capsys):
    verdicts = iter([Verdict(4, 4)])
    monkeypatch.setattr(ChatJudge, "judge", lambda judge, made: next(verdicts, None) or interrupt())
    status, record = run(work, tmp_path, *by_chat(endpoint))
    assert status == 130 and record["means"] == {"temporal": 4.0, "semantic": 4.0} and record["judged"] == 1
    assert "the same command goes on" in capsys.readouterr().err


def interrupt():
    raise KeyboardInterrupt


def test_verdicts_of_another_run_are_not_lost(work, tmp_path, endpoint, capsys):
    _, record = run(work, tmp_path)
    assert run(work, tmp_path, *by_chat(endpoint)) == (2, record)
    assert "verdicts of another run (judge world, model None): choose another --out" in capsys.readouterr().err
    (tmp_path / "out" / "verdicts.json").write_text('{"verdicts": 1}')
    assert run(work, tmp_path) == (2, {"verdicts": 1})
    assert "remove it, or choose another --out" in capsys.readouterr().err


def test_work_without_a_finished_request_is_refused(tmp_path, capsys):
    request = InterleavedRequest("Draw it", plan=(PAINT,), size=(64, 64))
    assert run(SavedWork.create(tmp_path / "work", [request], {}), tmp_path) == (2, None)
    assert "no request in it is finished" in capsys.readouterr().err
