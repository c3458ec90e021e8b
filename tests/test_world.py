"""The tutorial world: what is drawn, that it is the same each time, that training never shows what is held out."""

import dataclasses
import itertools

import numpy as np
import pytest

from loom_jax.core import ConfigError, InputError
from loom_jax.data import RECIPES, make_pipeline, open_source
from loom_jax.data.world import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_SPLITS,
    PLACES,
    SHAPES,
    SIDE,
    SIZES,
    SPLITS,
    TASKS,
    Add,
    Move,
    Paint,
    Recolour,
    Remove,
    Scene,
    Thing,
    WorldRows,
    apply,
    build_tokenizer,
    draw_example,
    encode_png,
    follow,
    read_step,
    render,
    touched,
    vocabulary,
    word_step,
)
from loom_jax.document import (
    LOOM_TOKENS,
    Encoder,
    ImageTransform,
    Picture,
    Text,
    Tokenizer,
    parse_steps,
    plan_prompt,
)
from tests.data import TABLES, data_config

STAR = Thing("large", "blue", "star", "top left")
DISC = Thing("small", "red", "circle", "lower right")
ROOMY = {"und": 1024, "gen": 448, "vit": 960}
CANVAS = [{"height": 64, "width": 64, "count": 24}]
BOTH = Scene("meadow", frozenset({STAR, DISC}))


def examples(split, count=40):
    return [draw_example(task, split, 0, index) for task in TASKS for index in range(count)]


def test_steps_change_a_scene():
    red = dataclasses.replace(STAR, colour="red")
    assert follow([Paint("meadow"), Add(STAR), Add(DISC)])[-1] == BOTH
    assert apply(BOTH, Recolour(STAR, "red")).things == {red, DISC}
    assert apply(BOTH, Move(DISC, "top right")).at("top right") == dataclasses.replace(DISC, place="top right")
    assert apply(BOTH, Remove(STAR)) == Scene("meadow", frozenset({DISC}))
    assert touched(Move(DISC, "top right")) == {"lower right", "top right"} and touched(Paint("sea")) == set()
    assert [scene.things for scene in follow([Add(STAR), Add(DISC)], elements=True)] == [{STAR}, {DISC}]


def test_steps_that_cannot_be_done_say_so():
    with pytest.raises(InputError, match="taken"):
        apply(BOTH, Move(DISC, "top left"))
    with pytest.raises(InputError, match="no such thing"):
        apply(Scene(), Remove(STAR))


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (Paint("meadow"), "paint the meadow"),
        (Add(DISC), "draw a small red circle at the lower right"),
        (Recolour(STAR, "green"), "make the large blue star at the top left green"),
        (Move(DISC, "bottom far left"), "move the small red circle from the lower right to the bottom far left"),
        (Remove(STAR), "erase the large blue star at the top left"),
    ],
)
def test_steps_are_worded_and_read_back(step, text):
    assert word_step(step) == text and read_step(f" {text}.") == step


def test_steps_are_read_with_synonyms_and_nothing_else():
    assert read_step("draw a tiny red disc at the lower right") == Add(DISC)
    assert read_step("the small red circle at the lower right") == Add(DISC)
    with pytest.raises(InputError, match="no step"):
        read_step("draw a small red dog at the lower right")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_examples_hold_together(task, split):
    for index in range(60):
        example = draw_example(task, split, 3, index)
        assert example == draw_example(task, split, 3, index) != draw_example(task, split, 4, index)
        assert [read_step(text) for text in example.plan] == list(example.steps)
        for token, _ in example.conditions:
            assert token is None or token in example.instruction
        if example.steps:
            assert tuple(follow(example.steps, task == "decomposition")) == example.frames
            assert (5 if split == "long" else 2) <= len(example.steps) <= 6
        else:
            assert len(example.frames) == 1
        if example.base is not None:
            assert example.base.things <= example.frames[0].things
        for scene in example.scenes:
            assert len({thing.place for thing in scene.things}) == len(scene.things)


