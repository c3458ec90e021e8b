"""Metrics, suites and reports: an oracle scores 100 %, and each fault lowers just the metrics it should."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from loom_jax.core import ConfigError, InputError
from loom_jax.data.world import Add, Thing, apply, draw_example, follow, render
from loom_jax.document import Method
from loom_jax.evaluate import (
    METRICS,
    Outcome,
    WorldSuite,
    estimate,
    measure,
    paired_difference,
    run_suite,
    sample_sheet,
    summarise,
    values_of,
    wilson,
    write_report,
)
from loom_jax.generate import FrameMade, PlanWritten, RequestFailed

SUITE = WorldSuite(count=6)


class Oracle:
    """Answers the requests of a suite with the truth, or with what `spoil` makes of a scene and its turn."""

    def __init__(self, suite, spoil=None, plan=None, frames=None):
        self.truth = {outcome.number: outcome.example for outcome in suite.examples()}
        self.spoil, self.plan, self.frames = spoil, plan, frames

    def __call__(self, requests):
        for number, request in enumerate(requests):
            example = self.truth[request.seed]
            if example.steps:
                yield PlanWritten(number, tuple(self.plan(example) if self.plan else example.plan), None)
            scenes = [self.spoil(s, k, example) if self.spoil else s for k, s in enumerate(example.frames, 1)]
            for turn, picture in enumerate(render(scenes)[: self.frames], 1):
                yield FrameMade(number, turn, None, (), 0, Image.fromarray(picture), 0.5)


def score(suite=SUITE, task=None, **faults):
    """Returns the mean of each metric over all tasks, or one."""
    measured = measure(run_suite(suite, Oracle(suite, **faults), batch=4))
    means = {name: values_of(measured, name, task=task) for name in METRICS}
    return {name: float(np.mean(np.concatenate(list(v.values())))) for name, v in means.items() if v}


def test_the_truth_scores_everything():
    assert score() == dict.fromkeys(METRICS, 1.0)


def test_every_metric_is_measured_where_it_belongs():
    measured = measure(run_suite(SUITE, Oracle(SUITE)))
    of_tutorials = {m.metric for m in measured if m.task == "tutorial"}
    of_styles = {m.metric for m in measured if m.task == "style"}
    assert of_tutorials == set(METRICS)
    assert of_styles == set(METRICS) - {"plan", "plan_step", "followed"}
    turns = {m.turn for m in measured if m.metric == "step" and m.split == "long" and m.task == "tutorial"}
    assert turns == {1, 2, 3, 4, 5, 6}


def lowered(**faults):
    return {name for name, value in score(**faults).items() if value < 1}


def change(scene, **changes):
    """Changes the thing that comes last by the rule, where there is one."""
    if not scene.things:
        return scene
    last = scene.in_order[-1]
    return dataclasses.replace(scene, things=scene.things - {last} | {dataclasses.replace(last, **changes)})


def other(value, values=("red", "blue")):
    return values[0] if value != values[0] else values[1]


ALWAYS = {"step", "sequence", "followed"}


def test_a_wrong_colour():
    faults = lowered(spoil=lambda s, k, e: change(s, colour=other(s.in_order[-1].colour)) if s.things else s)
    assert faults == ALWAYS | {"f1", "colour", "consistency"}


def test_a_wrong_size_counts_as_another_thing():
    faults = lowered(spoil=lambda s, k, e: change(s, size="small") if s.things else s)
    assert faults == ALWAYS | {"f1", "consistency"}


def test_a_wrong_background():
    assert lowered(spoil=lambda s, k, e: dataclasses.replace(s, background=other(s.background, ("sea", "sky")))) == (
        ALWAYS | {"background", "consistency"}
    )


def test_a_wrong_style():
    assert lowered(spoil=lambda s, k, e: dataclasses.replace(s, style=other(s.style, ("night", "outline")))) == (
        ALWAYS | {"style", "consistency"}
    )


def test_a_style_that_changes_from_frame_to_frame_is_not_consistent():
    def flicker(scene, turn, example):
        return dataclasses.replace(scene, style=("plain", "night")[turn % 2])

    found = score(task="tutorial", spoil=flicker)
    assert found["consistency"] < 1 and found["f1"] == 1


@pytest.mark.parametrize("frames", ["black", "noise", "none"])
def test_what_shows_nothing_of_this_world_is_wrong_in_everything(frames):
    rng = np.random.default_rng(0)
    made = {"black": np.zeros((64, 64, 3), np.uint8), "noise": rng.integers(0, 256, (64, 64, 3), np.uint8)}
    outcomes = []
    for number, task in enumerate(("tutorial", "image_tutorial", "composition", "style", "decomposition")):
        example = draw_example(task, "test", 0, number)
        shown = (made[frames],) * len(example.frames) if frames in made else ()
        outcomes.append(Outcome(number, "test", example, example.plan, shown))
    found = {m.metric: [] for m in measure(outcomes)}
    for m in measure(outcomes):
        found[m.metric].append(m.value)
    assert {name for name, values in found.items() if any(values)} == {"plan", "plan_step"}
    turns = sum(len(example.frames) - 1 for example in (o.example for o in outcomes[:2]))
    assert len(found["consistency"]) == turns + sum(o.example.base is not None for o in outcomes)


def test_one_thing_too_many_in_one_frame():
    def add(scene, turn, example):
        if turn != 2 or not scene.free:
            return scene
        return apply(scene, Add(Thing("small", "red", "cross", scene.free[-1])))

    assert lowered(spoil=add) == ALWAYS | {"f1", "consistency"}
    later = score(task="tutorial", spoil=add)
    assert 0.5 < later["step"] < 1 and later["sequence"] == 0


def test_a_lost_thing():
    def lose(scene, turn, example):
        return dataclasses.replace(scene, things=frozenset(scene.in_order[:-1]))

    assert lowered(spoil=lose) == ALWAYS | {"f1", "place", "colour", "shape", "consistency"}


def test_a_wrong_plan_that_is_followed():
    def turned(example):
        return (*example.plan[:1], *reversed(example.plan[1:])) if example.task == "image_tutorial" else example.plan

    def drawn(scene, turn, example):
        if example.task != "image_tutorial":
            return scene
        steps = (*example.steps[:1], *reversed(example.steps[1:]))
        return follow(steps)[turn - 1]

    found = score(task="image_tutorial", plan=turned, spoil=drawn)
    assert found["plan"] < 1 and found["plan_step"] < 1 and found["step"] < 1
    assert found["followed"] == found["consistency"] == 1


def test_a_plan_in_other_words_is_no_plan():
    found = score(task="tutorial", plan=lambda example: ["first make it nice"] * len(example.plan))
    assert found["plan"] == found["plan_step"] == 0 and found["step"] == 1 and "followed" not in found


def test_synonyms_are_the_same_plan():
    assert score(plan=lambda example: [text.replace("large", "big") for text in example.plan])["plan"] == 1


def test_missing_frames_are_wrong():
    found = score(task="tutorial", frames=1)
    assert found["sequence"] == 0 and 0 < found["step"] < 0.5 and found["background"] == found["clear"] == found["step"]


def test_noise_is_not_clear():
    outcome = Outcome(3, "test", draw_example("style", "test", 0, 0), frames=(np.zeros((64, 64, 3), np.uint8),))
    values = {m.metric: m.value for m in measure([outcome])}
    assert values["clear"] == values["step"] == 0


def test_failed_requests_count_as_wrong_and_are_told(tmp_path):
    suite = WorldSuite(tasks=("tutorial",), splits=("test",), count=2)

    def fail(requests):
        yield from (RequestFailed(number, "no plan") for number in range(len(requests)))

    outcomes = run_suite(suite, fail)
    assert [outcome.failure for outcome in outcomes] == ["no plan"] * 2
    assert {m.value for m in measure(outcomes)} == {0.0}
    write_report(tmp_path, suite, outcomes, measure(outcomes), {})
    assert "no plan" in (tmp_path / "report.html").read_text()


def test_requests_carry_what_is_given():
    by_task = {outcome.example.task: outcome for outcome in WorldSuite(count=1).examples()}
    style = SUITE.request(by_task["style"])
    assert style.task == "style" and sorted(style.entities) == ["<original_image>", "<style>"] and style.plan is None
    taken = SUITE.request(by_task["decomposition"])
    assert taken.task == "decompose" and taken.entities is None and taken.images[0].size == (64, 64) == taken.size
    given = WorldSuite(plan="given").request(by_task["tutorial"])
    assert given.plan == by_task["tutorial"].example.plan and given.images == ()
    unplanned = WorldSuite(plan="given", method=Method(planning=False)).request(by_task["tutorial"])
    assert unplanned.plan is None and unplanned.num_steps == len(given.plan) and not unplanned.method.planning


def test_numbers_of_requests_do_not_depend_on_the_selection():
    whole = {o.number: o.example for o in WorldSuite(count=3).examples()}
    part = {o.number: o.example for o in WorldSuite(tasks=("style",), splits=("long",), count=3).examples()}
    assert len(whole) == 30 and part.items() <= whole.items()


@pytest.mark.parametrize("bad", [{"tasks": ("song",)}, {"splits": ()}, {"count": 0}])
def test_impossible_suites_are_refused(bad):
    with pytest.raises(ConfigError):
        WorldSuite(**bad)


def test_frames_of_another_size_are_refused():
    outcome = Outcome(0, "test", draw_example("style", "test", 0, 0), frames=(np.zeros((64, 48, 3), np.uint8),))
    with pytest.raises(InputError, match="64 x 64"):
        measure([outcome])


@pytest.mark.parametrize("count", range(1, 60))
@pytest.mark.parametrize("mean", [0.0, 0.3, 1.0])
def test_an_interval_holds_its_mean_and_stays_within_0_and_1(mean, count):
    low, high = wilson(mean, count)
    assert 0 <= low <= mean <= high <= 1


def test_intervals():
    assert wilson(0.8, 50) == pytest.approx((0.669, 0.888), abs=1e-3)
    yes_no = estimate({k: [k % 5 > 0] for k in range(50)})
    assert (yes_no.low, yes_no.high) == pytest.approx(wilson(0.8, 50)) and yes_no.count == yes_no.requests == 50
    together = estimate({k: [float(k % 2)] * 10 for k in range(40)})
    assert together.low < 0.36 and together.high > 0.64 and together.count == 400
    perfect = estimate({k: [1.0, 1.0] for k in range(20)})
    assert (perfect.low, perfect.high) == pytest.approx(wilson(1.0, 20)) and perfect.high == 1
    alike = estimate({k: [0.8, 0.8] for k in range(40)})
    assert alike.high - alike.low < yes_no.high - yes_no.low


def test_an_interval_does_not_rise_where_more_is_wrong():
    found = [estimate({k: [1.0, 1.0, float(k >= wrong)] for k in range(40)}) for wrong in range(40)]
    assert all(a.mean > b.mean and a.low > b.low and a.high > b.high for a, b in itertools.pairwise(found))


@pytest.mark.parametrize(("right", "together"), [(0.97, 0.6), (0.9, 0.5), (0.6, 1.0)])
def test_intervals_hold_the_truth_as_often_as_they_say(right, together):
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        whole, single = rng.random((40, 1)) < right, rng.random((40, 3)) < right
        values = np.where(rng.random((40, 1)) < together, whole, single).astype(float)
        found = estimate(dict(enumerate(values)))
        held += found.low <= right <= found.high
    assert held / 400 > 0.92


def test_paired_differences_are_narrower_than_their_parts():
    rng = np.random.default_rng(0)
    first = {k: [float(rng.random() < 0.5)] for k in range(200)}
    second = {k: [max(v[0], float(rng.random() < 0.1))] for k, v in first.items()}
    found = paired_difference(first, second)
    assert 0 < found.low < found.mean < found.high < 0.14
    assert found.high - found.low < 0.1


def test_a_report_holds_figures_plots_and_samples(tmp_path):
    outcomes = run_suite(SUITE, Oracle(SUITE, spoil=lambda s, k, e: change(s, colour="red")), batch=3)
    paths = write_report(tmp_path / "report", SUITE, outcomes, measure(outcomes), {"checkpoint": "none"}, samples=2)
    assert [path.name for path in paths] == ["scores.json", "measurements.jsonl", "report.html", "samples.png"]
    scores = json.loads(paths[0].read_text())
    found = {(s["split"], s["task"], s["metric"], s["turn"]): s for s in scores["scores"]}
    entry = found["test", "tutorial", "step", None]
    assert entry["low"] <= entry["mean"] <= entry["high"] and entry["requests"] == SUITE.count
    assert ("long", "tutorial", "step", 6) in found
    kinds = {(s["split"], s["task"], s["kind"], s["metric"]): s for s in scores["kinds"]}
    assert kinds["test", "tutorial", "paint", "step"]["mean"] == 1 > kinds["test", "tutorial", "add", "step"]["mean"]
    assert {kind for _, task, kind, _ in kinds if task == "style"} <= {"pastel", "outline", "stripes", "night"}
    assert len(paths[1].read_text().splitlines()) == len(measure(outcomes))
    page = paths[2].read_text()
    assert page.count("data:image/png;base64,") > 40 and "http" not in page.replace("http-equiv", "")
    assert "(no step)" not in page and page.count('class="px bad"') > 0 and page.count('class="px ok"') > 0


@pytest.mark.parametrize("split", ["train", "train_long"])
def test_a_report_can_be_made_of_every_split(tmp_path, split):
    suite = WorldSuite(tasks=("tutorial", "style"), splits=(split,), count=2)
    outcomes = run_suite(suite, Oracle(suite))
    page = write_report(tmp_path, suite, outcomes, measure(outcomes), {})[2].read_text()
    assert f"<th>{split}</th>" in page and "By what a step does" in page


def test_a_sheet_shows_what_was_made_over_what_should_be():
    outcomes = run_suite(WorldSuite(tasks=("tutorial",), splits=("long",), count=2), Oracle(SUITE))
    sheet = np.asarray(sample_sheet(outcomes, scale=1))
    assert sheet.shape == (4 * 66, max(len(o.frames) for o in outcomes) * 66, 3)
    np.testing.assert_array_equal(sheet[:64], sheet[66:130])


def test_a_sheet_shows_what_was_given_before_what_was_made():
    outcomes = run_suite(WorldSuite(tasks=("tutorial", "style"), splits=("test",), count=1), Oracle(SUITE))
    sheet = np.asarray(sample_sheet(outcomes, scale=1))
    style = next(number for number, outcome in enumerate(outcomes) if outcome.example.task == "style")
    row = sheet[2 * style * 66 :][:64]
    given = render([scene for _, scene in outcomes[style].example.conditions])
    np.testing.assert_array_equal(row[:, :64], given[0])
    np.testing.assert_array_equal(row[:, 66:130], given[1])
    np.testing.assert_array_equal(row[:, 2 * 66 + 32 :][:, :64], outcomes[style].frames[0])
    assert (sheet[(2 * style + 1) * 66 :][:64, : 2 * 66] == 255).all()  # nothing is given in the row of the truth


def test_scores_are_kept_by_turn_and_together():
    outcomes = run_suite(SUITE, Oracle(SUITE))
    scores = {(s.split, s.task, s.metric, s.turn): s.interval for s in summarise(measure(outcomes))}
    whole, first = scores["long", "tutorial", "step", None], scores["long", "tutorial", "step", 1]
    assert first.count == first.requests == whole.requests == SUITE.count and whole.count >= 5 * SUITE.count
    assert ("test", "tutorial", "plan", 1) not in scores
