"""Recorded packs of the original: the documents behind them, and our layouts written in the original's arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image as PILImage

from loom_jax.converters.parity.port import Port, channels_first
from loom_jax.converters.parity.records import Checked, Records
from loom_jax.data import Packable
from loom_jax.document import (
    FULL,
    NO_TOKEN,
    NOISE,
    EncodedSegment,
    ImageTokens,
    Picture,
    Role,
    TextTokens,
    drop_segments,
    grid_position_ids,
    may_attend,
    patchify,
)


def split_texts(ids: np.ndarray, port: Port) -> list[TextTokens]:
    """Returns the texts in recorded text ids; the markers of images stand between them.

    The ids are turned into text and back, so that the tokenizer has its part in what is compared.
    """
    special, tokenizer = port.encoder.special, port.encoder.tokenizer
    texts: list[TextTokens] = []
    run: list[int] = []
    for token in ids.tolist():
        if token == special.bos:
            run = []
        elif token == special.eos:
            texts.append(TextTokens(tokenizer.encode(tokenizer.decode(run))))
        else:
            run.append(token)
    return texts


def training_documents(records: Records, port: Port) -> list[list[EncodedSegment]]:
    """Returns the three documents of train.npz, as the set's README describes them.

    Text to image; an edit in two turns with a text that carries loss and predicts an image after it; a question and an
    answer, twice.
    """
    r = records.arrays("train")
    prompt, edit, written, again, *chat = split_texts(r["packed_text_ids"], port)
    picture = {name: records.picture("train", f"src_image_{name}") for name in ("t2i", "src", "mid", "dst")}

    def image(name: str, role: Role, droppable: bool = False) -> EncodedSegment:
        return encode_picture(port, picture[name], role, droppable)

    condition = dataclasses.replace
    edit_document: list[EncodedSegment] = [
        image("src", "clean", True),
        image("src", "vit", True),
        condition(edit, droppable=True),
        condition(written, loss=True, end_label=port.encoder.special.start_of_image),
        image("mid", "noisy"),
        image("mid", "clean", True),
        image("mid", "vit", True),
        condition(again, droppable=True),
        image("dst", "noisy"),
    ]
    answers: list[EncodedSegment] = [condition(text, loss=bool(i % 2)) for i, text in enumerate(chat)]
    return [[prompt, image("t2i", "noisy")], edit_document, [image("t2i", "vit"), *answers]]


def encode_picture(port: Port, picture: PILImage.Image, role: Role, droppable: bool = False) -> ImageTokens:
    """Returns an encoded picture in one role."""
    segment = port.encoder.encode([Picture(picture, role, droppable)])[0]
    assert isinstance(segment, ImageTokens)
    return segment


def original_arrays(documents: Sequence[Packable], port: Port) -> dict[str, Any]:
    """Returns the original's packed arrays for documents laid out by this framework."""
    layouts = [d.layout for d in documents]
    offsets = np.cumsum([0, *(len(layout) for layout in layouts)])
    joined = {
        name: np.concatenate([getattr(layout, name) for layout in layouts])
        for name in ("token_ids", "is_gen", "labels", "label_weights", "cell")
    }
    is_text = joined["token_ids"] != NO_TOKEN
    labelled = joined["labels"] != NO_TOKEN
    vae = [s for d in documents for s in d.images("clean", "noisy")]
    vit = [s for d in documents for s in d.images("vit")]
    noisy = np.concatenate([_noisy_tokens(d) for d in documents])
    out = {
        "sequence_length": np.int32(offsets[-1]),
        "sample_lens": np.diff(offsets),
        "packed_text_ids": joined["token_ids"][is_text],
        "packed_text_indexes": np.flatnonzero(is_text),
        "packed_position_ids": np.concatenate([layout.tokens.position for layout in layouts]),
        "packed_latent_position_ids": _positions(vae, port.config.max_latent_size),
        "patchified_vae_latent_shapes": np.asarray([s.grid for s in vae], np.int32).reshape(-1, 2),
        "packed_vae_token_indexes": np.flatnonzero(joined["is_gen"]),
        "packed_vit_position_ids": _positions(vit, port.config.vit_max_num_patch_per_side),
        "packed_vit_token_indexes": np.flatnonzero(~is_text & ~joined["is_gen"]),
        "vit_token_seqlens": np.asarray([s.grid[0] * s.grid[1] for s in vit], np.int32),
        "mse_loss_indexes": np.flatnonzero(noisy),
        "packed_label_ids": joined["labels"][labelled],
        "ce_loss_indexes": np.flatnonzero(labelled),
        "ce_loss_weights": joined["label_weights"][labelled],
    }
    for i, layout in enumerate(layouts):
        out[f"mask_{i}"] = may_attend(layout.tokens, layout.tokens)
    return out