@pytest.mark.parametrize("split", SPLITS[:2])
def test_a_plan_follows_the_rule(split):
    for index in range(80):
        first, *rest = draw_example("tutorial", split, 0, index).steps
        assert isinstance(first, Paint)
        adds = [step.thing for step in rest if isinstance(step, Add)]
        assert adds == sorted(adds, key=lambda thing: (SIZES.index(thing.size), PLACES.index(thing.place)))
        assert all(isinstance(step, Add) for step in rest[: len(adds)])


def test_every_kind_of_step_occurs():
    steps = [step for index in range(200) for step in draw_example("tutorial", "train", 0, index).steps]
    assert {type(step) for step in steps} == {Paint, Add, Recolour, Move, Remove}


def test_an_instruction_leaves_the_order_to_the_plan():
    told = [draw_example("tutorial", "long", 0, index) for index in range(40)]
    orders = []
    for example in told:
        adds = [step.thing for step in example.steps if isinstance(step, Add)]
        spots = [example.instruction.find(f" {thing.colour} ") for thing in adds]
        orders.append(spots == sorted(spots))
    assert 0 < sum(orders) < len(orders) / 2


@pytest.mark.parametrize("split", ["train", "train_long"])
def test_training_never_shows_what_is_held_out(split):
    seen = {thing for example in examples(split, 150) for scene in example.scenes for thing in scene.things}
    assert not any(thing.held_out for thing in seen)
    pairs = [("colour", "shape"), ("colour", "place"), ("shape", "place")]
    for first, second in pairs:
        shown = {(getattr(thing, first), getattr(thing, second)) for thing in seen}
        sizes = {"colour": len(COLOURS), "shape": len(SHAPES), "place": len(PLACES)}
        assert len(shown) == sizes[first] * sizes[second], f"not every {first} was seen with every {second}"


@pytest.mark.parametrize("split", HELD_OUT_SPLITS)
def test_tests_always_show_something_held_out(split):
    for example in examples(split, 30):
        assert any(thing.held_out for scene in example.frames for thing in scene.things)


def test_a_sixth_of_all_combinations_is_held_out():
    every = [Thing("large", *parts) for parts in itertools.product(COLOURS, SHAPES, PLACES)]
    assert sum(thing.held_out for thing in every) * 6 == len(every)


def test_long_sequences_are_half_as_long_again():
    longest = {
        (task, split): max(len(draw_example(task, split, 0, index).steps) for index in range(80))
        for task in ("tutorial", "image_tutorial")
        for split in SPLITS
    }
    for task in ("tutorial", "image_tutorial"):
        assert longest[task, "train"] == longest[task, "test"] == 4
        assert longest[task, "long"] == longest[task, "train_long"] == 6


def test_pictures_show_scenes():
    meadow, both, striped = render([Scene("meadow"), BOTH, dataclasses.replace(BOTH, style="stripes")])
    assert both.shape == (SIDE, SIDE, 3) and both.dtype == np.uint8
    assert (both[40, 40] == [214, 40, 46]).all() and (both[8, 24] == [40, 88, 212]).all()
    assert (both[48:] == meadow[48:]).all() and (both != striped).any()
    np.testing.assert_array_equal(both, render([BOTH])[0])


def test_backgrounds_and_things_stand_out_from_each_other():
    grounds = render([Scene(name) for name in BACKGROUNDS]).astype(float)
    for first, second in itertools.combinations(grounds, 2):
        assert np.abs(first - second).mean() > 10
    for name, (size, colour, shape) in itertools.product(BACKGROUNDS, itertools.product(SIZES, COLOURS, SHAPES)):
        with_thing = render([Scene(name, frozenset({Thing(size, colour, shape, "top left")}))])[0].astype(float)
        difference = np.abs(with_thing - grounds[BACKGROUNDS.index(name)]).max(-1)
        assert (difference > 60).sum() > 25, f"a {size} {colour} {shape} is hard to see on {name}"


def texts_of(example):
    prompts = [plan_prompt("tutorial", example.instruction, None), plan_prompt("decompose", example.instruction, 3)]
    return [*prompts, example.instruction, *example.plan]


