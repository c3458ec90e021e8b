"""Recorded rows: the original's data sets with scripted choices, and its packing loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from loom_jax.converters.parity.packs import flex_splits, original_arrays, packed_patches, padded_images
from loom_jax.converters.parity.port import Port
from loom_jax.converters.parity.records import Checked, Records
from loom_jax.data import RECIPES, edit, open_source
from loom_jax.document import EncodedSegment, ImageTokens, Segment, Text, TextTokens

ORIGINAL_EDIT = partial(edit, original=True)


class Scripted:
    """Stands in for a random generator: hands out the recorded choices in order."""

    def __init__(self, *choices: float):
        self._choices = iter(choices)

    def integers(self, *bounds: int) -> int:
        low, high = (0, *bounds) if len(bounds) == 1 else bounds
        choice = int(next(self._choices))
        assert low <= choice < high, f"the recorded choice {choice} is not in [{low}, {high})"
        return choice

    def random(self) -> float:
        return next(self._choices)


# Row, recipe, and the choices that pack_rows.json notes: for edits first image, last image, joined if < 0.5, wordings.
CASES: dict[str, tuple[str, int, Any, Sequence[float]]] = {
    "t2i_0": ("t2i", 0, RECIPES["t2i"].build, [1]),
    "t2i_1": ("t2i", 1, RECIPES["t2i"].build, []),
    "edit_pair": ("edit", 0, ORIGINAL_EDIT, [0, 1, 1]),
    "edit_chain": ("edit", 1, ORIGINAL_EDIT, [0, 2, 0.9, 0, 1]),
    "edit_concat": ("edit", 1, ORIGINAL_EDIT, [0, 2, 0.1, 0]),
    "vlm_0": ("vlm", 0, RECIPES["vlm"].build, []),
    "vlm_1": ("vlm", 1, RECIPES["vlm"].build, []),
    "vlm_2": ("vlm", 2, RECIPES["vlm"].build, []),
}


def recorded_documents(records: Records) -> Iterator[tuple[str, list[Segment]]]:
    """Yields the name and the document of every recorded row."""
    rows = records.folder / "rows"
    sources = {
        "t2i": open_source("parquet", [str(rows / "t2i")]),
        "edit": open_source("parquet", [str(rows / "edit_info.json")]),
        "vlm": open_source("jsonl", [str(rows / "vlm.jsonl")], images=str(rows / "vlm_images")),
    }
    for name, (source, index, build, choices) in CASES.items():
        yield name, build(sources[source][index], Scripted(*choices))


def check_pack_rows(records: Records, port: Port) -> Checked:
    """Rows to packed arrays."""
    r, out = records.arrays("pack_rows"), Checked()
    for name, segments in recorded_documents(records):
        encoded = _encode(name, segments, port)
        document = port.packable(encoded)
        arrays = original_arrays([document], port)
        arrays |= {
            "num_tokens": np.int32(sum(num_tokens(s) for s in encoded)),
            "image_sizes": np.asarray([s.pixels.shape[:2] for s in _with_pixels(encoded)], np.int32).reshape(-1, 2),
        }
        if document.images("clean", "noisy"):
            arrays["padded_images"] = padded_images([document])
        if document.images("vit"):
            arrays["packed_vit_tokens"] = packed_patches([document], port.config.vit.patch_size)
        filler = int(r[f"{name}_flex_split_lens"][-1])
        flex = flex_splits([document], filler) | {"sample_lens": np.asarray([len(document.layout), filler], np.int32)}
        arrays |= {f"flex_{key}": value for key, value in flex.items()}
        out.computed |= {f"{name}_{key}": value for key, value in arrays.items() if f"{name}_{key}" in r}
        out.inputs |= {f"{name}_packed_timesteps"} & set(r)
    return out


def check_pack_rows_json(records: Records, port: Port) -> Checked:
    """Rows to plans and texts. The notes say which choices were made, the video is built from its plan."""
    recorded, out = records.json("pack_rows"), Checked(inputs={"video_plan"})
    for name, segments in recorded_documents(records):
        out.computed[name] = {
            "note": recorded[name]["note"],
            "sequence_plan": [plan_item(segment) for segment in segments],
            "texts": [segment.text for segment in segments if isinstance(segment, Text)],
        }
    return out


def _encode(name: str, segments: Sequence[Segment], port: Port) -> list[EncodedSegment]:
    shared = name.startswith("vlm") and RECIPES["vlm"].shares_area
    count = sum(not isinstance(segment, Text) for segment in segments)
    return port.encoder.encode(segments, img_num=max(count, 1) if shared else 1)


def _with_pixels(encoded: Sequence[EncodedSegment]) -> list[Any]:
    return [s for s in encoded if isinstance(s, ImageTokens)]


def num_tokens(segment: EncodedSegment) -> int:
    return len(segment.ids) if isinstance(segment, TextTokens) else segment.grid[0] * segment.grid[1]


def plan_item(segment: Segment) -> dict[str, Any]:
    """Returns a segment as the original's plans spell it."""
    if isinstance(segment, Text):
        kind, loss = "text", segment.loss
    else:
        kind, loss = ("vit_image" if segment.role == "vit" else "vae_image"), segment.role == "noisy"
    return {
        "type": kind,
        "enable_cfg": int(segment.droppable),
        "loss": int(loss),
        "special_token_loss": 0,
        "special_token_label": None,
    }


