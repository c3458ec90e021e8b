"""The transformer as a whole: its streams, its layers, and that every field of its configuration matters."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loom_jax.configs import bagel_7b
from loom_jax.core import AutoencoderConfig, ConfigError, DecoderConfig, LoomConfig, SiglipConfig, from_mapping
from loom_jax.data import Streams, Tables, pack
from loom_jax.document import TokenLayout
from loom_jax.models import Autoencoder, LoomModel
from loom_jax.models.autoencoder import Moments
from loom_jax.models.mot import concatenate_layouts
from loom_jax.nn import REMAT_POLICIES, rope_tables
from loom_jax.train import split_timesteps
from tests import tiny


@functools.cache
def two_rows():
    """A row with both documents, and a row with the second alone."""
    return tiny.draw([tiny.DOCUMENTS, tiny.DOCUMENTS[1:]])


def permuted(drawn, seed=0):
    """The same batch with the tokens of each stream, and the patches, in another order; and that order."""
    rng = np.random.default_rng(seed)
    s = drawn.batch.streams
    und, gen, vit = (rng.permutation(a.shape[1]) for a in (s.token_ids, s.latent_positions, s.vit_positions))
    place_of_patch = np.append(np.argsort(vit), -1)  # the last entry serves NO_TOKEN
    streams = Streams(
        und=TokenLayout(*(a[:, und] for a in s.und)),
        token_ids=s.token_ids[:, und],
        vit_index=place_of_patch[s.vit_index[:, und]].astype(np.int32),
        gen=TokenLayout(*(a[:, gen] for a in s.gen)),
        latent_positions=s.latent_positions[:, gen],
        patches=s.patches[:, vit],
        vit_positions=s.vit_positions[:, vit],
        vit_segments=s.vit_segments[:, vit],
    )
    moved = dataclasses.replace(
        drawn,
        batch=drawn.batch._replace(streams=streams),
        clean=drawn.clean[:, gen],
        noise=drawn.noise[:, gen],
        timesteps=drawn.timesteps[:, gen],
    )
    return moved, und, gen


def test_the_order_of_tokens_in_a_stream_does_not_matter():
    drawn = two_rows()
    moved, und, gen = permuted(drawn)
    before, after = tiny.forward(drawn), tiny.forward(moved)
    held_und, held_gen = (s.document >= 0 for s in (drawn.batch.streams.und, drawn.batch.streams.gen))
    assert tiny.relative(after.und[held_und[:, und]], before.und[:, und][held_und[:, und]]) < 1e-5
    assert tiny.relative(after.gen[held_gen[:, gen]], before.gen[:, gen][held_gen[:, gen]]) < 1e-5


def test_every_input_of_the_layout_matters():
    """Split, mode, order and rope position all reach the result."""
    drawn = two_rows()
    streams = drawn.batch.streams
    before = tiny.forward(drawn)
    for field in ("document", "split", "mode", "order", "position"):
        und = streams.und._replace(**{field: np.zeros_like(streams.und.order)})
        changed = dataclasses.replace(drawn, batch=drawn.batch._replace(streams=streams._replace(und=und)))
        after = tiny.forward(changed)
        held = streams.und.document >= 0
        assert tiny.relative(after.und[held], before.und[held]) > 1e-3, field


def test_scanned_layers_equal_layers_one_by_one():
    drawn, model = two_rows(), tiny.model()
    streams, config = drawn.batch.streams, tiny.CONFIG.decoder
    graphdef, params = nnx.split(model.decoder.layers)

    @jax.jit
    def unrolled(streams, state, timesteps):
        x = model.embed_und(streams), model.embed_gen(state, timesteps, streams.latent_positions)
        layouts = streams.und, streams.gen
        ropes = tuple(rope_tables(a.position, config.head_dim, config.rope_theta) for a in layouts)
        for i in range(config.num_layers):
            layer = nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], params))
            x, _ = layer(x, ropes, concatenate_layouts(*layouts))
        return model.decoder.norm.und(x[0]), model.decoder.norm.gen(x[1])

    und, gen = unrolled(streams, drawn.state, drawn.timesteps)
    scanned = tiny.forward(drawn)
    assert tiny.relative(scanned.und, und) < 1e-5 and tiny.relative(scanned.gen, gen) < 1e-5


def gradients(remat):
    """Gradients of all parameters, and the bytes that computing them sets aside."""
    drawn = two_rows()
    graphdef, params = nnx.split(tiny.model())

    def loss(params, streams, state, timesteps):
        out = nnx.merge(graphdef, params)(streams, state, timesteps, remat=remat)
        return (out.und**2).mean() + (out.gen**3).mean()

    compiled = jax.jit(jax.grad(loss)).lower(params, drawn.batch.streams, drawn.state, drawn.timesteps).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return compiled(params, drawn.batch.streams, drawn.state, drawn.timesteps), temporary


@functools.cache
def plain_gradients():
    return gradients("none")


@pytest.mark.parametrize("remat", [name for name in REMAT_POLICIES if name != "none"])
def test_rematerialised_layers_give_the_same_gradients_from_less_memory(remat):
    (plain, plain_bytes), (again, fewer_bytes) = plain_gradients(), gradients(remat)
    for (path, expected), got in zip(jax.tree_util.tree_leaves_with_path(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5, err_msg=jax.tree_util.keystr(path))
    assert fewer_bytes < plain_bytes


def primitives(jaxpr):
    """Yields the name of every operation, inner ones included."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from primitives(inner if hasattr(inner, "eqns") else inner.jaxpr)


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_the_policy_reaches_the_layers_of_vit_and_decoder(remat):
    drawn, model = two_rows(), tiny.model()
    traced = jax.make_jaxpr(lambda *a: model(*a, remat=remat).gen)(drawn.batch.streams, drawn.state, drawn.timesteps)
    found = [name for name in primitives(traced.jaxpr) if name in ("checkpoint", "remat", "remat2")]
    assert len(found) == (0 if remat == "none" else 2)


