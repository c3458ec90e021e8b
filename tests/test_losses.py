"""Losses are sums with counts: how documents are packed, or spread over batches, changes no mean."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loom_jax.data import pack
from loom_jax.document import NO_TOKEN
from loom_jax.train import (
    LossSums,
    cross_entropy,
    loss_sums,
    mean_losses,
    split_timesteps,
    training_forward,
    velocity_error,
)
from tests import tiny


@functools.cache
def compiled():
    """Loss sums of a batch, and the gradients of both means with respect to all parameters."""
    graphdef, params = nnx.split(tiny.model())

    def losses(params, batch, clean, noise, timesteps):
        model = nnx.merge(graphdef, params)
        decoded = training_forward(model, batch.streams, clean, noise, timesteps)
        sums = loss_sums(model, decoded, batch.targets, clean, noise)
        return sum(mean_losses(sums)), sums

    call = jax.jit(jax.value_and_grad(losses, has_aux=True))
    return lambda drawn: call(params, drawn.batch, drawn.clean, drawn.noise, drawn.timesteps)


def sums_of(*rows):
    (_, sums), gradients = compiled()(tiny.draw(rows))
    return sums, gradients


def added(sums):
    return LossSums(*(sum(parts) for parts in zip(*sums, strict=True)))


@pytest.mark.parametrize("reweight", [False, True])
def test_two_packs_have_the_means_of_one(reweight):
    """Both documents in one row, or each in a batch of its own, whose sums are added."""
    together, _ = sums_of(tiny.DOCUMENTS)
    apart = added([sums_of(tiny.DOCUMENTS[:1])[0], sums_of(tiny.DOCUMENTS[1:])[0]])
    np.testing.assert_allclose(mean_losses(together, reweight), mean_losses(apart, reweight), rtol=1e-5)
    np.testing.assert_allclose(together, apart, rtol=1e-5)


def test_counts_are_those_of_the_documents():
    sums, _ = sums_of(tiny.DOCUMENTS)
    assert sums.ce_count == 6 + 5 + 7  # the ids of each learned text and its end mark
    assert sums.mse_count == 8 + 6 + 9
    np.testing.assert_allclose(sums.ce_weight, np.sqrt(6) + np.sqrt(5) + np.sqrt(7), rtol=1e-6)


def test_reweighting_weighs_texts_by_the_root_of_their_length():
    """Each text counts with its own mean times the root of its length."""
    documents = [(tiny.text(n, loss=True),) for n in (3, 8)]
    parts = [sums_of([d])[0] for d in documents]
    plain, weighted = (mean_losses(added(parts), reweight)[0] for reweight in (False, True))
    means = np.asarray([p.ce / p.ce_count for p in parts])
    np.testing.assert_allclose(plain, np.average(means, weights=[4, 9]), rtol=1e-5)
    np.testing.assert_allclose(weighted, np.average(means, weights=[2, 3]), rtol=1e-5)


@pytest.mark.parametrize(
    ("document", "absent"),
    [
        ((tiny.text(4, loss=True),), "mse"),
        ((tiny.text(4), tiny.image("noisy", 2, 2)), "ce"),
        ((tiny.text(4), tiny.image("clean", 2, 2), tiny.image("vit", 2, 2)), "both"),
    ],
)
def test_an_absent_modality_gives_zero_and_finite_gradients(document, absent):
    sums, gradients = sums_of([document])
    for reweight in (False, True):
        ce, mse = mean_losses(sums, reweight)
        assert (ce == 0) == (absent in ("ce", "both")) and (mse == 0) == (absent in ("mse", "both"))
    leaves = jax.tree.leaves(gradients)
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert any(np.abs(leaf).max() > 0 for leaf in leaves) == (absent != "both")


def test_a_batch_without_any_token_gives_zero_and_finite_gradients():
    sums, gradients = sums_of([])
    assert not any(sums) and all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients))


def test_cross_entropy_is_minus_the_log_probability():
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((2, 3, 11), np.float32), np.asarray([[4, NO_TOKEN, 0], [10, 2, NO_TOKEN]])
    probabilities = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum(-1, keepdims=True)
    out = cross_entropy(logits, labels)
    assert out.dtype == jnp.float32
    for place in np.ndindex(labels.shape):
        expected = 0.0 if labels[place] == NO_TOKEN else -np.log(probabilities[place][labels[place]])
        np.testing.assert_allclose(out[place], expected, rtol=1e-5, atol=1e-6)
    assert np.isfinite(cross_entropy(1e4 * logits, labels)).all()


def test_velocity_error_counts_noisy_tokens_only():
    rng = np.random.default_rng(0)
    prediction, clean, noise = rng.standard_normal((3, 2, 4, 5), np.float32)
    noisy = np.asarray([[1, 0, 1, 0], [0, 0, 0, 1]], bool)
    out = np.asarray(velocity_error(prediction, clean, noise, noisy))
    np.testing.assert_allclose(out[noisy], ((prediction - (noise - clean)) ** 2)[noisy], rtol=1e-6)
    assert not out[~noisy].any()


def test_tokens_of_a_noise_split_share_their_timestep():
    batch = pack([[tiny.packable(d) for d in tiny.DOCUMENTS], []], tiny.BUDGET, tiny.tables())
    normal = np.random.default_rng(0).standard_normal((2, 5), np.float32)
    t, t2 = (np.asarray(split_timesteps(shift, batch.targets, normal)) for shift in (1.0, 2.0))
    split = batch.targets.noise_split
    plain = 1 / (1 + np.exp(-normal[0, split[0]]))
    np.testing.assert_allclose(t[0], np.where(split[0] == NO_TOKEN, 0, plain), rtol=1e-6)
    np.testing.assert_allclose(t2, 2 * t / (1 + t), rtol=1e-6)
    assert not t[1].any()
