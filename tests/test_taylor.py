"""TaylorSeer: which steps run the layers, what the others predict, and that it belongs to the compiled loop."""

import dataclasses
import functools
from math import factorial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loom_jax.generate import Engine, Generator, ImageSettings, Request, extrapolate, is_full, since_full
from loom_jax.generate.taylor import FIRST_FULL, ORDERS, PERIOD, renew
from loom_jax.models import Backend
from loom_jax.nn import dense_attention
from tests import tiny

DRAWING = ImageSettings(num_timesteps=20, cfg_text_scale=3.0, cfg_img_scale=2.0, taylorseer=True)
EDIT = Request((tiny.picture(30, 24), "make it blue"), "edit", seed=3)
TEXT = Request(("a boat",), size=(18, 42), seed=1)


def draw(requests, settings=DRAWING, **options):
    return [r.latents for r in tiny.generator().generate(requests, settings, **options)]


def test_full_evaluations_are_the_originals():
    ks = np.arange(20)
    full = [0, 1, 2, 3, 4, 7, 10, 13, 16, 19]
    assert np.flatnonzero(is_full(ks)).tolist() == full
    assert since_full(ks).tolist() == [int(k - max(f for f in full if f <= k)) for k in ks]


def test_differences_grow_by_one_order_at_each_full_evaluation_after_the_fourth():
    """Against the rule as it is written down, in float64, with lists that hold only what exists."""
    rng, known = np.random.default_rng(0), []
    factors = jnp.zeros((ORDERS + 1, 2, 3, 4))
    last = 0
    for k in (k for k in range(30) if is_full(k)):
        hidden = rng.standard_normal((2, 3, 4))
        new = [hidden]
        if k > 3:
            for i in range(min(ORDERS, len(known))):
                new.append((new[i] - known[i]) / (k - last))
        known, last = new, k
        factors = renew(factors, jnp.asarray(hidden, jnp.float32), jnp.int32(k))
        for i, factor in enumerate(factors):
            expected = known[i] if i < len(known) else np.zeros_like(hidden)
            np.testing.assert_allclose(factor, expected, atol=1e-5, err_msg=f"evaluation {k}, order {i}")
        for x in range(PERIOD):
            expected = sum(f * x**i / factorial(i) for i, f in enumerate(known))
            np.testing.assert_allclose(extrapolate(factors, jnp.float32(x)), expected, atol=1e-5)
    assert len(known) == ORDERS + 1


def test_rows_may_be_at_evaluations_of_their_own():
    rng = np.random.default_rng(1)
    factors, hidden = (rng.standard_normal(s).astype(np.float32) for s in ((ORDERS + 1, 2, 3, 4), (2, 3, 4)))
    both = renew(factors, hidden, jnp.asarray([4, 13])[:, None, None])
    for row, k in enumerate((4, 13)):
        alone = renew(factors[:, row : row + 1], hidden[row : row + 1], jnp.int32(k))
        np.testing.assert_array_equal(both[:, row], alone[:, 0])


@pytest.mark.parametrize("request_", [TEXT, EDIT], ids=["image", "edit"])
def test_predicted_pictures_are_near_and_short_ones_equal(request_):
    """As long as every evaluation is full nothing is predicted."""
    exact = dataclasses.replace(DRAWING, taylorseer=False)
    [predicted], [computed] = draw([request_]), draw([request_], exact)
    assert 1e-4 < np.linalg.norm(predicted - computed) / np.linalg.norm(computed) < 0.3
    few = dataclasses.replace(DRAWING, num_timesteps=FIRST_FULL + 1)
    [predicted], [computed] = draw([request_], few), draw([request_], dataclasses.replace(few, taylorseer=False))
    assert tiny.relative(predicted, computed) < 1e-5


def test_a_request_among_others_gives_what_it_gives_alone():
    together = draw([EDIT, TEXT])
    for request, latents in zip((EDIT, TEXT), together, strict=True):
        assert tiny.relative(latents, draw([request])[0]) < 1e-4


def test_progress_changes_nothing_and_nothing_is_compiled_again():
    [plain] = draw([TEXT])
    before = tiny.engine().compilations()
    heard = []
    [told] = draw([TEXT], on_step=lambda *done: heard.append(done))
    np.testing.assert_array_equal(told, plain)
    later = dataclasses.replace(DRAWING, cfg_interval=(0.2, 0.9), num_timesteps=12)
    assert tiny.relative(draw([TEXT], later)[0], plain) > 1e-3
    assert len(heard) > 5 and tiny.engine().compilations() == before


class WatchedEngine(Engine):
    """Notes how many rows each evaluation of the layers has while a picture is denoised."""

    def __init__(self):
        self.rows = []
        backend = Backend(self.watched_attention)
        super().__init__(tiny.model(), tiny.vae(), tiny.encoder().special, len(tiny.tokenizer()), backend)

    def watched_attention(self, q, k, v, q_layout, k_layout):
        jax.debug.callback(lambda: self.rows.append(q.shape[0]))
        return dense_attention(q, k, v, q_layout, k_layout)

    def denoise(self, *args, **options):
        jax.effects_barrier()
        self.rows.clear()  # of reading the documents
        return super().denoise(*args, **options)


@functools.cache
def watched_engine():
    return WatchedEngine()


def rows_of_evaluations(settings, request):
    """How many rows each evaluation of the layers had, while a picture was made."""
    engine = watched_engine()
    generator = Generator(tiny.CONFIG, engine, tiny.encoder())
    generator.draw([generator.read_request(request)], [None], settings)
    jax.effects_barrier()
    return engine.rows[:: tiny.CONFIG.decoder.num_layers]


def test_branches_run_as_one_batch_where_guidance_acts_and_the_conditional_one_alone_elsewhere():
    settings = dataclasses.replace(DRAWING, taylorseer=False, num_timesteps=8, cfg_interval=(0.5, 0.9))
    rows = rows_of_evaluations(settings, EDIT)
    # Shifted times 1, 0.947, 0.882, 0.8, 0.692, 0.545, 0.333: four of them lie within.
    assert rows == [1, 1, 3, 3, 3, 3, 1]


def test_predicted_steps_run_no_layer():
    rows = rows_of_evaluations(DRAWING, EDIT)  # guided above 0.4: 16 of 19
    assert rows == [3] * 8 + [1]  # full at 0-4, 7, 10, 13; guidance is over at 16
    late = dataclasses.replace(DRAWING, cfg_interval=(0.2, 0.9))
    rows = rows_of_evaluations(late, EDIT)
    assert sorted(set(rows)) == [1, 2, 3]  # the guided branches take full steps of their own
    assert sum(rows) == 9 + 2 * 7  # as recorded of the original: 9 full conditional evaluations, 7 of each other


@pytest.mark.parametrize("taylorseer", [False, True])
def test_denoising_waits_for_no_host(taylorseer):
    """From the first step to the last nothing moves between host and device but what is put there on purpose."""
    engine = tiny.engine()
    settings = dataclasses.replace(DRAWING, num_timesteps=8)
    heard = []

    def denoise(*args, **options):
        with jax.transfer_guard("disallow"):
            for part in Engine.denoise(engine, *args, **options):
                heard.append(part[0])
        yield part

    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed host-to-device"):
        jax.jit(lambda x: x)(np.zeros(3))  # the guard is awake
    generator = Generator(tiny.CONFIG, engine, tiny.encoder())
    source = generator.read_request(EDIT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "denoise", denoise)
        settings = dataclasses.replace(settings, taylorseer=taylorseer)
        generator.draw([source], [None], settings, on_step=lambda *done: None)
    assert heard == list(range(1, 8))
