"""The layout and the mask rule: against the recorded masks, and against plain statements of spec section 3."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loom_jax.document import (
    CAUSAL,
    FULL,
    NO_TOKEN,
    NOISE,
    PADDING,
    EncodedSegment,
    ImageTokens,
    LayoutState,
    SpecialIds,
    TextTokens,
    TokenLayout,
    drop_segments,
    label_weight,
    lay_out,
    may_attend,
)
from tests.reference import golden

SPECIAL = SpecialIds(bos=900, eos=901, start_of_image=902, end_of_image=903)
MODES = {"vit": FULL, "clean": FULL, "noisy": NOISE}

texts = st.builds(
    TextTokens,
    ids=st.lists(st.integers(0, 99), max_size=6).map(tuple),
    loss=st.booleans(),
    droppable=st.booleans(),
    dropped=st.booleans(),
    end_label=st.sampled_from([None, 902]),
)
images = st.builds(
    ImageTokens,
    role=st.sampled_from(["vit", "clean", "noisy"]),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    droppable=st.booleans(),
    dropped=st.booleans(),
)
documents = st.lists(st.one_of(texts, images), max_size=7)
starts = st.builds(LayoutState, order=st.integers(0, 50), position=st.integers(0, 50), split=st.integers(0, 9))
few = settings(max_examples=60, derandomize=True, deadline=None, database=None)


def splits_of(lengths: list[int], modes: list[int], document: int = 0) -> TokenLayout:
    """The layout of one document given only as split lengths and modes, as the records have it."""
    total = sum(lengths)
    return TokenLayout(
        document=np.full(total, document),
        split=np.repeat(np.arange(len(lengths)), lengths),
        mode=np.repeat(modes, lengths),
        order=np.arange(total),
        position=np.zeros(total, int),
    )


def naive_mask(tokens: TokenLayout) -> np.ndarray:
    """Spec section 3, said once more, pair by pair."""
    rows = list(zip(*(a.tolist() for a in tokens), strict=True))
    mask = np.zeros((len(rows), len(rows)), bool)
    for i, (q_document, q_split, q_mode, q_order, _) in enumerate(rows):
        for j, (k_document, k_split, k_mode, k_order, _) in enumerate(rows):
            if q_document != k_document or q_document == PADDING:
                continue
            if q_split == k_split:
                mask[i, j] = True if q_mode in (FULL, NOISE) else q_order >= k_order
            else:
                mask[i, j] = q_order >= k_order and k_mode != NOISE
    return mask


def length_of(segment: EncodedSegment) -> int:
    return 2 + (len(segment.ids) if isinstance(segment, TextTokens) else segment.grid[0] * segment.grid[1])


def advance_of(segment: EncodedSegment) -> int:
    if isinstance(segment, TextTokens):
        return 0 if segment.dropped else length_of(segment)
    return {"vit": 1, "clean": 1, "noisy": 0}[segment.role]


def mode_of(segment: EncodedSegment) -> int:
    return CAUSAL if isinstance(segment, TextTokens) else MODES[segment.role]


@pytest.mark.parametrize("sample", range(5))
def test_recorded_masks_of_single_documents(sample: int) -> None:
    record = golden("mask")
    tokens = splits_of(record[f"split_lens_{sample}"].tolist(), record[f"modes_{sample}"].tolist())
    np.testing.assert_array_equal(may_attend(tokens, tokens), record[f"dense_{sample}"])


def test_recorded_mask_of_a_whole_batch() -> None:
    """The original packs its filler as one more causal document; here that is spelled out to compare."""
    record = golden("mask")
    parts = [splits_of(record[f"split_lens_{i}"].tolist(), record[f"modes_{i}"].tolist(), i) for i in range(5)]
    parts.append(splits_of([int(record["pad_len"])], [CAUSAL], 5))
    batch = TokenLayout(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    np.testing.assert_array_equal(may_attend(batch, batch), record["sparse"])


def test_filler_attends_to_nothing_and_is_seen_by_nobody() -> None:
    document, filler = splits_of([3, 4], [CAUSAL, FULL]), splits_of([5], [FULL], PADDING)
    batch = TokenLayout(*(np.concatenate(column) for column in zip(document, filler, strict=True)))
    mask = may_attend(batch, batch)
    assert not mask[7:].any() and not mask[:, 7:].any() and mask[:7, :7].any(axis=1).all()


@few
@given(documents, documents)
def test_mask_equals_its_plain_statement(first: list[EncodedSegment], second: list[EncodedSegment]) -> None:
    columns = [lay_out(document, SPECIAL).tokens for document in (first, second)]
    columns = [layout._replace(document=np.full_like(layout.document, i)) for i, layout in enumerate(columns)]
    batch = TokenLayout(*(np.concatenate(column) for column in zip(*columns, strict=True)))
    shuffled = np.random.default_rng(0).permutation(len(batch.order))  # order in memory carries no meaning
    batch = TokenLayout(*(column[shuffled] for column in batch))
    np.testing.assert_array_equal(may_attend(batch, batch), naive_mask(batch))


@few
@given(documents)
def test_mask_takes_leading_axes_and_unequal_lengths(segments: list[EncodedSegment]) -> None:
    tokens = lay_out(segments, SPECIAL).tokens
    q = TokenLayout(*(np.stack([a, a])[:, : len(a) // 2] for a in tokens))
    k = TokenLayout(*(np.stack([a, a]) for a in tokens))
    expected = may_attend(tokens, tokens)[: len(tokens.order) // 2]
    np.testing.assert_array_equal(may_attend(q, k), np.stack([expected, expected]))


@few
@given(documents, starts)
def test_order_splits_and_positions_follow_the_segments(segments: list[EncodedSegment], start: LayoutState) -> None:
    layout = lay_out(segments, SPECIAL, start)
    tokens, place, position, split = layout.tokens, 0, start.position, start.split
    np.testing.assert_array_equal(tokens.order, np.arange(start.order, start.order + len(layout)))
    for index, segment in enumerate(segments):
        if not segment.dropped:
            n = length_of(segment)
            here = slice(place, place + n)
            shared = not isinstance(segment, TextTokens)
            np.testing.assert_array_equal(tokens.position[here], position + (np.zeros(n) if shared else np.arange(n)))
            assert set(tokens.split[here]) == {split} and set(tokens.mode[here]) == {mode_of(segment)}
            assert set(layout.segment[here]) == {index}
            place, split = place + n, split + 1
        position += advance_of(segment)
    assert place == len(layout)
    assert layout.end == LayoutState(start.order + place, position, split)
    assert not tokens.document.any()


@few
@given(documents)
def test_streams_marks_and_cells(segments: list[EncodedSegment]) -> None:
    layout = lay_out(segments, SPECIAL)
    kept = [segment for segment in segments if not segment.dropped]
    ids, cells, gen = [], [], []
    for segment in kept:
        if isinstance(segment, TextTokens):
            ids += [SPECIAL.bos, *segment.ids, SPECIAL.eos]
            inside = [NO_TOKEN] * len(segment.ids)
        else:
            n = length_of(segment) - 2
            ids += [SPECIAL.start_of_image, *[NO_TOKEN] * n, SPECIAL.end_of_image]
            inside = list(range(n))
        cells += [NO_TOKEN, *inside, NO_TOKEN]
        latent = isinstance(segment, ImageTokens) and segment.role != "vit"
        gen += [False, *[latent] * len(inside), False]
    np.testing.assert_array_equal(layout.token_ids, np.array(ids, np.int32))
    np.testing.assert_array_equal(layout.cell, np.array(cells, np.int32))
    np.testing.assert_array_equal(layout.is_gen, np.array(gen, bool))
    np.testing.assert_array_equal(layout.split_lengths, [length_of(segment) for segment in kept])
    np.testing.assert_array_equal(layout.split_modes, [mode_of(segment) for segment in kept])


@few
@given(documents, st.sampled_from(["token", "sample", "square"]))
def test_labels_stand_one_before_what_they_predict(segments: list[EncodedSegment], weighting: str) -> None:
    layout = lay_out(segments, SPECIAL, weighting=weighting)
    assert ((layout.labels == NO_TOKEN) == (layout.label_weights == 0)).all()
    place = 0
    for segment in segments:
        if segment.dropped:
            continue
        n = length_of(segment)
        labels, weights = layout.labels[place : place + n], layout.label_weights[place : place + n]
        if isinstance(segment, TextTokens) and segment.loss:
            assert labels[:-1].tolist() == [*segment.ids, SPECIAL.eos]
            np.testing.assert_allclose(weights[:-1], label_weight(len(segment.ids) + 1, weighting))
        else:
            assert (labels[:-1] == NO_TOKEN).all()
        assert labels[-1] == (NO_TOKEN if segment.end_label is None else segment.end_label)
        assert weights[-1] == (0 if segment.end_label is None else 1)
        place += n


@few
@given(documents, st.integers(0, 7), starts)
def test_a_document_laid_out_in_two_parts_is_the_same(
    segments: list[EncodedSegment], cut: int, start: LayoutState
) -> None:
    """What lets generation go on from a context: training lays out at once, generation piece by piece."""
    whole, head = lay_out(segments, SPECIAL, start), lay_out(segments[:cut], SPECIAL, start)
    tail = lay_out(segments[cut:], SPECIAL, head.end)
    for column, first, second in zip(whole.tokens, head.tokens, tail.tokens, strict=True):
        np.testing.assert_array_equal(column, np.concatenate([first, second]))
    assert tail.end == whole.end


def image(role: str, **fields: object) -> ImageTokens:
    return ImageTokens(role, (2, 3), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(("role", "advance"), [("vit", 1), ("clean", 1), ("text", 0)])
def test_what_is_dropped_vanishes_but_a_dropped_image_keeps_its_position(role: str, advance: int) -> None:
    gone: EncodedSegment = TextTokens((1, 2, 3), dropped=True) if role == "text" else image(role, dropped=True)
    layout = lay_out([TextTokens((5,)), gone, TextTokens((6,))], SPECIAL)
    assert layout.token_ids.tolist() == [900, 5, 901, 900, 6, 901]
    assert layout.tokens.position.tolist() == [0, 1, 2, 3 + advance, 4 + advance, 5 + advance]
    assert layout.tokens.split.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_noisy_image_shares_its_position_with_its_clean_copy() -> None:
    layout = lay_out([TextTokens((5,)), image("noisy"), image("clean"), TextTokens(())], SPECIAL)
    assert layout.tokens.position.tolist() == [0, 1, 2, *[3] * 16, 4, 5]
    mask = may_attend(layout.tokens, layout.tokens)
    assert not mask[11:, 3:11].any() and mask[3:11, 3:11].all() and mask[11:19, 11:19].all()


def test_video_frames_form_one_split_with_several_positions() -> None:
    frames = [image("noisy", mode=FULL, advance=delta, joins_previous=i > 0) for i, delta in enumerate((2, 3, 1))]
    layout = lay_out([TextTokens(()), *frames], SPECIAL)
    assert layout.split_lengths.tolist() == [2, 24] and layout.split_modes.tolist() == [CAUSAL, FULL]
    assert layout.tokens.position.tolist() == [0, 1, *[2] * 8, *[4] * 8, *[7] * 8]
    assert layout.end == LayoutState(26, 8, 2)


@pytest.mark.parametrize(
    ("dropped", "lengths", "positions"),
    [
        ({0}, [2, 16], [4, 7]),
        ({1}, [2, 16], [2, 7]),
        ({0, 1}, [2, 8], [7]),
    ],
)
def test_dropped_video_frames_leave_the_others_in_one_split(
    dropped: set[int], lengths: list[int], positions: list[int]
) -> None:
    """The original counts wrong split lengths here (spec section 13)."""
    frames = [
        image("noisy", mode=FULL, advance=delta, joins_previous=i > 0, dropped=i in dropped)
        for i, delta in enumerate((2, 3, 1))
    ]
    layout = lay_out([TextTokens(()), *frames], SPECIAL)
    assert layout.split_lengths.tolist() == lengths and layout.split_modes.tolist() == [CAUSAL, FULL]
    assert layout.tokens.position[2::8].tolist() == positions


def test_label_weights() -> None:
    assert (label_weight(4, "token"), label_weight(4, "sample"), label_weight(4, "square")) == (1.0, 0.25, 0.5)


def test_nothing_lays_out_to_nothing() -> None:
    layout = lay_out([], SPECIAL)
    assert len(layout) == 0 and layout.end == LayoutState() and may_attend(layout.tokens, layout.tokens).shape == (0, 0)


def test_only_droppable_segments_are_asked_and_dropped() -> None:
    asked: list[str] = []

    def drop_images(kind: str) -> bool:
        asked.append(kind)
        return kind != "text"

    segments = [
        TextTokens((1,), droppable=True),
        image("vit", droppable=True),
        image("clean"),
        image("clean", droppable=True),
    ]
    out = drop_segments(segments, drop_images)
    assert asked == ["text", "vit", "clean"]
    assert [segment.dropped for segment in out] == [False, True, False, True]
    assert [dataclasses.replace(segment, dropped=False) for segment in out] == segments