def test_every_word_is_one_token():
    tokenizer = build_tokenizer()
    words = len(vocabulary())
    loom = {tokenizer.token_id(token) for token in LOOM_TOKENS}
    for split in SPLITS:
        for example in examples(split, 60):
            for text in texts_of(example):
                ids = tokenizer.encode(text)
                assert tokenizer.decode(ids) == text
                spelled = [tokenizer.decode([i]) for i in ids if i >= words and i not in loom]
                assert not spelled, f"{spelled} of {text!r} is no word of the vocabulary"


def test_the_tokenizer_is_small_saved_and_takes_other_words(tmp_path):
    tokenizer = build_tokenizer()
    assert len(tokenizer) < 640
    assert len(tokenizer.encode("draw a large blue star at the top left")) == 9
    tokenizer.save(tmp_path)
    read = Tokenizer.from_folder(tmp_path)
    for text in ("Draw a zebra, naïvely: <style>\n", "paint the meadow"):
        assert read.encode(text) == tokenizer.encode(text) and read.decode(read.encode(text)) == text


def test_rows_have_pictures_and_texts():
    row = WorldRows("image_tutorial")[7]
    assert len(row["image_list"]) == len(parse_steps(row["instruction_list"][1])) and len(row["condition_list"]) == 1
    row = WorldRows("style", "test")[7]
    assert sorted(row["entity_list"]) == ["<original_image>", "<style>"] and len(row["image_list"]) == 3
    assert WorldRows("tutorial", seed=1)[0] == WorldRows("tutorial", seed=1)[0] != WorldRows("tutorial")[0]
    example, edits, captioned = (draw_example("tutorial", "train", 0, 7), WorldRows("edit")[7], WorldRows("t2i")[7])
    frames = [encode_png(picture, compress_level=0) for picture in render([Scene(), *example.frames])]
    assert edits == {"image_list": frames, "instruction_list": [[step] for step in example.plan]}
    assert captioned["image"] == frames[-1] and example.instruction in captioned["captions"]
    with pytest.raises(ConfigError, match="no rows for recipe 'vlm'"):
        WorldRows("vlm")


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="unknown task 'song'"):
        draw_example("song", "train", 0, 0)
    with pytest.raises(InputError, match="unknown split 'dev'"):
        draw_example("tutorial", "dev", 0, 0)


@pytest.mark.parametrize("recipe", [*TASKS, "t2i", "edit", "tutorial_frames", "image_tutorial_plan"])
@pytest.mark.parametrize("split", [(), ("long",)])
def test_rows_suit_their_recipe(recipe, split):
    source = open_source("world", split, recipe=recipe)
    for index in range(12):
        row = source[index]
        segments = RECIPES[recipe].build(row, np.random.default_rng(index))
        pictures = [segment for segment in segments if isinstance(segment, Picture)]
        given = len(row.get("condition_list", row.get("entity_list", ())))
        assert [p.role for p in pictures[: 2 * given]] == ["clean", "vit"] * given
        assert (pictures[-1].role == "noisy") == (not recipe.endswith("_plan"))
        learned = [segment.text for segment in segments if isinstance(segment, Text) and segment.loss]
        planned = recipe in ("tutorial", "image_tutorial", "decomposition", "image_tutorial_plan")
        assert learned == (row["instruction_list"][1:] if planned else [])
    with pytest.raises(ConfigError, match="expected none, or one of train"):
        open_source("world", ("dev",), recipe=recipe)


def test_documents_of_the_world_are_packed():
    config = data_config(
        mixture=[{"name": task, "source": "world", "recipe": task} for task in TASKS], budget=ROOMY, canvases=CANVAS
    )
    encoder = Encoder(build_tokenizer(), 16, 8, ImageTransform(64, 64, 16), ImageTransform(64, 64, 8))
    batches = make_pipeline(config, encoder, TABLES)
    next(batches)
    assert batches.stats["documents"] >= 4 and batches.stats["bad_rows"] == 0
    batches.close()
