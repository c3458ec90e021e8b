"""Packing: every token of every document lands once, beside what belongs to it; what is left over is marked."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loom_jax.core import InputError
from loom_jax.data import Budget, Tables, pack, total_need
from loom_jax.document import FULL, NO_TOKEN, PADDING, TextTokens, drop_segments, patchify
from tests import tiny

texts = st.builds(tiny.text, st.integers(0, 5), st.integers(0, 9), loss=st.booleans(), droppable=st.booleans())
images = st.builds(
    tiny.image,
    st.sampled_from(("vit", "clean", "noisy")),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 9),
    droppable=st.booleans(),
)
documents = st.lists(st.one_of(texts, images), min_size=0, max_size=5)
BUDGET = Budget(und=200, gen=140, vit=140)


def tokens_of(stream, extra):
    """The held tokens of a row as {(document, order): extra columns}; asserts that none lies there twice."""
    held = stream.document >= 0
    keys = list(zip(stream.document[held].tolist(), stream.order[held].tolist(), strict=True))
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, zip(*(column[held] for column in extra), strict=True), strict=True))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(row=st.lists(documents, min_size=0, max_size=3), dropped=st.sampled_from(("text", "vit", "clean", "none")))
def test_every_token_lands_exactly_once_with_what_belongs_to_it(row, dropped):
    row = [tiny.packable(drop_segments(d, lambda kind: kind == dropped)) for d in row]
    batch = pack([row], BUDGET, tiny.tables())
    (s, targets, latents) = batch
    und = tokens_of(one(s.und), [s.token_ids[0], s.vit_index[0], targets.labels[0], *one(s.und)[1:]])
    gen = tokens_of(one(s.gen), [s.latent_positions[0], latents.image[0], latents.cell[0], *one(s.gen)[1:]])
    assert len(und) + len(gen) == sum(len(d.layout) for d in row)
    seen_patches, images_before = set(), 0
    for number, document in enumerate(row):
        layout = document.layout
        vae = [i for i, g in enumerate(document.segments) if not isinstance(g, TextTokens) and not g.dropped]
        vae = [i for i in vae if document.segments[i].role != "vit"]
        for place in range(len(layout)):
            segment = document.segments[layout.segment[place]]
            place_in_layout = [column[place] for column in layout.tokens[1:]]
            if layout.is_gen[place]:
                position, image, cell, *found = gen[number, place]
                rows, columns = divmod(int(layout.cell[place]), segment.grid[1])
                assert position == rows * tiny.CONFIG.max_latent_size + columns and cell == layout.cell[place]
                assert image == images_before + vae.index(layout.segment[place])
            else:
                token, patch, label, *found = und[number, place]
                assert label == layout.labels[place]
                if layout.token_ids[place] != NO_TOKEN:
                    assert token == layout.token_ids[place] and patch == NO_TOKEN
                else:
                    seen_patches.add(int(patch))
                    check_patch(s, patch, segment, int(layout.cell[place]))
            assert found == place_in_layout
        images_before += len(vae)
    assert len(seen_patches) == total_need(row).vit == (s.vit_segments[0] != PADDING).sum()


def one(stream):
    """The first row of a stream's layout."""
    return type(stream)(*(a[0] for a in stream))


def check_patch(streams, index, segment, cell):
    """The patch that a ViT token points to is its own, with its own place in the tables."""
    rows, columns = divmod(cell, segment.grid[1])
    np.testing.assert_array_equal(streams.patches[0, index], patchify(segment.pixels, 6)[cell])
    assert streams.vit_positions[0, index] == rows * tiny.CONFIG.vit_max_num_patch_per_side + columns
    own = streams.vit_segments[0] == streams.vit_segments[0, index]
    assert own.sum() == segment.grid[0] * segment.grid[1]