def packed_patches(documents: Sequence[Packable], patch_size: int) -> np.ndarray:
    """Returns the ViT patches of all documents, in the original's order."""
    patches = [patchify(s.pixels, patch_size) for d in documents for s in d.images("vit") if s.pixels is not None]
    return np.concatenate(patches)


def padded_images(documents: Sequence[Packable]) -> np.ndarray:
    """Returns the VAE images of all documents as one tensor [n, 3, H, W], filled with zeros to the right and below."""
    pixels = [s.pixels for d in documents for s in d.images("clean", "noisy") if s.pixels is not None]
    height, width = (max(p.shape[axis] for p in pixels) for axis in (0, 1))
    canvas = np.zeros((len(pixels), height, width, 3), np.float32)
    for place, p in zip(canvas, pixels, strict=True):
        place[: p.shape[0], : p.shape[1]] = p
    return channels_first(canvas)


def flex_splits(documents: Sequence[Packable], filler: int) -> dict[str, np.ndarray]:
    """Returns split lengths and modes of all documents, with the original's filler as one more causal document."""
    lengths = [d.layout.split_lengths for d in documents]
    modes = [d.layout.split_modes for d in documents]
    return {
        "split_lens": np.concatenate([*lengths, [filler]]).astype(np.int32),
        "attn_modes": np.concatenate([*modes, [0]]).astype(np.int32),
    }


def _positions(images: Sequence[ImageTokens], side: int) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int32), *(grid_position_ids(s.grid, side) for s in images)])


def _noisy_tokens(document: Packable) -> np.ndarray:
    """Returns which tokens of a document are latents to be generated, bool [S]."""
    noisy = np.zeros(len(document.layout), bool)
    for index, segment in enumerate(document.segments):
        if isinstance(segment, ImageTokens) and segment.role == "noisy":
            noisy |= (document.layout.segment == index) & document.layout.is_gen
    return noisy


DROPPED: dict[str, Callable[[str], bool]] = {
    "drop_text": lambda kind: kind == "text",
    "drop_vit": lambda kind: kind == "vit",
    "drop_vae": lambda kind: kind == "clean",
    "drop_all": lambda kind: True,
}
"""Which kinds of segment each recorded case drops."""


def check_pack_extra(records: Records, port: Port) -> Checked:
    """Dropped segments, and frames of a video in one split."""
    r, out = records.arrays("pack_extra"), Checked()
    edit = training_documents(records, port)[1]
    for case, should_drop in DROPPED.items():
        document = port.packable(drop_segments(edit, should_drop))
        _add_case(out, r, case, original_arrays([document], port))
    video = port.packable(_video(records, port))
    flex = flex_splits([video], int(r["video_flex_split_lens"][-1]))
    _add_case(out, r, "video", original_arrays([video], port) | {f"flex_{name}": a for name, a in flex.items()})
    # Frames were handed over as they are: their size is a setting of this case. Timesteps are draws.
    out.inputs |= {name for name in r if name.endswith("_packed_timesteps")}
    return out


def _add_case(out: Checked, recorded: dict[str, np.ndarray], case: str, arrays: dict[str, Any]) -> None:
    out.computed |= {f"{case}_{name}": a for name, a in arrays.items() if f"{case}_{name}" in recorded}


def _video(records: Records, port: Port) -> list[EncodedSegment]:
    """A prompt and the frames of one video: one full split, positions as far apart as the frames."""
    r, plan = records.arrays("pack_extra"), records.json("pack_rows")["video_plan"]
    text = split_texts(r["video_packed_text_ids"], port)[0]
    frames = [item for item in plan if item["type"] == "vae_image"]
    images = [
        ImageTokens(
            role="noisy",
            grid=(int(rows), int(columns)),
            mode=FULL if "frame_delta" in frames[0] else NOISE,
            advance=frame.get("frame_delta"),
            joins_previous=not frame["split_start"],
        )
        for frame, (rows, columns) in zip(frames, r["video_patchified_vae_latent_shapes"], strict=True)
    ]
    return [text, *images]
