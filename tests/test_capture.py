"""Looking into chosen layers: what is captured is what the layers computed, and nothing is computed unasked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loom_jax.core import ConfigError, InputError
from loom_jax.document import NOISE, may_attend
from loom_jax.generate import ImageSettings, Request, observe
from loom_jax.models import Capture, Past
from loom_jax.models.mot import concatenate_layouts
from loom_jax.nn import blockwise_attention
from tests import tiny

BOTH = Capture(hidden=(1, 0), attention=(1,))


@functools.cache
def drawn():
    return tiny.draw([tiny.DOCUMENTS, tiny.DOCUMENTS[1:]])


def run(capture=None, **options):
    graphdef, params = nnx.split(tiny.model())

    @jax.jit
    def call(params, streams, state, timesteps):
        return nnx.merge(graphdef, params)(streams, state, timesteps, capture=capture, **options)

    return call(params, drawn().batch.streams, drawn().state, drawn().timesteps)


def jaxpr(**options):
    model, d = tiny.model(), drawn()

    def outputs(*args):
        out = model(*args, **options)
        return out.und, out.gen, out.kv, out.layers, out.captured

    return str(jax.make_jaxpr(outputs)(d.batch.streams, d.state, d.timesteps))


def test_nothing_is_computed_unasked():
    """The layers' scan carries the two streams alone, as it did before there was anything to capture."""
    plain, model, d = jaxpr(), tiny.model(), drawn()
    assert jaxpr(capture=None) == plain
    traced = jax.make_jaxpr(lambda *a: model(*a).gen)(d.batch.streams, d.state, d.timesteps)
    scans = [e for e in traced.jaxpr.eqns if e.primitive.name == "scan" and e.params["num_carry"] == 2]
    assert len(scans) == 1 and len(scans[0].outvars) == 2
    assert "cond[" not in plain and "cond[" in jaxpr(capture=BOTH)


def test_hidden_states_are_the_layers_outputs_in_the_order_asked_for():
    out = run(BOTH, return_layers=True)
    for captured, layers in zip(out.captured.hidden, out.layers, strict=True):
        np.testing.assert_array_equal(captured, layers[::-1])
    for residual, layers in zip(out.residual, out.layers, strict=True):
        np.testing.assert_array_equal(residual, layers[-1])
    np.testing.assert_allclose(out.gen, tiny.forward(drawn()).gen, atol=1e-5)


def test_attention_sums_to_one_where_there_is_something_to_see_and_is_zero_elsewhere():
    streams = drawn().batch.streams
    layout = concatenate_layouts(streams.und, streams.gen)
    mask = np.asarray(may_attend(layout, layout))
    attention = np.asarray(run(BOTH).captured.attention)
    assert attention.shape == (1, 2, tiny.CONFIG.decoder.num_heads, *mask.shape[1:])
    seen = np.broadcast_to(mask[None, :, None], attention.shape)
    assert not attention[~seen].any() and (attention[seen] > 0).all()
    held = np.broadcast_to((np.asarray(layout.document) >= 0)[None, :, None], attention.shape[:-1])
    np.testing.assert_allclose(attention.sum(-1)[held], 1, atol=1e-5)
    assert held.any() and not held.all() and not attention.sum(-1)[~held].any()


def test_attention_is_that_of_the_layer_whatever_the_backend():
    """Weights times values, through the layer's own projections, give what the layer's attention gives."""
    out = run(BOTH._replace(hidden=(0,)), return_kv=True, attend=blockwise_attention)
    weights, v = out.captured.attention[0], out.kv.v[1]
    heads = tiny.CONFIG.decoder.num_heads // tiny.CONFIG.decoder.num_kv_heads
    attended = jnp.einsum("bhqn,bnha->bqha", weights, jnp.repeat(v, heads, axis=2))
    before, after = (a[0] for a in out.captured.hidden), run(Capture(hidden=(1,))).captured.hidden
    graphdef, params = nnx.split(tiny.model().decoder.layers)
    layer = nnx.merge(graphdef, jax.tree.map(lambda a: a[1], params))
    num_und = after[0].shape[2]
    parts = attended[:, :num_und], attended[:, num_und:]
    streams = drawn().batch.streams
    for expert, x, a, expected, layout in zip(
        (layer.und, layer.gen), before, parts, after, (streams.und, streams.gen), strict=True
    ):
        x = x + expert.o_proj(a)
        x = x + expert.mlp(expert.post_attention_norm(x))
        held = np.asarray(layout.document) >= 0
        assert tiny.relative(x[held], expected[0][held]) < 1e-5