def check_packing_loop(records: Records, port: Port) -> Checked:
    """The original's loop over groups of samples; ours packs by best fit instead, so the loop is needed only here."""
    r = records.json("packing_loop")
    batches = original_packing_loop(r["groups"], r["lens"], r["draws"], r["params"], len(r["batches"]))
    return Checked(computed={"batches": batches}, inputs={"doc", "groups", "lens", "draws", "params"})


def original_packing_loop(
    groups: dict[str, Any], lens: dict[str, list[int]], draws: Sequence[float], params: dict[str, int], count: int
) -> list[dict[str, Any]]:
    """Returns `count` batches of texts of the lengths `lens`, packed as the original does (spec section 10).

    A text takes two tokens more than its length. The sample that makes a batch overflow, and finds no place in the
    buffer, is lost.
    """
    shares = np.cumsum([group["weight"] for group in groups.values()])
    shares = shares / shares[-1]
    fresh: dict[str, Iterator[tuple[str, int]]] = {
        name: iter([(name, i) for i in range(len(values))]) for name, values in lens.items()
    }
    buffer: list[tuple[str, int]] = []
    used = 0
    out: list[dict[str, Any]] = []

    def length(sample: tuple[str, int]) -> int:
        return lens[sample[0]][sample[1]] + 2

    while len(out) < count:
        batch = []
        for name, group in groups.items():
            if group["mandatory"]:
                limit = params["max_num_tokens_per_sample"]
                batch.append(next(s for s in fresh[name] if length(s) < limit))
        while True:
            total = sum(map(length, batch))
            buffered = total < params["prefer_buffer_before"] and bool(buffer)
            if buffered:
                sample = buffer.pop(0)
            else:
                sample = next(fresh[list(groups)[int(np.searchsorted(shares, draws[used], side="right"))]])
                used += 1
            if length(sample) > params["max_num_tokens_per_sample"]:
                continue
            if total + length(sample) <= params["max_num_tokens"]:
                batch.append(sample)
                if total + length(sample) >= params["expected_num_tokens"]:
                    break
            elif not buffered and len(buffer) < params["max_buffer_size"]:
                buffer.append(sample)
            else:
                break
        lengths = list(map(length, batch))
        out.append(
            {
                "samples": [list(sample) for sample in batch],
                "sample_lens": lengths,
                "sequence_length": sum(lengths),
                "random_draws_consumed": used,
            }
        )
    return out
