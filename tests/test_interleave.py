"""The interleaved driver: one code path with training, batches, going on after an interruption, and what it refuses."""

import dataclasses
import functools
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from loom_jax import api
from loom_jax.core import TokenizerError
from loom_jax.data import DropoutConfig
from loom_jax.data.reader import drop_conditions
from loom_jax.document import (
    LOOM_TOKENS,
    WHOLE,
    Condition,
    EncodedSegment,
    HistoryPolicy,
    ImageTokens,
    LayoutState,
    Method,
    Shown,
    TextTokens,
    Turn,
    format_plan,
    lay_out,
    learned_frames,
    may_attend,
    parse_steps,
    plan_prompt,
    prologue,
)
from loom_jax.generate import (
    Done,
    Engine,
    FrameMade,
    Generator,
    ImageSettings,
    InterleavedRequest,
    PlanWritten,
    Preview,
    Request,
    RequestFailed,
    TextSettings,
    TurnStarted,
    interleave,
)
from tests import tiny
from tests.sources import ROOT

DRAWING = ImageSettings(num_timesteps=4, cfg_text_scale=3.0, cfg_img_scale=2.0, cfg_interval=(0.0, 1.0))
WRITING = TextSettings(max_new_tokens=9)
PLAN = ("lay out the ground", "raise two walls", "put on the roof", "paint the door")


@functools.cache
def loom_encoder():
    return dataclasses.replace(tiny.encoder(), tokenizer=tiny.tokenizer().with_tokens(LOOM_TOKENS))


def loom(kind=Generator):
    """A generator with Loom's tokens that shares the compiled calls of all tests."""
    return kind(tiny.CONFIG, tiny.engine(), loom_encoder())


class Writes(Generator):
    """Writes given plans in place of what the random model would."""

    plans: tuple[str, ...] = ()

    def write(self, read, seeds, settings):
        return [(self.plans[seed], True) for seed in seeds]


def run(requests, generator=None, **options):
    return list(interleave(generator or loom(), requests, DRAWING, WRITING, **options))


def frames(events, request=0):
    return [event for event in events if isinstance(event, FrameMade) and event.request == request]


def pixels(events, request=0):
    return [np.asarray(frame.image) for frame in frames(events, request)]


def failures(events):
    return {event.request: event.reason for event in events if isinstance(event, RequestFailed)}


REQUESTS = [
    InterleavedRequest("build a hut", plan=PLAN, size=(24, 24), seed=3),
    InterleavedRequest("draw a pot", plan=PLAN[:2], images=(tiny.picture(24, 30, 5),), size=(18, 24), seed=4),
    InterleavedRequest(
        "the <image 1> like <style>", "style", (tiny.picture(30, 24, 1), tiny.picture(24, 24, 2)), size=(24, 18), seed=5
    ),
]


@functools.cache
def together():
    return run(REQUESTS)


# One code path for training and generation.


class Spy(Generator):
    """Keeps the documents that were read, from where on, and the query after them."""

    def __init__(self, *args):
        super().__init__(*args)
        self.packed, self.queries = [], []

    def _pack(self, documents, starts, *least):
        self.packed.append((documents, starts))
        return super()._pack(documents, starts, *least)

    def denoise(self, read, queries, settings, branches, *options):
        self.queries.append(([q for _ in range(branches) for q in queries], read.ends))
        return super().denoise(read, queries, settings, branches, *options)