def test_an_unknown_remat_policy_is_named():
    drawn = two_rows()
    with pytest.raises(ConfigError, match="remat='some' is not one of none, full"):
        tiny.model()(drawn.batch.streams, drawn.state, drawn.timesteps, remat="some")


def test_every_parameter_gets_a_gradient():
    """But the key bias of the ViT, which the softmax cancels, and the heads, which this loss does not use."""
    grads, _ = plain_gradients()
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        if not any(part in name for part in ("'vit']['layers']['k_proj']['bias']", "lm_head", "llm2vae")):
            assert np.abs(leaf).max() > 1e-9, name


def test_constrain_sees_named_activations_of_matching_rank():
    seen = set()

    def constrain(x, names):
        assert x.ndim == len(names)
        seen.add(names)
        return x

    drawn = two_rows()
    model = tiny.model()
    jax.eval_shape(lambda: model(drawn.batch.streams, drawn.state, drawn.timesteps, constrain=constrain))
    assert ("batch", "length", "embed") in seen and ("batch", "length", "heads", None) in seen


def shapes(config):
    """Shapes of all parameters by path."""
    model = nnx.eval_shape(lambda: LoomModel(config, rngs=nnx.Rngs(0)))
    vae = nnx.eval_shape(lambda: Autoencoder(config.vae, rngs=nnx.Rngs(0)))
    return {
        (part, jax.tree_util.keystr(path)): leaf.shape
        for part, module in (("model", model), ("vae", vae))
        for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(module, nnx.Param))
    }


def transformer_output(config):
    """Hidden states of the second document under a configuration, with the weights that this module shares."""
    drawn = two_rows()
    out = tiny.build(config)(drawn.batch.streams, drawn.state, drawn.timesteps)
    return np.concatenate([np.ravel(out.und), np.ravel(out.gen)])


def latents_output(config):
    """Latents of a given posterior."""
    vae = nnx.eval_shape(lambda: Autoencoder(config.vae, rngs=nnx.Rngs(0)))
    mean = jnp.ones((1, 2, 2, config.vae.z_channels))
    return vae.sample(Moments(mean, mean), None)


def moments_output(config):
    """The posterior mean of some pixels."""
    vae = Autoencoder(config.vae, rngs=nnx.Rngs(0))
    return vae.encode(jax.random.normal(jax.random.key(1), (1, 12, 8, 3))).mean