def test_past_tokens_are_seen_too():
    """After a context the weights reach over it: with keys of zero they are spread evenly."""
    model, d, config = tiny.model(), drawn(), tiny.CONFIG.decoder
    streams = d.batch.streams
    shape = (config.num_layers, 2, 5, config.num_kv_heads, config.head_dim)
    layout = type(streams.und)(*(np.zeros((2, 5), np.int32) for _ in range(5)))
    past = Past(type(run(return_kv=True).kv)(jnp.zeros(shape), jnp.zeros(shape)), layout)
    out = model(streams, d.state, d.timesteps, past, capture=Capture(attention=(0,)))
    attention = np.asarray(out.captured.attention[0])
    new = streams.und.order.shape[1] + streams.gen.order.shape[1]
    assert attention.shape == (2, config.num_heads, new, 5 + new)
    assert out.captured.hidden[0].shape[0] == 0
    first = np.asarray(streams.und.document[0] == 0)
    to_past = attention[0][:, : first.size][:, first, :5]
    assert (to_past > 0).all() and np.ptp(to_past, axis=-1).max() < 1e-6


@pytest.mark.parametrize("capture", [Capture(hidden=(2,)), Capture(attention=(-1,)), Capture(hidden=(0, 0))])
def test_a_layer_that_is_not_there_is_named(capture):
    with pytest.raises(ConfigError, match=r"capture (hidden|attention)=\(.*from 0 to 1"):
        jaxpr(capture=capture)


def test_a_request_is_observed_as_it_is_drawn():
    """The velocity is that of the request's first step; the picture sees the text, the text does not see it."""
    generator = tiny.generator()
    request = Request((tiny.picture(30, 24), "make it blue"), "edit", seed=3)
    seen = observe(generator, request, BOTH)
    [result] = generator.generate([request], ImageSettings(num_timesteps=2, cfg_text_scale=1.0))
    noisy = seen.gen.mode[0] == NOISE
    start = generator.noise.initial(3, 0, noisy.sum(), tiny.CONFIG.latent_dim)
    assert tiny.relative(start - seen.velocity[0, noisy], result.latents) < 1e-5
    text, weights = seen.und.order.shape[1], np.asarray(seen.captured.attention[0, 0])
    assert seen.captured.hidden[0].shape == (2, 1, text, tiny.CONFIG.decoder.hidden_size)
    assert (weights[:, text:][:, noisy][:, :, :text] > 0).all()
    own = seen.und.split[0] < seen.gen.split[0, noisy][0]
    assert not weights[:, :text][:, own][:, :, text:][:, :, noisy].any()
    halfway = observe(generator, request, BOTH, latents=result.latents, time=0.5)
    assert tiny.relative(halfway.velocity[0, noisy], seen.velocity[0, noisy]) > 0.1


def test_a_question_is_observed_without_a_picture_to_draw_and_wrong_latents_are_refused():
    seen = observe(tiny.generator(), Request(("hello there",), "understand"), Capture(attention=(0,)))
    assert seen.gen.order.shape == (1, 0) and seen.captured.attention.shape[-1] == seen.token_ids.shape[1]
    with pytest.raises(InputError, match=r"latents have shape \(3, 5\), the request's picture has \(9, 45\)"):
        observe(tiny.generator(), Request(("a",), size=(18, 18)), BOTH, latents=np.zeros((3, 5), np.float32))