@functools.cache
def generated(method=WHOLE):
    """Turn 4 of a sequence whose frames 1 and 3 it sees: for each branch its segments with their layouts, in order."""
    pictures = tuple(tiny.picture(24, 24, seed) for seed in (7, 8, 9))
    given = tiny.picture(24, 30, 5)
    request = InterleavedRequest(
        "build a hut",
        images=(given,),
        plan=PLAN if method.planning else None,
        num_steps=None if method.planning else 4,
        size=(24, 24),
        seed=3,
        history=HistoryPolicy.parse("uniform(2)"),
        method=method,
    )
    spy = loom(Spy)
    events = run([request], spy, done={0: Done(PLAN if method.planning else (), pictures)})
    [last] = frames(events)
    assert last.turn == 4 and last.history == (1, 3)
    special, branches = spy.encoder.special, []
    for row in range(3):
        segments, layouts = [], []
        for documents, starts in spy.packed[-2:]:
            segments += documents[row]
            layouts.append(lay_out(documents[row], special, starts[row]))
        query, end = spy.queries[-1][0][row], spy.queries[-1][1][row]
        noisy = ImageTokens("noisy", (query.size[0] // 6, query.size[1] // 6))
        branches.append(([*segments, noisy], [*layouts, lay_out([noisy], special, end)]))
    return given, pictures, last.image, branches


def trained(learn_plan, dropout, method=WHOLE):
    """The training document of the same frames; texts or pictures dropped as training drops them."""
    given, pictures, made, _ = generated(method)
    turns = [Turn(k, PLAN[k - 1], Shown(image)) for k, image in ((1, pictures[0]), (3, pictures[2]), (4, made))]
    prompt = plan_prompt("tutorial", "build a hut", None if method.planning else 4)
    start = prologue([Condition(Shown(given))], prompt, format_plan(PLAN), learn_plan, method)
    encoded = loom_encoder().encode([*start, *learned_frames(turns, method)])
    return drop_conditions(encoded, dropout, np.random.default_rng(0))


BRANCHES = {
    "cond": (0, DropoutConfig(0.0, 0.0, 0.0, together=True)),
    "no_text": (1, DropoutConfig(1.0, 0.0, 0.0, together=True)),
    "no_image": (2, DropoutConfig(0.0, 1.0, 1.0, together=True)),
}


def joined(layouts, field):
    return np.concatenate([getattr(layout.tokens, field, None) for layout in layouts])


# A plan that is learned is never dropped: the branch without text is trained by documents that are given one.
@pytest.mark.parametrize(
    ("branch", "learn_plan", "method"),
    [
        ("cond", True, WHOLE),
        ("cond", False, WHOLE),
        ("no_text", False, WHOLE),
        ("no_image", True, WHOLE),
        ("no_image", False, WHOLE),
        ("cond", True, Method(planning=False)),
        ("cond", True, Method(time_tokens=False)),
        ("no_text", False, Method(planning=False, time_tokens=False)),
    ],
)
def test_training_and_generation_have_the_same_tokens_positions_and_mask(branch, learn_plan, method):
    """Token by token, for all tokens that both have: training also has the noisy copies of the history."""
    row, dropout = BRANCHES[branch]
    document = trained(learn_plan, dropout, method)
    layout = lay_out(document, loom_encoder().special)
    noisy = [i for i, s in enumerate(document) if isinstance(s, ImageTokens) and s.role == "noisy"]
    kept = ~np.isin(layout.segment, noisy[:-1])  # nobody but themselves sees those
    segments, layouts = generated(method)[3][row]
    for field in ("token_ids", "cell", "is_gen"):
        expected = np.concatenate([getattr(part, field) for part in layouts])
        np.testing.assert_array_equal(getattr(layout, field)[kept], expected)
    for field in ("position", "mode"):
        np.testing.assert_array_equal(getattr(layout.tokens, field)[kept], joined(layouts, field))
    ours = type(layout.tokens)(*(joined(layouts, field) for field in layout.tokens._fields))
    np.testing.assert_array_equal(may_attend(layout.tokens, layout.tokens)[np.ix_(kept, kept)], may_attend(ours, ours))
    present = [s for i, s in enumerate(document) if not s.dropped and i not in noisy]
    same_pixels(present, [s for s in segments[:-1] if not s.dropped])


def same_pixels(trained_segments: list[EncodedSegment], read: list[EncodedSegment]) -> None:
    for a, b in zip(trained_segments, read, strict=True):
        if isinstance(a, ImageTokens):
            assert isinstance(b, ImageTokens) and a.role == b.role
            np.testing.assert_array_equal(a.pixels, b.pixels)


def test_without_planning_the_request_says_how_many_frames_there_are():
    without = {"size": (18, 24), "method": Method(planning=False)}
    bad = [InterleavedRequest("draw a pot", **without), InterleavedRequest("draw a pot", plan=PLAN, **without)]
    events = run([*bad, InterleavedRequest("draw a pot", num_steps=2, **without)])
    assert set(failures(events)) == {0, 1} and all("num_steps" in reason for reason in failures(events).values())
    assert [(frame.request, frame.turn, frame.step) for frame in frames(events, 2)] == [(2, 1, None), (2, 2, None)]
    assert not any(isinstance(event, PlanWritten) for event in events)


def test_no_later_token_of_training_sees_a_noisy_frame():
    document = trained(True, BRANCHES["cond"][1])
    layout = lay_out(document, loom_encoder().special)
    seen = may_attend(layout.tokens, layout.tokens)
    for index, segment in enumerate(document):
        if isinstance(segment, ImageTokens) and segment.role == "noisy":
            own = layout.segment == index
            assert not seen[np.ix_(~own, own)].any() and seen[np.ix_(own, own)].all()


# Batches, order, going on.


def test_events_come_in_order_and_tell_the_history():
    events = together()
    own = [type(e).__name__ for e in events if e.request == 0]
    assert own == ["PlanWritten"] + ["TurnStarted", "FrameMade"] * 4
    assert [f.history for f in frames(events)] == [(), (1,), (1, 2), (1, 3)]
    assert [f.step for f in frames(events)] == list(PLAN) and {f.seed for f in frames(events)} == {3}
    assert [type(e).__name__ for e in events if e.request == 2] == ["TurnStarted", "FrameMade"]
    assert [f.image.size for request in range(3) for f in frames(events, request)] == [(24, 24)] * 4 + [
        (24, 18)
    ] * 2 + [(18, 24)]


def close(actual, expected):
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected, strict=True):
        difference = np.abs(a.astype(int) - b.astype(int))
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01


class Latents(Generator):
    """Keeps the latent tokens of every finished frame by the seed and the turn of its query."""

    def __init__(self, *args):
        super().__init__(*args)
        self.made = {}

    def denoise(self, read, queries, *options):
        for done, latents in super().denoise(read, queries, *options):
            self.made |= {(q.seed, q.number): t for q, t in zip(queries, latents, strict=True) if q is not None}
            yield done, latents


def test_a_batch_gives_what_each_request_gives_alone_in_any_order():
    batch = loom(Latents)
    events = run(REQUESTS[::-1], batch)
    for number, request in enumerate(REQUESTS):
        alone = loom(Latents)
        close(pixels(run([request], alone)), pixels(events, 2 - number))
        assert alone.made
        for key, latents in alone.made.items():
            assert tiny.relative(batch.made[key], latents) < 1e-4
        close(pixels(events, 2 - number), pixels(together(), number))


@pytest.mark.parametrize("finished", [(0, 0, 0), (2, 2, 1), (3, 1, 0), (1, 2, 0)])
def test_going_on_gives_the_same_bytes_as_never_stopping(finished):
    """Wherever each request of the batch stopped."""
    events = together()
    steps = (PLAN, PLAN[:2], ())
    done = {
        number: Done(steps[number], tuple(f.image for f in frames(events, number)[:count]))
        for number, count in enumerate(finished)
    }
    again = run(REQUESTS, done=done)
    for number, count in enumerate(finished):
        expected = pixels(events, number)[count:]
        assert [f.turn for f in frames(again, number)] == list(range(count + 1, count + 1 + len(expected)))
        for a, b in zip(pixels(again, number), expected, strict=True):
            np.testing.assert_array_equal(a, b)


def test_another_seed_from_a_turn_on_changes_that_turn_and_what_follows():
    events = together()
    first = tuple(f.image for f in frames(events)[:2])
    again = run(REQUESTS, done={0: Done(PLAN, first, seeds={3: 7})})
    assert [f.seed for f in frames(again)] == [7, 7]
    for a, b in zip(pixels(again), pixels(events)[2:], strict=True):
        assert (a != b).mean() > 0.5
    close(pixels(again, 1), pixels(events, 1))


def test_turns_and_requests_share_every_compiled_call():
    """Six turns, with requests that end on the way, compile nothing that three turns did not."""
    longer = [dataclasses.replace(r, plan=(PLAN[:1] * n)) for r, n in zip(REQUESTS[:2], (6, 4), strict=True)]
    run([dataclasses.replace(r, plan=PLAN[:1] * 3) for r in longer])
    before = tiny.engine().compilations()
    events = run([dataclasses.replace(r, seed=9) for r in longer])
    assert len(frames(events)) == 6 and len(frames(events, 1)) == 4
    grown = {name: count - before[name] for name, count in tiny.engine().compilations().items() if count > before[name]}
    assert grown.keys() <= {"start"}  # a longer plan may be read in a longer row


def test_a_turn_reads_its_history_and_not_the_whole_sequence():
    request = InterleavedRequest("build", plan=PLAN[:1] * 6, size=(24, 24), history=HistoryPolicy.parse("uniform(2)"))
    spy = loom(Spy)
    run([request], spy)
    lengths = [sum(len(lay_out(d, spy.encoder.special)) for d in documents) for documents, _ in spy.packed[1:]]
    turns = [n for (_, starts), n in zip(spy.packed[1:], lengths, strict=True) if starts[0] != LayoutState()]
    assert len(turns) == 6 and turns[2:] == [turns[2]] * 4 and turns[0] < turns[1] < turns[2]


def test_previews_are_shown_and_change_nothing():
    events = run(REQUESTS, previews=2)
    shown = [e for e in events if isinstance(e, Preview) and e.request == 0]
    assert len(shown) == 8 and all(e.of == 3 and 0 < e.done < 3 and e.image.size == (24, 24) for e in shown)
    for a, b in zip(pixels(events), pixels(together()), strict=True):
        np.testing.assert_array_equal(a, b)


# Plans.


def planned(*texts, **options):
    generator = loom(Writes)
    generator.plans = texts
    return run([InterleavedRequest("x", size=(24, 24), seed=i) for i in range(len(texts))], generator, **options)


def test_a_written_plan_is_parsed_and_followed():
    events = planned("Step1: dig, Step2: build", "Sure!\n1. one\n2. two, and half\n")
    assert [(e.steps, e.text) for e in events if isinstance(e, PlanWritten)] == [
        (("dig", "build"), "Step1: dig, Step2: build"),
        (("one", "two, and half"), "Sure!\n1. one\n2. two, and half\n"),
    ]
    assert [f.step for f in frames(events, 1)] == ["one", "two, and half"]


def test_a_plan_that_cannot_be_used_fails_its_request_alone():
    seven = format_plan(["go on"] * 7)
    events = planned("no steps here", "Step1: dig", seven, "Step1: , Step2: b")
    assert sorted(failures(events)) == [0, 2, 3]
    assert "no steps" in failures(events)[0] and "'no steps here'" in failures(events)[0]
    assert "7 steps" in failures(events)[2] and "at most 6" in failures(events)[2]
    assert len(frames(events, 1)) == 1


def test_plans_that_are_missing_are_written_and_failures_are_not_tried_again():
    first = planned("nothing", "Step1: dig, Step2: build")
    generator = loom(Writes)
    generator.plans = ("nothing", "Step1: dig, Step2: build")
    requests = [InterleavedRequest("x", size=(24, 24), seed=i) for i in range(2)]
    again = run(requests, generator, done={0: Done(failed=True), 1: Done()})
    assert not failures(again)
    for a, b in zip(pixels(again, 1), pixels(first, 1), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_plan_can_be_revised_between_turns():
    asked = []

    def revise(request, turn, steps):
        asked.append((request, turn, steps))
        return (*steps[:1], "raise three walls", "stop") if (request, turn) == (0, 2) else None

    events = run(REQUESTS[:2], revise=revise)
    assert [f.step for f in frames(events)] == [PLAN[0], "raise three walls", "stop"]
    assert [e.steps for e in events if isinstance(e, PlanWritten) and e.request == 0] == [
        PLAN,
        (PLAN[0], "raise three walls", "stop"),
    ]
    assert asked[0] == (0, 1, PLAN) and (1, 2, PLAN[:2]) in asked
    np.testing.assert_array_equal(pixels(events)[0].shape, (24, 24, 3))
    assert (pixels(events)[1] != pixels(together())[1]).mean() > 0.1  # the plan is read, and so is the step


def test_what_was_made_cannot_be_revised_and_a_bad_revision_fails_its_request_alone():
    def revise(request, turn, steps):
        if turn != 2:
            return None
        return ("another past", "b") if request == 0 else (steps[0], " ")

    events = run(REQUESTS[:2], revise=revise)
    assert [f.step for f in frames(events)] == [PLAN[0], "b"]
    assert len(frames(events, 1)) == 1 and "revised before turn 2" in failures(events)[1]


# What is refused.

PICTURE = tiny.picture(24, 24)
BAD = {
    "no instruction": ({"instruction": " "}, "instruction is empty"),
    "empty plan": ({"plan": ()}, "no steps"),
    "empty step": ({"plan": ("a", "")}, "an empty one"),
    "too many steps": ({"plan": PLAN + PLAN}, "8 steps.*at most 6.*turn_1.*turn_6"),
    "too many steps asked for": ({"num_steps": 7}, "num_steps=7.*at most 6"),
    "no steps asked for": ({"num_steps": 0}, "num_steps=0"),
    "plan and number": ({"plan": PLAN, "num_steps": 3}, "num_steps=3, but the plan has 4"),
    "no picture": ({"task": "compose"}, "at least one picture"),
    "composition with plan": ({"task": "compose", "images": (PICTURE,), "plan": PLAN}, "neither a plan"),
    "unknown entity": ({"task": "style", "instruction": "like <hat>", "images": (PICTURE,)}, "unknown entity.*'<hat>'"),
    "unknown given entity": ({"images": (PICTURE,), "entities": ("<hat>",)}, "unknown entity token '<hat>'"),
    "entities and pictures": ({"images": (PICTURE,), "entities": ("<style>", "<model>")}, "2 entity tokens for 1"),
    "size": ({"plan": PLAN, "size": (25, 24)}, "multiples of 6"),
    "seed": ({"plan": PLAN, "seed": -1}, "seed=-1"),
    "half a character": ({"instruction": "a \ud800"}, "not valid Unicode"),
    "half a character in the plan": ({"plan": ("a \ud800",)}, "not valid Unicode"),
}


@functools.cache
def refused():
    """All bad requests in one call with a good one in the middle."""
    requests = [InterleavedRequest(**{"instruction": "x", **fields}) for fields, _ in BAD.values()]
    good = InterleavedRequest("draw", plan=("one",), size=(24, 24))
    return run([*requests[:5], good, *requests[5:]])


@pytest.mark.parametrize("number", range(len(BAD)), ids=list(BAD))
def test_a_bad_request_fails_with_one_clear_line(number):
    reason = failures(refused())[number + (number >= 5)]
    assert "\n" not in reason
    assert re.search(list(BAD.values())[number][1], reason), reason


def test_the_others_finish():
    assert len(failures(refused())) == len(BAD) and len(frames(refused(), 5)) == 1


def test_no_request_gives_no_event():
    assert run([]) == []


def test_tokens_beyond_the_embedding_table_are_refused():
    many = [f"<|turn_{k}|>" for k in range(1, 60)]
    extended = api.add_tokens(tiny.tokenizer(), many[:10], tiny.CONFIG)
    assert extended.token_id("<|turn_10|>") == len(tiny.tokenizer()) + 9
    with pytest.raises(TokenizerError, match="520 rows, none for 25 of 59 .*turn_35"):
        api.add_tokens(tiny.tokenizer(), many, tiny.CONFIG)


def test_more_time_tokens_allow_more_turns():
    longer = tiny.tokenizer().with_tokens([*LOOM_TOKENS, *(f"<|turn_{k}|>" for k in range(7, 10))])
    generator = Generator(tiny.CONFIG, tiny.engine(), dataclasses.replace(tiny.encoder(), tokenizer=longer))
    events = run([InterleavedRequest("x", plan=("go",) * 8, size=(24, 24))], generator)
    assert [f.history for f in frames(events)][-1] == (1, 7) and len(frames(events)) == 8


# Faults of the published Loom that are not here (spec of Bagel, section 13, Loom).


def texts_read(request, *plans):
    """The texts of the document of the last turn, decoded: prologue, then what stands before the frame."""
    spy = type("SpyWrites", (Spy, Writes), {"plans": plans})(tiny.CONFIG, tiny.engine(), loom_encoder())
    events = run([request], spy)
    started = [documents for documents, starts in spy.packed if starts[0] == LayoutState()]
    read = [*started[-1][0], *spy.packed[-1][0][0]]
    return [spy.encoder.tokenizer.decode(s.ids) for s in read if isinstance(s, TextTokens)], events, spy


def test_fault_1_the_model_token_is_whole():
    tokenizer = loom_encoder().tokenizer
    assert "model>" not in LOOM_TOKENS and tokenizer.encode("<model>") == [tokenizer.token_id("<model>")]


def test_fault_2_the_last_turn_is_not_the_one_before_it_again_and_one_step_is_enough():
    texts, _, _ = texts_read(REQUESTS[0])
    assert texts[2:] == ["<|turn_1|>", PLAN[0], "<|turn_3|>", PLAN[2], "<|turn_4|>", PLAN[3]]
    texts, events, _ = texts_read(InterleavedRequest("x", plan=("only",), size=(24, 24)))
    assert texts[2:] == ["<|turn_1|>", "only"] and len(frames(events)) == 1


def test_fault_3_separators_are_no_steps_and_the_written_plan_is_used():
    texts, events, _ = texts_read(InterleavedRequest("x", size=(24, 24)), "Step1: wash it, Step2: boil it, and stir")
    assert texts[1] == "Step1: wash it, Step2: boil it, and stir"
    assert [f.step for f in frames(events)] == ["wash it", "boil it, and stir"]


def test_fault_4_steps_on_lines_of_their_own_are_all_found():
    assert parse_steps("Step1: a\nStep2: b\nStep3: c") == ["a", "b", "c"]


def test_fault_5_the_embedding_table_is_not_cut_to_the_tokenizer():
    rows = tiny.model().embed_tokens.embedding[...].shape[0]
    assert rows == tiny.CONFIG.decoder.vocab_size > len(loom_encoder().tokenizer)


def test_fault_8_with_the_tokens_of_loom_pictures_are_still_understood_and_history_has_vit_and_time_tokens():
    [result] = loom().generate([Request((PICTURE, "what is it"), "understand")], DRAWING, WRITING)
    assert result.text is not None
    texts, _, spy = texts_read(REQUESTS[0])
    roles = [s.role for s in spy.packed[-1][0][0] if isinstance(s, ImageTokens)]
    assert roles == ["clean", "vit", "clean", "vit"] and "<|turn_1|>" in texts


def test_fault_9_prompts_say_nothing_about_cooking():
    for task in ("tutorial", "decompose"):
        prompt = plan_prompt(task, "fold a crane", 4)
        assert "fold a crane" in prompt and "4 steps" in prompt and "cook" not in prompt.lower()
    assert "1 step." in plan_prompt("tutorial", "x", 1)


def test_every_frame_is_made_under_the_whole_plan():
    started = [e for e in together() if isinstance(e, TurnStarted) and e.request == 0]
    texts, _, _ = texts_read(REQUESTS[0])
    assert texts[1] == format_plan(PLAN) and [e.step for e in started] == list(PLAN)


def test_six_turns_compile_each_call_once():
    fresh = Engine(tiny.model(), tiny.vae(), loom_encoder().special, len(loom_encoder().tokenizer))
    run([dataclasses.replace(REQUESTS[0], plan=PLAN[:1] * 6)], Generator(tiny.CONFIG, fresh, loom_encoder()))
    seen = {name: count for name, count in fresh.compilations().items() if count}
    assert seen == {"start": 1, "extend": 1, "steps": 1, "encode": 1, "decode": 1}


@pytest.mark.slow
def test_the_benchmark_runs_and_bounded_histories_cost_the_same_in_every_turn(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "interleave", "--smoke", "--out", str(tmp_path / "r.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "r.json").read_text())
    held = {(run["policy"], run["turns"]): run["device_bytes"] for run in figures["rows"]}
    grows = {policy: held[policy, 7] / held[policy, 4] for policy in ("uniform(2)", "all")}
    assert grows["uniform(2)"] < 1.4 < grows["all"]  # the plan is longer, and read by every frame
    whole = [turn["device_bytes"] for turn in figures["whole_sequence"]]
    assert len(whole) == 7 and set(whole[2:]) == {whole[2]}