def timesteps_output(config):
    model = nnx.eval_shape(lambda: LoomModel(config, rngs=nnx.Rngs(0)))
    return split_timesteps(model.config.timestep_shift, two_rows().batch.targets, jnp.ones((2, 4)))


def positions_output(config):
    rows = [[tiny.packable(d)] for d in tiny.DOCUMENTS]
    streams = pack(rows, tiny.BUDGET, Tables.of(config)).streams
    return np.concatenate([streams.latent_positions, streams.vit_positions], axis=1)


CHANGES = {
    DecoderConfig: {
        "vocab_size": 521,
        "hidden_size": 64,
        "intermediate_size": 93,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 3,
        "head_dim": 16,
        "rope_theta": (2e4, transformer_output),
        "rms_norm_eps": (1e-1, transformer_output),
    },
    SiglipConfig: {
        "hidden_size": 45,
        "intermediate_size": 69,
        "num_layers": 4,
        "num_heads": 4,
        "patch_size": 5,
        "num_positions": 49,
        "layer_norm_eps": (1e-1, transformer_output),
    },
    AutoencoderConfig: {
        "ch": 64,
        "ch_mult": (1, 2, 2),
        "num_res_blocks": 2,
        "z_channels": 6,
        "scale_factor": (0.5, latents_output),
        "shift_factor": (0.2, latents_output),
        "in_channels": 4,
        "out_ch": 4,
        "num_groups": (16, moments_output),
    },
    LoomConfig: {
        "max_latent_size": 8,
        "vit_max_num_patch_per_side": 7,
        "latent_patch_size": 2,
        "timestep_shift": (3.0, timesteps_output),
        "interpolate_pos": (True, positions_output),
    },
}
PARTS = {DecoderConfig: "decoder", SiglipConfig: "vit", AutoencoderConfig: "vae"}


def changed_config(cls, field, value):
    config = tiny.CONFIG
    if field in ("num_positions", "vit_max_num_patch_per_side"):  # two names of one grid
        vit = dataclasses.replace(config.vit, num_positions=49)
        return dataclasses.replace(config, vit=vit, vit_max_num_patch_per_side=7)
    if cls is LoomConfig:
        return dataclasses.replace(config, **{field: value})
    part = PARTS[cls]
    return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **{field: value})})


@pytest.mark.parametrize(
    ("cls", "field"),
    [(cls, f.name) for cls in CHANGES for f in dataclasses.fields(cls) if f.name not in PARTS.values()],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_every_field_of_the_configuration_changes_shapes_or_results(cls, field):
    """A new field without a line in CHANGES fails."""
    change = CHANGES[cls][field]
    value, output = change if isinstance(change, tuple) and callable(change[-1]) else (change, None)
    config = changed_config(cls, field, value)
    if output is None:
        assert shapes(config) != shapes(tiny.CONFIG)
    else:
        assert shapes(config) == shapes(tiny.CONFIG)
        assert np.abs(np.asarray(output(config)) - np.asarray(output(tiny.CONFIG))).max() > 1e-3


def test_the_release_has_14_607_260_128_parameters_and_is_described_in_seconds():
    config = from_mapping(LoomConfig, bagel_7b.get_config().model.to_dict())
    start = time.monotonic()
    model = nnx.eval_shape(lambda: LoomModel(config, rngs=nnx.Rngs(0)))
    assert time.monotonic() - start < 5
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == 14_607_260_128
    vae = nnx.eval_shape(lambda: Autoencoder(config.vae, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(vae, nnx.Param))) == 83_819_683


def test_computation_follows_the_compute_dtype_and_results_are_float32():
    model = nnx.eval_shape(lambda: LoomModel(tiny.CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    drawn = two_rows()
    out = nnx.eval_shape(lambda m: m(drawn.batch.streams, drawn.state, drawn.timesteps, return_kv=True), model)
    assert out.und.dtype == out.gen.dtype == out.kv.k.dtype == out.kv.v.dtype == jnp.bfloat16
    assert nnx.eval_shape(lambda m: m.logits(m.embed_und(drawn.batch.streams)), model).dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}
