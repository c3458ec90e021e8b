"""The generator: what a request gives depends on that request alone, and little is ever compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loom_jax.core import InputError
from loom_jax.document import NO_TOKEN
from loom_jax.generate import (
    TASK_SETTINGS,
    Engine,
    Generator,
    ImageSettings,
    Request,
    SeededNoise,
    TextControls,
    TextSettings,
    choose_tokens,
    keep_top_p,
)
from tests import tiny

DRAWING = ImageSettings(num_timesteps=5, cfg_text_scale=3.0, cfg_img_scale=2.0, cfg_interval=(0.3, 1.0))
WRITING = TextSettings(max_new_tokens=9)
REQUESTS = {
    "image": Request(("a boat",), size=(18, 42), seed=1),
    "longer and larger image": Request(("a lake with two boats",), size=(42, 30), seed=2),
    "edit": Request((tiny.picture(30, 24), "make it blue"), "edit", seed=3),
    "edit of two": Request((tiny.picture(40, 24, 1), tiny.picture(20, 50, 2), "join"), "edit", size=(24, 24), seed=4),
    "understand": Request((tiny.picture(30, 24), "what is it"), "understand", seed=5),
    "text alone": Request(("hello there",), "understand", seed=6),
    "think": Request(("a boat",), think=True, size=(24, 24), seed=7),
}


@pytest.fixture(scope="module")
def together():
    """All requests in one call, not in the order of REQUESTS."""
    names = list(REQUESTS)[::-1]
    results = tiny.generator().generate([REQUESTS[name] for name in names], DRAWING, WRITING)
    return dict(zip(names, results, strict=True))


def single(name):
    return tiny.generator().generate([REQUESTS[name]], DRAWING, WRITING)[0]


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_among_others_gives_what_it_gives_alone(together, name):
    """Other lengths, sizes, tasks and numbers of pictures in the batch, and another order, change nothing."""
    alone, among = single(name), together[name]
    assert among.request is REQUESTS[name]
    assert (among.text, among.thought, among.finished) == (alone.text, alone.thought, alone.finished)
    assert (among.latents is None) == (alone.latents is None)
    if alone.latents is not None:
        assert tiny.relative(among.latents, alone.latents) < 1e-4
        difference = np.abs(np.asarray(among.image, int) - np.asarray(alone.image, int))
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_results_have_what_the_task_asks_for(together):
    for name, result in together.items():
        draws = result.request.task != "understand"
        assert (result.image is not None) == draws and (result.text is not None) == (not draws), name
        assert (result.thought is not None) == result.request.think
    assert together["image"].image.size == (42, 18)  # Pillow says width first
    assert together["edit"].image.size == (24, 30)  # that of its picture
    assert together["edit of two"].image.size == (24, 24)


def test_a_text_that_is_cut_off_is_not_finished(together):
    assert not together["understand"].finished and not together["think"].finished and together["image"].finished


def test_the_same_seed_gives_the_same_picture_and_another_seed_another(together):
    again = single("image")
    np.testing.assert_array_equal(again.latents, single("image").latents)
    other = dataclasses.replace(REQUESTS["image"], seed=99)
    [result] = tiny.generator().generate([other], DRAWING)
    assert tiny.relative(result.latents, again.latents) > 0.1


def compilations_of(call):
    """What `call()` compiled anew."""
    before = tiny.engine().compilations()
    call()
    after = tiny.engine().compilations()
    return {name: after[name] - before[name] for name in after if after[name] != before[name]}


VARIATIONS = {
    "once more": {},
    "another prompt length": {"items": ("the house by the sea",)},
    "another seed": {"seed": 5},
    "another size of the same bucket": {"size": (18, 36)},
}


@pytest.mark.parametrize("change", VARIATIONS)
def test_a_second_picture_compiles_nothing(change):
    single("image")
    request = dataclasses.replace(REQUESTS["image"], **VARIATIONS[change])
    assert compilations_of(lambda: tiny.generator().generate([request], DRAWING)) == {}


@pytest.mark.parametrize(
    "change",
    [
        {"num_timesteps": 9},
        {"timestep_shift": 1.5},
        {"cfg_text_scale": 7.0, "cfg_img_scale": 1.0},
        {"cfg_interval": (0.0, 0.7)},
        {"cfg_renorm_min": 1.0},
    ],
)
def test_other_settings_compile_nothing_and_change_the_picture(change):
    plain, other = single("edit"), dataclasses.replace(DRAWING, **change)
    if "cfg_img_scale" in change:  # without image guidance a branch is left out: compiled once
        tiny.generator().generate([REQUESTS["edit"]], dataclasses.replace(DRAWING, cfg_img_scale=1.0))
    made = []
    assert compilations_of(lambda: made.extend(tiny.generator().generate([REQUESTS["edit"]], other))) == {}
    assert tiny.relative(made[0].latents, plain.latents) > 1e-3


def test_guidance_starts_from_the_picture_without_it():
    """Scales just above 1 hardly change the unguided picture, whose text and pictures were all read."""
    unguided, faint = (
        tiny.generator().generate([REQUESTS["edit"]], dataclasses.replace(DRAWING, cfg_text_scale=a, cfg_img_scale=b))
        for a, b in ((1.0, 2.0), (1 + 1e-4, 1 + 1e-4))
    )
    assert tiny.relative(faint[0].latents, unguided[0].latents) < 3e-3
    assert tiny.relative(single("edit").latents, unguided[0].latents) > 0.1


def test_other_text_settings_compile_nothing():
    single("text alone")
    for change in ({"max_new_tokens": 5}, {"temperature": 0.7}, {"temperature": 0.9, "top_p": 0.5}):
        text = dataclasses.replace(WRITING, **change)
        assert compilations_of(lambda t=text: tiny.generator().generate([REQUESTS["text alone"]], DRAWING, t)) == {}


def test_progress_is_told_and_changes_nothing():
    heard = []
    plain = single("image")

    def draw():
        heard.clear()
        [result] = tiny.generator().generate(
            [REQUESTS["image"]], dataclasses.replace(DRAWING, num_timesteps=24), on_step=lambda *a: heard.append(a)
        )
        return result

    assert compilations_of(draw) == {}
    assert [of for _, of in heard] == [23] * len(heard) and heard[-1] == (23, 23)
    done = [d for d, _ in heard]
    assert done == sorted(set(done)) and 8 <= len(done) <= 12
    [silent] = tiny.generator().generate([REQUESTS["image"]], dataclasses.replace(DRAWING, num_timesteps=24))
    np.testing.assert_array_equal(draw().latents, silent.latents)
    assert tiny.relative(silent.latents, plain.latents) > 1e-3


def test_sampled_text_depends_on_the_seed_and_not_on_batch_mates():
    sampled = TextSettings(max_new_tokens=9, temperature=1.0, top_p=0.95)
    names = ("understand", "text alone")
    both = tiny.generator().generate([REQUESTS[n] for n in names], DRAWING, sampled)
    for name, result in zip(names, both, strict=True):
        assert tiny.generator().generate([REQUESTS[name]], DRAWING, sampled)[0].text == result.text
    twice = [dataclasses.replace(REQUESTS["text alone"], seed=s) for s in (1, 2)]
    assert len({r.text for r in tiny.generator().generate(twice, DRAWING, sampled)}) == 2


def test_every_purpose_uses_a_key_of_its_own():
    """Under jax_debug_key_reuse, which fails where a key is used twice in a compiled call."""
    with jax.debug_key_reuse(True):
        with pytest.raises(jax.errors.KeyReuseError):  # the check is awake
            jax.jit(lambda key: jax.random.normal(key) + jax.random.normal(key))(jax.random.key(0))
        fresh = Engine(tiny.model(), tiny.vae(), tiny.encoder().special, len(tiny.tokenizer()))
        made = Generator(tiny.CONFIG, fresh, tiny.encoder())
        sampled = TextSettings(max_new_tokens=4, temperature=0.8, top_p=0.9)
        results = made.generate([REQUESTS["edit"], REQUESTS["text alone"]], DRAWING, sampled)
    assert results[0].image is not None and results[1].text


def test_draws_of_pictures_and_of_purposes_differ():
    noise = SeededNoise()
    first, second = (noise.posterior(3, n, (2, 3), 5) for n in (0, 1))
    assert first.shape == (2, 3, 5) and np.abs(first - second).min() > 0
    assert np.abs(first.reshape(6, 5) - noise.initial(3, 0, 6, 5)).min() > 0
    np.testing.assert_array_equal(noise.initial(3, 0, 40, 5)[:6], noise.initial(3, 0, 6, 5))  # whatever the bucket
    many = noise.initial(0, 0, 4000, 5)
    assert abs(many.mean()) < 0.03 and abs(many.std() - 1) < 0.03


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 1000), top_p=st.floats(0.01, 1.0))
def test_top_p_keeps_the_fewest_most_likely_tokens(seed, top_p):
    logits = 3 * np.random.default_rng(seed).standard_normal((2, 7)).astype(np.float32)
    kept = np.isfinite(keep_top_p(logits, top_p))
    for row, keep in zip(logits.astype(np.float64), kept, strict=True):
        p = np.exp(row) / np.exp(row).sum()
        assert p[keep].sum() >= top_p - 1e-6
        assert p[keep].sum() - p[keep].min() < top_p + 1e-6
        assert not (~keep).any() or p[keep].min() > p[~keep].max()


def test_sampling_is_greedy_at_temperature_zero_and_at_a_tiny_top_p():
    logits = np.random.default_rng(0).standard_normal((64, 30)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 64)

    def chosen(temperature, top_p, step=0):
        controls = TextControls(jnp.float32(temperature), jnp.float32(top_p))
        return np.asarray(choose_tokens(logits, keys, jnp.int32(step), controls))

    best = logits.argmax(-1)
    np.testing.assert_array_equal(chosen(0.0, 1.0), best)
    np.testing.assert_array_equal(chosen(2.0, 1e-6), best)
    np.testing.assert_array_equal(chosen(1e-6, 1.0), best)
    assert (chosen(2.0, 1.0) != best).mean() > 0.3
    assert (chosen(2.0, 1.0, step=1) != chosen(2.0, 1.0, step=0)).mean() > 0.3


def test_sampling_follows_the_probabilities():
    p = np.asarray([0.5, 0.3, 0.15, 0.05])
    logits = np.broadcast_to(np.log(p).astype(np.float32), (8000, 4))
    keys = jax.random.split(jax.random.key(1), 8000)
    for top_p, expected in ((1.0, p), (0.7, np.asarray([0.625, 0.375, 0, 0]))):
        tokens = choose_tokens(logits, keys, jnp.int32(0), TextControls(jnp.float32(1), jnp.float32(top_p)))
        np.testing.assert_allclose(np.bincount(tokens, minlength=4) / 8000, expected, atol=0.02)


BAD_REQUESTS = {
    "nothing": ((), {}, "no prompt"),
    "empty prompt": (("  \n",), {}, "prompt is empty"),
    "one empty text": (("a boat", ""), {}, "prompt is empty"),
    "picture without text": ((tiny.picture(20, 20),), {"task": "edit"}, "no prompt"),
    "edit without picture": (("a boat",), {"task": "edit"}, "needs at least one picture"),
    "image with picture": (("a boat", tiny.picture(20, 20)), {}, "use task 'edit'"),
    "height": (("a boat",), {"size": (20, 18)}, "20 x 18 .* positive multiples of 6"),
    "width": (("a boat",), {"size": (18, 20)}, "18 x 20 .* positive multiples of 6"),
    "zero": (("a boat",), {"size": (0, 18)}, "positive multiples of 6"),
    "negative": (("a boat",), {"size": (-6, 18)}, "positive multiples of 6"),
    "too large": (("a boat",), {"size": (18, 48)}, "at most 42 pixels a side"),
    "negative seed": (("a boat",), {"seed": -1}, "at least 0 and below"),
    "large seed": (("a boat",), {"seed": 2**32}, "at least 0 and below"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_is_one_clear_line_and_nothing_is_generated(case):
    items, options, message = BAD_REQUESTS[case]
    good = REQUESTS["image"]
    heard = []
    with pytest.raises(InputError, match=message) as caught:
        tiny.generator().generate([good, Request(items, **options)], DRAWING, on_step=lambda *a: heard.append(a))
    assert "\n" not in str(caught.value) and not heard


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageSettings(num_timesteps=1), "num_timesteps=1"),
        (lambda: ImageSettings(timestep_shift=0.0), "timestep_shift=0.0"),
        (lambda: ImageSettings(cfg_interval=(0.9, 0.4)), "cfg_interval"),
        (lambda: ImageSettings(cfg_renorm_type="local"), "'local': must be one of global, channel, text_channel"),
        (lambda: TextSettings(max_new_tokens=0), "max_new_tokens=0"),
        (lambda: TextSettings(temperature=-0.1), "temperature=-0.1"),
        (lambda: TextSettings(top_p=0.0), "top_p=0.0"),
        (lambda: TextSettings(top_p=1.5), "top_p=1.5"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_no_request_gives_no_result():
    assert tiny.generator().generate([]) == []


def test_every_task_has_settings():
    assert set(TASK_SETTINGS) == {"image", "edit", "understand"}


def test_texts_end_where_their_tokens_end():
    """The decoded text holds neither marks nor filler."""
    [(text, finished)] = tiny.generator().answer([tiny.generator().read_request(REQUESTS["text alone"])], WRITING)
    ids = tiny.tokenizer().encode(text)
    assert not finished and NO_TOKEN not in ids and tiny.encoder().special.bos not in ids
