"""Which segments a row becomes, what is learned, what may be dropped, and which rows are refused for which reason."""

import io
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from loom_jax.converters.parity.rows import Scripted
from loom_jax.data import RECIPES, BadRow, DropoutConfig, RowCounts, composition, edit, open_source, t2i, tutorial, vlm
from loom_jax.data.reader import drop_conditions
from loom_jax.document import HistoryPolicy, ImageTokens, Method, Text, TextTokens, parse_steps, plan_prompt
from tests.reference import golden_json

RNG = np.random.default_rng


def png(shade):
    file = io.BytesIO()
    Image.new("RGB", (20, 12), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def outline(segments):
    """Returns segments as text or (role, shade), with * for what is learned and ? for what may be dropped."""
    out = []
    for s in segments:
        learned = s.loss if isinstance(s, Text) else s.role == "noisy"
        name = s.text if isinstance(s, Text) else f"{s.role} {s.image.getpixel((0, 0))[0]}"
        out.append(name + "*" * learned + "?" * s.droppable)
    return out


EDIT = {"image_list": [png(k) for k in range(4)], "instruction_list": [["to 1.", "get 1"], ["to 2"], ["to 3."]]}


def test_t2i_draws_a_caption():
    row = {"image": png(3), "captions": json.dumps({"short": "boat", "long": "a boat"})}
    assert outline(t2i(row, Scripted(1))) == ["a boat?", "noisy 3*"]
    assert outline(t2i({**row, "captions": "{}"}, RNG(0))) == [" ?", "noisy 3*"]


def test_edit_step_by_step_shows_what_was_made_before():
    expected = ["clean 1?", "vit 1?", "to 2?", "noisy 2*", "clean 2?", "vit 2?", "to 3.?", "noisy 3*"]
    assert outline(edit(EDIT, Scripted(1, 3, 0.7, 0, 0))) == expected


def test_edit_in_one_go_uses_every_instruction():
    assert outline(edit(EDIT, Scripted(0, 2, 0.2, 1, 0)))[2:] == ["get 1. to 2.?", "noisy 2*"]
    assert outline(edit(EDIT, Scripted(1, 3, 0.2, 0, 0)))[2:] == ["to 2. to 3.?", "noisy 3*"]


def test_edit_as_published_leaves_out_the_last_step_and_doubles_full_stops():
    assert outline(edit(EDIT, Scripted(1, 3, 0.2, 0), original=True))[2:] == ["to 2.?", "noisy 2*"]
    assert outline(edit(EDIT, Scripted(0, 2, 0.2, 0, 0), original=True))[2:] == ["to 1.. to 2.?", "noisy 2*"]


def test_edit_reaches_at_most_three_images_on():
    spans = {(o[0], o[-1]) for o in (outline(edit(EDIT, RNG(seed))) for seed in range(60))}
    assert spans == {(f"clean {a}?", f"noisy {b}*") for a in range(3) for b in range(a + 1, min(a + 3, 4))}


def test_vlm_puts_images_where_the_question_says():
    said = [("human", " <image>look <image>"), ("gpt", "ok"), ("human", "why?"), ("gpt", "so")]
    row = {"images": [png(1), png(2)], "conversations": [{"from": who, "value": text} for who, text in said]}
    assert outline(vlm(row, RNG(0))) == ["vit 1", "look", "vit 2", "ok*", "why?", "so*"]


TUTORIAL = {
    "image_list": [png(k) for k in range(1, 5)],
    "instruction_list": ["rice", "Step1: a, Step2: b, Step3: c, Step4: d"],
}


def test_tutorial_plans_first_and_shows_earlier_frames():
    plan = TUTORIAL["instruction_list"][1]
    seen = {tuple(outline(tutorial(TUTORIAL, RNG(seed)))) for seed in range(80)}
    prompts = {f"{plan_prompt('tutorial', 'rice', count)}?" for count in (None, 4)}
    assert {o[0] for o in seen} == prompts and {o[1] for o in seen} == {plan + "*"}
    whole = next(o for o in seen if o[-1] == "noisy 4*" and len(o) == 5)
    assert whole[2:] == ("<|turn_4|>", "d?", "noisy 4*")
    longest = max(seen, key=len)
    assert len(longest) == 2 + 4 * 3 + 3 * 2
    assert longest[2:7] == ("<|turn_1|>", "a?", "noisy 1*", "clean 1?", "vit 1?")
    given = outline(RECIPES["tutorial_frames"].build(TUTORIAL, RNG(0)))
    assert given[1] == plan + "?" and given[-1].startswith("noisy")


def test_a_plan_alone_ends_the_document_and_keeps_its_prompt():
    plan = TUTORIAL["instruction_list"][1]
    recipe = RECIPES["tutorial_plan"]
    prompts = {f"{plan_prompt('tutorial', 'rice', count)}?" for count in (None, 4)}
    assert {tuple(outline(recipe.build(TUTORIAL, RNG(seed)))) for seed in range(20)} == {
        (p, plan + "*") for p in prompts
    }
    assert (recipe.dropout.text, recipe.dropout.clean, recipe.dropout.vit) == (0, 0, 0)
    assert outline(RECIPES["image_tutorial_plan"].build(TUTORIAL, RNG(0)))[:2] == ["clean 4?", "vit 4?"]
    assert outline(RECIPES["image_tutorial_plan"].build(TUTORIAL, RNG(0)))[3:] == [plan + "*"]
    with pytest.raises(BadRow, match="nothing to learn"):
        recipe.build(TUTORIAL, RNG(0), method=Method(planning=False))


def test_what_the_method_leaves_out_is_not_in_the_document():
    def made(recipe, row, **options):
        return outline(RECIPES[recipe].build(row, RNG(3), **options))

    whole = made("tutorial", TUTORIAL)
    turns = [o for o in whole if o.startswith("<|turn")]
    assert turns and made("tutorial", TUTORIAL, method=Method(time_tokens=False)) == [
        o for o in whole if o not in turns
    ]
    unplanned = made("tutorial", TUTORIAL, method=Method(planning=False))
    assert unplanned[0] == f"{plan_prompt('tutorial', 'rice', 4)}?"
    assert not any(o.startswith(("Step", "a?", "b?", "c?", "d?")) for o in unplanned)
    row = {"image_list": [png(k) for k in (1, 2)], "instruction_list": ["<style> please"]}
    assert made("style", row, method=Method(entity_tokens=False)) == made("style", row)[1:]
    last = [made("tutorial", TUTORIAL, history=HistoryPolicy("none", 0)) for _ in range(3)]
    assert all(sum(o.startswith("noisy") for o in document) == 1 for document in last)


@pytest.mark.parametrize("name", ["tutorial", "image_tutorial"])
def test_frames_beyond_the_first_so_many_are_neither_shown_nor_learned(name):
    def turns(document):
        return [(a, b) for a, b in itertools.pairwise(document) if a.startswith("<|turn_")]

    build, shown = RECIPES[name].build, set()
    for seed in range(20):
        whole, fewer = (outline(build(TUTORIAL, RNG(seed), max_frames=most)) for most in (None, 2))
        assert whole[: whole.index(turns(whole)[0][0])] == fewer[: fewer.index(turns(fewer)[0][0])]
        shown |= set(turns(fewer))
    assert shown == {("<|turn_1|>", "a?"), ("<|turn_2|>", "b?")}


def test_a_tutorial_from_an_image_is_given_its_last_frame_or_what_the_row_gives():
    build = RECIPES["image_tutorial"].build
    assert outline(build(TUTORIAL, RNG(0)))[:2] == ["clean 4?", "vit 4?"]
    row = {**TUTORIAL, "condition_list": [png(9)]}
    assert outline(build(row, RNG(0)))[:2] == ["clean 9?", "vit 9?"] == outline(tutorial(row, RNG(0)))[:2]


def test_a_decomposition_lists_elements_and_shows_each_alone():
    row = {"image_list": [png(k) for k in (9, 1, 2)], "instruction_list": ["apart", "1. cup\n2. spoon"]}
    for seed in range(8):
        made = outline(RECIPES["decomposition"].build(row, RNG(seed)))
        assert made[:2] == ["clean 9?", "vit 9?"] and made[2].startswith("Take the picture apart")
        assert made[3] == "1. cup\n2. spoon*" and made[4:] in (
            ["<|turn_1|>", "cup?", "noisy 1*"],
            ["<|turn_2|>", "spoon?", "noisy 2*"],
        )


def test_composition_names_the_role_of_each_image():
    row = {"image_list": [png(k) for k in (1, 2, 3)], "instruction_list": ["<style> of <object> on <image 1>"]}
    expected = [
        "<style>",
        "clean 1?",
        "vit 1?",
        "<object>",
        "clean 2?",
        "vit 2?",
        "<style> of <object> on <image 1>?",
        "noisy 3*",
    ]
    assert outline(composition(row, RNG(0))) == expected
    assert outline(RECIPES["style"].build({**row, "entity_list": ["<upper>", None]}, RNG(0)))[::3] == [
        "<upper>",
        "clean 2?",
        "noisy 3*",
    ]
    row["instruction_list"] = ["join them"]
    assert [o for o in outline(composition(row, RNG(0))) if o.startswith("<")] == ["<image 1>", "<image 2>"]


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_synthetic_rows_suit_their_recipe(recipe):
    source = open_source("synthetic", recipe=recipe)
    for index in range(12):
        assert len(RECIPES[recipe].build(source[index], RNG(index))) >= 2


PLAN = "Step1: a, Step2: b"
SEVEN = ", ".join(f"Step{k}: go on" for k in range(1, 8))


@pytest.mark.parametrize(
    ("recipe", "row", "reason"),
    [
        ("t2i", {"image": png(1)}, "missing column captions"),
        ("t2i", {"image": png(1)[:50], "captions": "{}"}, "undecodable image"),
        ("t2i", {"image": None, "captions": "{}"}, "missing column image"),
        ("t2i", {"image": png(1), "captions": "boat"}, "captions are no JSON object"),
        ("t2i", {"image": png(1), "captions": '{"a": ""}'}, "empty text"),
        ("edit", {**EDIT, "image_list": EDIT["image_list"][:1]}, "instruction and image counts differ"),
        ("edit", {**EDIT, "instruction_list": [[" "]] * 3}, "empty text"),
        ("edit", {**EDIT, "image_list": "x"}, "column image_list of the wrong type"),
        ("vlm", {"conversations": [{"from": "human", "value": "hm"}]}, "nothing to learn"),
        (
            "vlm",
            {"conversations": [{"from": "human", "value": "<image>"}]},
            "<image> marks and images differ in number",
        ),
        ("vlm", {"conversations": ["hm"]}, "conversation turn of unknown form"),
        ("vlm", {"video": "a.mp4", "conversations": []}, "video rows are not supported"),
        ("tutorial", {"image_list": [png(1)], "instruction_list": ["x", PLAN]}, "plan and image counts differ"),
        ("tutorial", {"image_list": [png(1)] * 2, "instruction_list": ["", PLAN]}, "empty text"),
        ("tutorial", {"image_list": [png(1)] * 7, "instruction_list": ["x", SEVEN]}, "more frames than time tokens"),
        ("composition", {"image_list": [png(1)], "instruction_list": ["x"]}, "no condition image"),
        ("composition", {"image_list": [png(1)] * 2, "instruction_list": ["<hat>"]}, "unknown entity token"),
        (
            "style",
            {"image_list": [png(1)] * 2, "instruction_list": ["x"], "entity_list": ["<hat>"]},
            "unknown entity token",
        ),
    ],
)
def test_bad_rows_say_why(recipe, row, reason):
    with pytest.raises(BadRow) as fault:
        RECIPES[recipe].build(row, RNG(1))
    assert fault.value.reason == reason


def test_plans_are_read_in_many_spellings():
    steps = ["cut 1.5 cups", "boil, then wait 3: minutes", "eat"]
    for text in (
        "Step1: {}, Step2: {}, Step3: {}",
        "Step 1: {}\nStep 2: {}\nStep 3: {}\n",
        "first\n1. {}\n2) {}\n3. {}",
        "step1. {};step 2. {}; STEP3: {}",
        "1. {}, 2. {}, 3. {}",
    ):
        assert parse_steps(text.format(*steps)) == steps
    assert parse_steps("Step1: a, Step2: as in Step 1: b") == ["a", "as in Step 1: b"]
    assert parse_steps("no steps") == parse_steps("") == []


def test_plans_as_the_published_training_read_them():
    for case in golden_json("loom")["parse_steps"]:
        assert parse_steps(case["text"], original=True) == case["train"]


def conditions():
    return [TextTokens([1], droppable=True), TextTokens([2])] + [
        ImageTokens(role, (1, 1), droppable=role != "noisy") for role in ("clean", "vit", "noisy")
    ]


def dropped(dropout, draws=4000):
    rng = RNG(5)
    return np.asarray([[s.dropped for s in drop_conditions(conditions(), dropout, rng)] for _ in range(draws)])


def test_each_kind_is_dropped_with_its_own_probability():
    share = dropped(DropoutConfig(text=0.1, clean=0.3, vit=0.6)).mean(0)
    np.testing.assert_allclose(share, [0.1, 0, 0.3, 0.6, 0], atol=0.03)


def test_together_drops_all_images_or_none():
    drops = dropped(DropoutConfig(text=0.2, clean=0.4, together=True))
    assert (drops[:, 2] == drops[:, 3]).all() and not drops[:, [1, 4]].any()
    np.testing.assert_allclose(drops.mean(0)[[0, 2]], [0.2, 0.4], atol=0.03)


def test_bad_rows_are_logged_once_a_reason(caplog):
    counts = RowCounts(max_bad_share=0.9, min_rows=5)
    for k in range(4):
        counts.add(BadRow("empty text", f"row {k}"))
    counts.add(None)
    assert len(caplog.records) == 1 and counts.summary() == "empty text (4)" and counts.rows == 5
