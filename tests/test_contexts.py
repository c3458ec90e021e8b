"""Contexts: reading a document piece by piece gives what training computes at once, and nothing is ever changed."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from loom_jax.data import Budget, pack
from loom_jax.document import ImageTokens, LayoutState
from loom_jax.generate import branch_velocity, empty_context, extend_context, start_context, take_rows
from loom_jax.models import Backend
from loom_jax.nn import blockwise_attention
from tests import tiny

PIECE = Budget(und=10, gen=10, vit=7)
"""Of one piece of a document: every piece has these shapes, so each call compiles once."""
CAPACITY = 64


@functools.cache
def calls():
    """The compiled calls, and the parameters they take."""
    graphdef, params = nnx.split(tiny.model())

    def start(params, streams, latents, position, split):
        return start_context(nnx.merge(graphdef, params), streams, latents, position, split, CAPACITY)

    def extend(params, context, streams, latents, position, split):
        # Blocks of 16 here, all pairs in training: the two paths share as little as they can.
        attend = functools.partial(blockwise_attention, block_size=16)
        return extend_context(nnx.merge(graphdef, params), context, streams, latents, position, split, Backend(attend))

    def velocity(params, context, streams, x, t):
        return branch_velocity(nnx.merge(graphdef, params), context, streams, x, t)

    return {f.__name__: functools.partial(jax.jit(f), params) for f in (start, extend, velocity)}


def piece(segments, start):
    """One row of static lengths with a part of a document; and where the next part begins."""
    packed = tiny.packable(segments, start=start)
    return pack([[packed]], PIECE, tiny.tables()).streams, packed.layout.end


def latents(values):
    """[n, C] -> [1, PIECE.gen, C] with filler."""
    return np.pad(values, ((0, PIECE.gen - len(values)), (0, 0)))[None]


def trained():
    """The training forward of both documents in one row, in another row the second, in a third the first."""
    return tiny.draw([tiny.DOCUMENTS, tiny.DOCUMENTS[1:], tiny.DOCUMENTS[:1]])


@functools.cache
def trained_forward():
    return trained(), tiny.forward(trained())


class Read:
    """Reads a document of the training batch into a context, and compares with the training forward on the way."""

    def __init__(self, number):
        self.drawn, self.decoded = trained_forward()
        self.number, self.context, self.end = number, None, LayoutState()
        self.streams = self.drawn.batch.streams
        self.last = None

    def of_segment(self, stream, split):
        return (stream.document[0] == self.number) & (stream.split[0] == split)

    def read(self, segment, split):
        """Reads one segment; returns the largest relative differences of its hidden states in both streams."""
        und, gen = (self.of_segment(s, split) for s in (self.streams.und, self.streams.gen))
        streams, end = piece([segment], self.end)
        values = latents(self.drawn.clean[0, gen])
        position, split_after = np.int32([end.position]), np.int32([end.split])
        if self.context is None:
            self.context, out = calls()["start"](streams, values, position, split_after)
        else:
            self.context, out = calls()["extend"](self.context, streams, values, position, split_after)
        self.end = end
        errors = [tiny.relative(out.und[0, : und.sum()], self.decoded.und[0, und])]
        if gen.any():
            errors.append(tiny.relative(out.gen[0, : gen.sum()], self.decoded.gen[0, gen]))
        return max(errors)

    def velocity(self, segment, split):
        """The relative difference of the velocity of a noisy image after all that was read."""
        gen = self.of_segment(self.streams.gen, split)
        streams, _ = piece([segment], self.end)
        t = self.drawn.timesteps[0, gen]
        out = calls()["velocity"](self.context, streams, latents(self.drawn.state[0, gen]), t[0])
        expected = tiny.model().velocity(self.decoded.gen[0, gen])
        return tiny.relative(out[0, : gen.sum()], expected)


@pytest.mark.parametrize("number", range(len(tiny.DOCUMENTS)))
def test_reading_piece_by_piece_equals_training(number):
    """Text, ViT and clean images, and the velocity of every noisy one; noisy images are never read."""
    reader = Read(number)
    for split, segment in enumerate(tiny.DOCUMENTS[number]):
        if isinstance(segment, ImageTokens) and segment.role == "noisy":
            assert reader.velocity(segment, split) < 1e-5
        else:
            assert reader.read(segment, split) < 1e-5


def test_documents_in_one_row_equal_documents_alone():
    drawn, decoded = trained_forward()
    for row, number in ((1, 1), (2, 0)):
        for stream, out in ((drawn.batch.streams.und, decoded.und), (drawn.batch.streams.gen, decoded.gen)):
            together, alone = stream.document[0] == number, stream.document[row] == 0
            assert tiny.relative(out[0, together], out[row, alone]) < 1e-5


def test_a_context_holds_each_token_in_the_slot_of_its_order():
    reader = Read(0)
    for split, segment in enumerate(tiny.DOCUMENTS[0][:4]):
        reader.read(segment, split)
    whole = tiny.packable(tiny.DOCUMENTS[0][:4]).layout
    context = reader.context
    n = len(whole)
    assert context.length.tolist() == [n] and context.capacity == CAPACITY
    assert (context.position[0], context.split[0]) == (whole.end.position, whole.end.split)
    for held, expected in zip(context.layout, whole.tokens, strict=True):
        np.testing.assert_array_equal(held[0, :n], expected)
    assert (np.asarray(context.layout.document[0, n:]) == -1).all()
    assert not np.asarray(context.kv.k[:, 0, n:]).any() and np.asarray(context.kv.k[:, 0, :n]).any(-1).all()


def test_filler_changes_nothing_in_a_context():
    """Reading a piece that holds no token gives the same context back."""
    reader = Read(0)
    reader.read(tiny.DOCUMENTS[0][0], 0)
    streams = pack([[]], PIECE, tiny.tables()).streams
    nothing = latents(np.zeros((0, tiny.CONFIG.latent_dim), np.float32))
    after, _ = calls()["extend"](reader.context, streams, nothing, reader.context.position, reader.context.split)
    for before, now in zip(jax.tree.leaves(reader.context), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(before, now)


def test_an_empty_context_is_like_none():
    """The first piece may also extend an empty context."""
    model = tiny.model()
    streams, end = piece([tiny.DOCUMENTS[0][0]], LayoutState())
    nothing = latents(np.zeros((0, tiny.CONFIG.latent_dim), np.float32))
    ends = np.int32([end.position]), np.int32([end.split])
    started, _ = calls()["start"](streams, nothing, *ends)
    empty = empty_context(tiny.CONFIG.decoder, 1, CAPACITY, model.dtype)
    extended, _ = calls()["extend"](empty, streams, nothing, *ends)
    for a, b in zip(jax.tree.leaves(started), jax.tree.leaves(extended), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_fork_leaves_its_origin_bit_for_bit():
    reader = Read(0)
    for split, segment in enumerate(tiny.DOCUMENTS[0][:2]):
        reader.read(segment, split)
    origin, kept = reader.context, jax.tree.map(np.array, reader.context)
    noisy = tiny.image("noisy", 2, 4)
    query, _ = piece([noisy], reader.end)
    x = latents(np.random.default_rng(0).standard_normal((8, tiny.CONFIG.latent_dim), np.float32))
    before = calls()["velocity"](origin, query, x, np.float32(0.5))
    forks = []
    for segment in (tiny.text(4, 7), tiny.text(6, 8)):
        streams, end = piece([segment], reader.end)
        nothing = latents(np.zeros((0, tiny.CONFIG.latent_dim), np.float32))
        ends = np.int32([end.position]), np.int32([end.split])
        forks.append(calls()["extend"](origin, streams, nothing, *ends)[0])
    after = calls()["velocity"](origin, query, x, np.float32(0.5))
    np.testing.assert_array_equal(before, after)
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(origin), strict=True):
        np.testing.assert_array_equal(a, b)
    assert forks[0].length[0] + 2 == forks[1].length[0]
    shared = int(origin.length[0])
    np.testing.assert_array_equal(forks[0].kv.k[:, :, :shared], forks[1].kv.k[:, :, :shared])


def test_rows_are_taken_in_any_order_and_more_than_once():
    shape = tiny.CONFIG.decoder
    context = jax.tree.map(
        lambda a: jax.numpy.arange(a.size, dtype=a.dtype).reshape(a.shape), empty_context(shape, 3, 4, np.float32)
    )
    taken = take_rows(context, np.asarray([2, 0, 2]))
    assert taken.capacity == 4 and taken.length.tolist() == [2, 0, 2]
    np.testing.assert_array_equal(taken.kv.v[:, 0], context.kv.v[:, 2])
    np.testing.assert_array_equal(taken.layout.order[1], context.layout.order[0])