def test_filler_is_marked_everywhere():
    batch = pack([[], [tiny.packable([tiny.text(2)])]], Budget(und=7, gen=3, vit=2), tiny.tables())
    s = batch.streams
    assert (s.und.document[0] == PADDING).all() and s.und.document[1].tolist() == [0] * 4 + [PADDING] * 3
    assert (s.gen.document == PADDING).all() and (s.vit_segments == PADDING).all()
    assert (s.vit_index == NO_TOKEN).all() and (batch.targets.labels == NO_TOKEN).all()
    assert not batch.targets.label_weights.any() and (batch.targets.noise_split == NO_TOKEN).all()
    assert (batch.latents.image == NO_TOKEN).all()


def test_arrays_have_the_shapes_and_types_of_the_contract():
    batch = pack([[tiny.packable(d)] for d in tiny.DOCUMENTS], tiny.BUDGET, tiny.tables())
    lengths = {2: (2, tiny.BUDGET.und), 3: (2, tiny.BUDGET.gen)}
    for array in (*batch.streams.und, batch.streams.token_ids, batch.streams.vit_index, batch.targets.labels):
        assert array.shape == lengths[2] and array.dtype == np.int32
    for array in (*batch.streams.gen, batch.streams.latent_positions, *batch.latents, batch.targets.noise_split):
        assert array.shape == lengths[3] and array.dtype == np.int32
    assert batch.targets.label_weights.dtype == batch.streams.patches.dtype == np.float32
    assert batch.streams.patches.shape == (2, tiny.BUDGET.vit, tiny.CONFIG.vit.patch_dim)


@pytest.mark.parametrize("name", ["und", "gen", "vit"])
def test_a_row_beyond_its_budget_is_refused_by_name(name):
    row = [tiny.packable(d) for d in tiny.DOCUMENTS]
    need = total_need(row)
    pack([row], need, tiny.tables())  # just fits
    less = dataclasses.replace(need, **{name: getattr(need, name) - 1})
    with pytest.raises(InputError, match=rf"need {getattr(need, name)} {name} tokens, the budget is") as caught:
        pack([row], less, tiny.tables())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("role", "grid"), [("vit", (7, 1)), ("clean", (2, 8)), ("noisy", (8, 1))])
def test_an_image_beyond_its_position_table_is_refused(role, grid):
    with pytest.raises(InputError, match="exceeds the position table"):
        pack([[tiny.packable([tiny.image(role, *grid)])]], BUDGET, tiny.tables())


def test_interpolated_positions_stretch_over_the_table():
    tables = dataclasses.replace(Tables.of(tiny.CONFIG), interpolate=True)
    row = [[tiny.packable([tiny.image("clean", 2, 2), tiny.image("vit", 3, 2)])]]
    streams = pack(row, Budget(14, 4, 6), tables).streams
    assert streams.latent_positions[0].tolist() == [0, 3, 3 * 7, 3 * 7 + 3]
    assert streams.vit_positions[0].tolist() == [0, 3, 12, 15, 24, 27]


def test_noise_splits_are_numbered_through_the_row():
    row = [tiny.packable(tiny.DOCUMENTS[1]), tiny.packable(tiny.DOCUMENTS[0])]
    batch = pack([row], tiny.BUDGET, tiny.tables())
    split = batch.targets.noise_split[0]
    counts = {int(n): int((split == n).sum()) for n in np.unique(split)}
    assert counts == {NO_TOKEN: tiny.BUDGET.gen - 23, 0: 6, 1: 9, 2: 8}
    noisy = split != NO_TOKEN
    assert (batch.streams.gen.mode[0, noisy] == 2).all()


def test_frames_of_a_video_share_one_noise_split():
    """They are noisy although the mode of their split is full, as in the original."""
    frames = [tiny.image("noisy", 2, 2, n, mode=FULL, advance=n + 1, joins_previous=n > 0) for n in range(3)]
    batch = pack([[tiny.packable([tiny.text(1), *frames])]], Budget(9, 13, 0), tiny.tables())
    assert batch.targets.noise_split[0].tolist() == [0] * 12 + [NO_TOKEN]
    assert (batch.streams.gen.mode[0, :12] == FULL).all()
    assert batch.latents.image[0].tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [NO_TOKEN]
