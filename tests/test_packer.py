"""Which documents share a row, and where their pictures lie."""

import itertools

import numpy as np
import pytest

from loom_jax.core import LoomError
from loom_jax.data import (
    Address,
    BadRow,
    Budget,
    CanvasConfig,
    Element,
    Packable,
    Packer,
    Room,
    RowCounts,
    Tables,
    pack,
)
from loom_jax.data.canvases import fill_canvases
from loom_jax.document import ImageTokens, SpecialIds, TextTokens, lay_out

SPECIAL = SpecialIds(1, 2, 3, 4)
TABLES = Tables(max_latent_size=9, vit_side=9, patch_size=2)
STRIDE = 4


def image(role, height, width, seed=0, pixels=None):
    """An image of latent tokens of STRIDE pixels, or of ViT patches of 2 pixels."""
    cell = 2 if role == "vit" else STRIDE
    if pixels is None:
        pixels = np.random.default_rng(seed).integers(1, 255, (height, width, 3), np.uint8)
    return ImageTokens(role, (height // cell, width // cell), pixels=pixels)


def document(*segments):
    return Packable(segments, lay_out(segments, SPECIAL))


def text(length):
    return TextTokens(list(range(5, 5 + length)))


def elements(documents):
    return (Element(Address(i, 0, 0, i), d) for i, d in enumerate(documents))


SMALL, FOUR = Budget(60, 40, 30), (CanvasConfig(20, 20, 4),)


def packer(documents, budget=SMALL, canvases=FOUR, num_rows=2, look_ahead=2.0):
    counts = RowCounts(0.5, min_rows=10)
    return Packer(elements(documents), Room(budget, TABLES, canvases), num_rows, look_ahead, counts)


def mixed(seed):
    """Documents of many shapes, without end; the number of the document is the length of nothing else."""
    rng = np.random.default_rng(seed)
    while True:
        h, w = (int(4 * rng.integers(1, 5)) for _ in range(2))
        yield [
            document(text(int(rng.integers(3, 20)))),
            document(text(4), image("noisy", h, w)),
            document(image("clean", h, w), text(5), image("noisy", 8, 8)),
            document(image("vit", 6, 4), text(int(rng.integers(3, 9)))),
        ][int(rng.integers(4))]


def test_every_document_is_packed_once_and_soon():
    documents = list(itertools.islice(mixed(0), 400))
    number = {id(d): i for i, d in enumerate(documents)}
    p, packed, late = packer(documents), [], []
    for _ in range(20):
        before = p.next_position
        now = [number[id(d)] for row in p.next_rows() for d in row]
        late += [before - i for i in now]
        packed += now
    assert len(set(packed)) == len(packed)
    assert sorted([*packed, *p.positions()]) == list(range(p.next_position))
    assert max(late) < 60, "a document waited too long"


def test_rows_fit_and_both_streams_are_full():
    budget = Budget(200, 56, 60)
    p = packer(mixed(1), budget, (CanvasConfig(16, 16, 12),), num_rows=3, look_ahead=3.0)
    fills = []
    for _ in range(30):
        rows = p.next_rows()
        batch = pack(rows, budget, TABLES)  # refuses rows that do not fit
        fill_canvases(rows, (CanvasConfig(16, 16, 12),), batch, STRIDE)
        fills.append([(batch.streams.und.document >= 0).mean(), (batch.streams.gen.document >= 0).mean()])
    assert (np.mean(fills, 0) > 0.85).all()


@pytest.mark.parametrize(
    ("too_large", "reason"),
    [
        (document(text(70)), "needs more und tokens than a row has"),
        (document(image("noisy", 28, 28)), "needs more gen tokens than a row has"),
        (document(image("vit", 12, 12)), "needs more vit tokens than a row has"),
        (document(image("noisy", 4, 40)), "image larger than the position table"),
        (document(image("noisy", 4, 24)), "no canvases for its images"),
        (document(*(image("noisy", 4, 4, k) for k in range(5))), "no canvases for its images"),
    ],
)
def test_documents_that_cannot_fit_are_counted(too_large, reason):
    p = packer(itertools.chain([too_large], itertools.repeat(document(text(9)), 100)))
    assert all(document.need.und == 11 for row in p.next_rows() for document in row)
    assert dict(p.counts.bad) == {reason: 1}


def test_too_many_bad_rows_stop_the_run():
    p = packer([document(text(70))] * 10)
    with pytest.raises(LoomError, match=r"10 of 10 rows are bad.*needs more und tokens.*max_bad_share"):
        p.next_rows()


def test_faults_of_rows_are_counted_too():
    good, bad = document(text(9)), BadRow("empty text", "for tests")
    stream = (Element(Address(i, 0, 0, i), *((None, bad) if i == 3 else (good, None))) for i in itertools.count())
    p = Packer(stream, Room(SMALL, TABLES, ()), 1, 1.0, RowCounts(0.5, 100))
    p.next_rows()
    assert dict(p.counts.bad) == {"empty text": 1} and 3 not in p.positions()


def test_gen_tokens_find_their_pixels_on_the_canvases():
    shared = np.random.default_rng(9).integers(1, 255, (8, 12, 3), np.uint8)
    rows = [
        [document(image("clean", 4, 16, 1), image("noisy", 8, 8, 2)), document(text(3), image("noisy", 12, 4, 3))],
        [document(image("noisy", 8, 12, pixels=shared), image("clean", 8, 12, pixels=shared)), document(text(2))],
    ]
    canvases = (CanvasConfig(12, 16, 2), CanvasConfig(8, 8, 1))
    batch = pack(rows, Budget(30, 14, 1), TABLES)
    out = fill_canvases(rows, canvases, batch, STRIDE)
    assert [c.pixels.shape for c in out.canvases] == [(2, 2, 12, 16, 3), (2, 1, 8, 8, 3)]
    used = [(c.sizes[..., 0] > 0).sum(1).tolist() for c in out.canvases]
    assert used == [[2, 1], [1, 0]], "a picture shown twice lies on one canvas"
    for b, documents in enumerate(rows):
        pool = np.concatenate([cells(c.pixels[b]) for c in out.canvases])
        images = [s.pixels for d in documents for s in d.images("clean", "noisy")]
        expected = np.concatenate([cells(pixels[None]) for pixels in images])
        index = out.latent_index[b]
        np.testing.assert_array_equal(pool[index[: len(expected)]], expected)
        assert (index[len(expected) :] == -1).all()


def cells(pixels):
    """Cuts pixels [N, H, W, 3] into squares of STRIDE, row by row: [N * H/STRIDE * W/STRIDE, STRIDE, STRIDE, 3]."""
    n, h, w, _ = pixels.shape
    cut = pixels.reshape(n, h // STRIDE, STRIDE, w // STRIDE, STRIDE, 3)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(-1, STRIDE, STRIDE, 3)
