"""How full packed rows are: of a realistic mix of lengths at the sizes of the 7B model, and of the tiny data.

    python -m benchmarks packing --batches 40

The realistic mix has no pixels, only sizes: tutorials of 4 to 6 frames, edits, text to image and conversations, with
pictures of 512 to 1024 pixels; budgets are in the proportion of the mean need, as `loom data inspect` prints it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import parser_of, report
from loom_jax.commands.train import read_config, read_recipe
from loom_jax.data import (
    Address,
    Budget,
    CanvasConfig,
    Element,
    Packable,
    Packer,
    Room,
    RowCounts,
    Tables,
    make_pipeline,
    total_need,
)
from loom_jax.document import (
    LOOM_TOKENS,
    EncodedSegment,
    ImageTokens,
    ImageTransform,
    Role,
    SpecialIds,
    TextTokens,
    Tokenizer,
    lay_out,
    make_encoder,
)

RECIPE = Path(__file__).parents[1] / "configs" / "tiny.py"

VAE, VIT = ImageTransform(1024, 512, 16), ImageTransform(980, 378, 14, 2_007_040)
STRIDE, PATCH = 16, 14
SPECIAL = SpecialIds(0, 1, 2, 3)
MIX = {"tutorial": 0.4, "edit": 0.2, "t2i": 0.25, "vlm": 0.15}
SHAPES = [(1024, 1024), (1024, 768), (768, 1024), (1280, 720), (720, 1280), (640, 480), (512, 512), (1920, 1080)]
CANVASES = ((1024, 1024, 6), (768, 1024, 5), (1024, 768, 5), (512, 1024, 3), (1024, 512, 3), (512, 704, 8))


def text(rng: np.random.Generator, mean: float, loss: bool = False) -> TextTokens:
    """A text whose length is spread widely around a mean."""
    return TextTokens(ids=np.zeros(max(2, int(rng.lognormal(np.log(mean), 0.6))), np.int32), loss=loss)


def picture(rng: np.random.Generator, *roles: Role, shape: tuple[int, int] | None = None) -> list[EncodedSegment]:
    """A picture of one of the usual shapes in some roles; its pixels take no memory."""
    width, height = shape or SHAPES[int(rng.integers(len(SHAPES)))]
    sizes = {role: (VIT if role == "vit" else VAE).size(width, height)[::-1] for role in roles}
    vae = next((np.broadcast_to(np.uint8(0), (*s, 3)) for role, s in sizes.items() if role != "vit"), None)
    out: list[EncodedSegment] = []
    for role, (h, w) in sizes.items():
        cell = PATCH if role == "vit" else STRIDE
        pixels = np.broadcast_to(np.uint8(0), (h, w, 3)) if role == "vit" else vae
        out.append(ImageTokens(role, (h // cell, w // cell), pixels=pixels))
    return out


def document(kind: str, rng: np.random.Generator) -> list[EncodedSegment]:
    """A document like those that the recipe of that name builds."""
    if kind == "t2i":
        return [text(rng, 60), *picture(rng, "noisy")]
    if kind == "edit":
        return [*picture(rng, "clean", "vit"), text(rng, 30), *picture(rng, "noisy")]
    if kind == "vlm":
        turns = [text(rng, 40 + 120 * (i % 2), loss=bool(i % 2)) for i in range(2 * int(rng.integers(1, 4)))]
        return [*picture(rng, "vit"), *turns]
    shape = SHAPES[int(rng.integers(len(SHAPES)))]
    frames = int(rng.integers(4, 7))
    chosen = 1 + int(rng.integers(0, 4))
    out: list[EncodedSegment] = [text(rng, 40), text(rng, 30 * frames, loss=True)]
    for k in range(min(chosen, frames)):
        last = k == min(chosen, frames) - 1
        roles: tuple[Role, ...] = ("noisy",) if last else ("noisy", "clean", "vit")
        out += [TextTokens([4]), text(rng, 30), *picture(rng, *roles, shape=shape)]
    return out


def stream(seed: int) -> Iterator[Element]:
    """Documents of the mix, without end."""
    rng = np.random.default_rng(seed)
    for position in itertools.count():
        kind = str(rng.choice(list(MIX), p=list(MIX.values())))
        segments = document(kind, rng)
        yield Element(Address(position, 0, 0, position), Packable(segments, lay_out(segments, SPECIAL)))


def measure(budget: Budget, num_rows: int, look_ahead: float, batches: int) -> dict[str, Any]:
    """Packs the realistic mix and returns a row about it."""
    counts = RowCounts(max_bad_share=0.5, min_rows=1000)
    canvases = tuple(CanvasConfig(*canvas) for canvas in CANVASES)
    packer = Packer(stream(7), Room(budget, Tables(64, 70, PATCH), canvases), num_rows, look_ahead, counts)
    fills, start = [], time.perf_counter()
    for _ in range(batches):
        needs = [total_need(row) for row in packer.next_rows()]
        fills.append([(n.und / budget.und, n.gen / budget.gen, n.vit / budget.vit) for n in needs])
    took = time.perf_counter() - start
    und, gen, vit = np.mean(fills, axis=(0, 1))
    worst = np.min(np.mean(fills, axis=1), axis=0)
    return {
        "data": "realistic",
        "budget": f"{budget.und}, {budget.gen}, {budget.vit}",
        "rows": num_rows,
        "look_ahead": look_ahead,
        "und": und,
        "gen": gen,
        "vit": vit,
        "worst_und": worst[0],
        "worst_gen": worst[1],
        "bad_rows": counts.num_bad,
        "ms_a_batch": took / batches * 1e3,
    }


def tiny(batches: int) -> dict[str, Any]:
    """Packs the data of configs/tiny.py, pixels and all, with one process, and returns a row about it."""
    config = read_config(read_recipe(RECIPE), [])
    encoder = make_encoder(config.model, Tokenizer.of_bytes().with_tokens(LOOM_TOKENS))
    pipeline, stats = make_pipeline(config.data, encoder, Tables.of(config.model)), []
    next(pipeline)
    start = time.perf_counter()
    for _ in range(batches):
        next(pipeline)
        stats.append([pipeline.stats[f"fill/{name}"] for name in ("und", "gen", "vit")])
    took = time.perf_counter() - start
    bad = int(pipeline.stats["bad_rows"])
    pipeline.close()
    und, gen, vit = np.mean(stats, axis=0)
    worst = np.min(stats, axis=0)
    fills = {"und": und, "gen": gen, "vit": vit, "worst_und": worst[0], "worst_gen": worst[1]}
    return {"data": "tiny", "rows": config.data.rows, **fills, "bad_rows": bad, "ms_a_batch": took / batches * 1e3}


def main(argv: list[str]) -> int:
    """Runs the benchmark."""
    parser = parser_of("packing", __doc__)
    parser.add_argument("--batches", type=int, default=40, metavar="N", help="of each kind [40]")
    args = parser.parse_args(argv)
    batches = 2 if args.smoke else args.batches
    documents = 200 if args.smoke else 2000
    drawn = (element.document.need for element in itertools.islice(stream(1), documents))
    needs = np.asarray([(need.und, need.gen, need.vit) for need in drawn])
    ratio = needs.mean(0) / needs.mean(0)[1]
    kinds = ((32768, 1, 2), (32768, 1, 4), (32768, 8, 4), (49152, 4, 2), (65536, 2, 2))
    rows = []
    for gen, num_rows, look_ahead in kinds[:1] if args.smoke else kinds:
        und, vit = (int(-(-gen * ratio[i] // 256) * 256) for i in (0, 2))
        rows.append(measure(Budget(und, gen, int(vit * 1.15)), num_rows, look_ahead, batches))
    title = f"fill of packed rows, documents need (und, gen, vit) {needs.mean(0).round().astype(int).tolist()}"
    report(args.out, title, [*rows, tiny(batches)], columns=list(rows[0]))
    return 0
