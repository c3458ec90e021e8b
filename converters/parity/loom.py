"""Loom's records: its added tokens, its rows as packed arrays, its parser, its prompts, and multi-reference generation.

What the published programs do wrong is done here, where their records ask for it, and nowhere else.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image as PILImage

from loom_jax.converters.parity.generation import RecordedNoise, generator, image_settings, posterior_noise
from loom_jax.converters.parity.packs import original_arrays, packed_patches, padded_images
from loom_jax.converters.parity.port import Port
from loom_jax.converters.parity.records import Checked, Records
from loom_jax.converters.parity.rows import num_tokens, plan_item
from loom_jax.data import open_source
from loom_jax.document import (
    LOOM_TOKENS,
    Condition,
    EncodedSegment,
    ImageTokens,
    ImageTransform,
    Segment,
    Shown,
    Text,
    Tokenizer,
    Turn,
    heading,
    history,
    learned_frames,
    open_image,
    parse_steps,
    prologue,
    to_rgb,
)
from loom_jax.generate import Request, Source

PUBLISHED_TOKENS = tuple("model>" if token == "<model>" else token for token in LOOM_TOKENS)
"""With the published misspelling."""

NAMED_TOKENS = {f"turn_{k}": f"<|turn_{k}|>" for k in range(1, 7)} | {
    "stage_1": "<|Stage 1|>",
    "stage_2": "<|Stage 2|>",
    "style": "<style>",
    "image_1": "<image 1>",
    "image_2": "<image 2>",
    "original_image": "<original_image>",
    "lower": "<lower>",
    "upper": "<upper>",
    "model": "<model>",
    "object": "<object>",
}
"""Under which name the published code hands out the id of which token."""

FRAME = ImageTransform(max_size=1024, min_size=512, stride=16, max_pixels=2**31)
"""How tutorial frames are resized before the transform of every picture; with LANCZOS, and no bound on the area."""

# Interface data of the published code: recorded strings contain it letter by letter.
_IMAGE_PROMPT = """
            Multi-Frame Sequential Image Generation Task
            **Tutorial Context**: "{prompt}"
            **Core Objective**: Generate a sequence of {count} distinct, non-overlapping images that visually represent a step-by-step cooking tutorial.
            ---
            Scene description in this turn: {step}
            ---
            **CRITICAL OVERALL REQUIREMENTS**:
            1.  **Precise Adherence**: Every image must correspond **EXACTLY** to its step description. No creative interpretation that violates the text.
            2.  **Visual Consistency**: While the content of each frame is different, maintain a consistent **photorealistic style, lighting, and camera perspective** across all {count} frames to create a cohesive and professional tutorial feel.
            3.  **No Omissions, No Additions**: Generate ONLY the key elements described for each step. Avoid adding distracting background objects not mentioned in the tutorial context.
            Generate the {count}-frame sequence now:
        """  # noqa: E501

_PLAN_PROMPT = """
{indent}Progressive Tutorial Generation Task{space}
{indent}**Input Prompt**: "{prompt}"
{indent}**Objective**: Generate a detailed {steps} tutorial showing the complete process.
{indent}**Output Format** (Must follow exactly):
{indent}```
{indent}StepX: [.......]
{indent}```
{indent}**Requirements**:
{indent}1. Each step builds upon the previous naturally
{indent}2. Use clear, actionable language
{indent}3. Describe visual elements that should appear
{indent}4. Maintain consistency in style and terminology
{indent}Now generate the tutorial for "{prompt}":
{end}"""


def loom_port(port: Port, tokens: Sequence[str] = PUBLISHED_TOKENS) -> Port:
    """Returns the port with Loom's tokens added to its tokenizer."""
    tokenizer = port.encoder.tokenizer.with_tokens(tokens)
    return dataclasses.replace(port, encoder=dataclasses.replace(port.encoder, tokenizer=tokenizer))


def training_plan_prompt(prompt: str, count: int) -> str:
    """Returns the published planning prompt of training."""
    indent = " " * 12
    return _PLAN_PROMPT.format(indent=indent, space="", prompt=prompt, steps=f"{count} steps", end=" " * 8)


def inference_plan_prompt(prompt: str) -> str:
    """Returns the published planning prompt of inference: always four steps."""
    return _PLAN_PROMPT.format(indent=" " * 8, space=" ", prompt=prompt, steps="4-step", end=" " * 4)


def image_prompt(prompt: str, count: int, step: str) -> str:
    """Returns the published prompt of one frame."""
    return _IMAGE_PROMPT.format(prompt=prompt, count=count, step=step)


def inference_steps(text: str) -> list[str]:
    """Returns what the published inference takes for steps: what lies between them as well."""
    pieces = re.split(r"Step\d+:\s*(.*?)(?=,\s*Step|$)", text)
    return [piece.strip() for piece in pieces if piece.strip()]


def _row(records: Records, name: str) -> dict[str, Any]:
    return dict(open_source("parquet", [str(records.folder / "rows" / name)])[0])


def input_document(records: Records) -> list[Segment]:
    """Returns the document of the recorded multi-reference row; no entity token stands before its images."""
    row = _row(records, "loom_input")
    *given, target = (Shown(open_image(image)) for image in row["image_list"])
    conditions = [Condition(picture) for picture in given]
    return [*prologue(conditions, row["instruction_list"][0]), *learned_frames([Turn(None, None, target)])]


def icon_document(records: Records, repeat_last_turn: bool) -> list[Segment]:
    """Returns the document of the recorded tutorial row.

    Args:
      records: where the row is.
      repeat_last_turn: as published, time token and step before the last frame are those of the one before it.
    """
    row = _row(records, "loom_icon")
    prompt, plan = row["instruction_list"]
    steps = parse_steps(plan, original=True)
    pictures = [Shown(_resize(to_rgb(open_image(image)))) for image in row["image_list"]]
    turns = [Turn(k, step, shown) for k, (step, shown) in enumerate(zip(steps, pictures, strict=True), 1)]
    named = turns[-2] if repeat_last_turn else turns[-1]
    segments = [
        Text(training_plan_prompt(prompt, len(steps))),
        Text(plan, loss=True),
        Text(image_prompt(prompt, len(steps), steps[-1])),
        *history(turns[:-1]),
        *heading(named),
    ]
    droppable = [dataclasses.replace(s, droppable=True) for s in segments]
    return [*droppable, *learned_frames([Turn(None, None, turns[-1].picture)])]


def _resize(image: PILImage.Image) -> PILImage.Image:
    return image.resize(FRAME.size(*image.size), PILImage.Resampling.LANCZOS)


def _arrays(document: Sequence[EncodedSegment], port: Port) -> dict[str, Any]:
    packed = port.packable(document)
    arrays = original_arrays([packed], port)
    arrays["padded_images"] = padded_images([packed])
    arrays["packed_vit_tokens"] = packed_patches([packed], port.config.vit.patch_size)
    return arrays


def check_loom(records: Records, port: Port) -> Checked:
    """Loom's rows as packed arrays, and a picture from two others and an instruction."""
    r, port = records.arrays("loom"), loom_port(port)
    documents = {"input": input_document(records), "icon": icon_document(records, repeat_last_turn=True)}
    out = Checked(inputs={name for name in r if "noise" in name or name.endswith("packed_timesteps")})
    for name, document in documents.items():
        arrays = _arrays(port.encoder.encode(document), port)
        out.computed |= {f"{name}_{key}": value for key, value in arrays.items() if f"{name}_{key}" in r}
    latent, picture = _multi_reference(records, port)
    return Checked(out.computed | {"multi_latent": latent, "multi_image": np.asarray(picture)}, out.inputs)


def _multi_reference(records: Records, port: Port) -> tuple[np.ndarray, PILImage.Image]:
    """The published program shows condition pictures to the VAE alone."""
    r, case, row = records.arrays("loom"), records.json("loom")["multi"], _row(records, "loom_input")
    pictures = [open_image(image) for image in row["image_list"][:2]]
    items: list[Segment] = [p for image in pictures for p in port.encoder.condition_pictures(image, ("clean",))]
    segments = port.encoder.encode([*items, Text(case["text"])])
    made = generator(port, RecordedNoise(posterior_noise(records, "loom", "multi_vae_noise_"), r["multi_init_noise"]))
    last = [s for s in segments if isinstance(s, ImageTokens)][-1]
    stride = port.config.latent_stride
    request = Request((*pictures, case["text"]), "edit")
    size = last.grid[0] * stride, last.grid[1] * stride
    source = Source(request, tuple(segments), made.latent_tokens(segments, 0), size)
    latent = made.draw([source], [None], image_settings(case["settings"]))[0]
    return latent, made.picture(latent, size)


def check_loom_json(records: Records, port: Port) -> Checked:
    """Loom's tokens, rows as plans and texts, parser and prompts; `prompts` says in words where these are."""
    recorded, extended = records.json("loom"), loom_port(port)
    computed: dict[str, Any] = {
        "special_tokens": _tokens(recorded["special_tokens"], port.encoder.tokenizer, extended.encoder.tokenizer),
        "input_row": _described(recorded["input_row"], input_document(records), extended),
        "icon_row": _described(recorded["icon_row"], icon_document(records, repeat_last_turn=True), extended),
        "parse_steps": [
            {
                "text": case["text"],
                "train": parse_steps(case["text"], original=True),
                "inference": inference_steps(case["text"]),
            }
            for case in recorded["parse_steps"]
        ],
        "inference_prompts": {
            "doc": recorded["inference_prompts"]["doc"],
            "TEXT_GENERATION_PROMPT": inference_plan_prompt("mushroom rice"),
            "GENERATION_PROMPT": image_prompt("mushroom rice", 2, "boil it with salt"),
            "IMAGE_GENERATION_PROMPT": "frame 2 boil it with salt",
        },
    }
    return Checked(computed, {"prompts", "multi"})


def _tokens(recorded: dict[str, Any], before: Tokenizer, after: Tokenizer) -> dict[str, Any]:
    special = after.special
    ids: dict[str, int | None] = {
        "bos_token_id": special.bos,
        "eos_token_id": special.eos,
        "start_of_image": special.start_of_image,
        "end_of_image": special.end_of_image,
    }
    for name, token in NAMED_TOKENS.items():
        ids[name] = after.token_id(token) if after.has_token(token) else None
    added = [token for token in PUBLISHED_TOKENS if after.token_id(token) >= len(before)]
    return {
        "doc": recorded["doc"],
        "length_before": len(before),
        "num_new": len(after) - len(before),
        "length_after": len(after),
        "ids": ids,
        "added": sorted(added, key=after.token_id),
        "encodings": {text: after.encode(text) for text in recorded["encodings"]},
    }


def _described(recorded: dict[str, Any], document: Sequence[Segment], port: Port) -> dict[str, Any]:
    """A row as the record tells it; remarks are taken over."""
    encoded = port.encoder.encode(document)
    images = [s for s in encoded if isinstance(s, ImageTokens) and s.pixels is not None]
    return {
        **{key: recorded[key] for key in ("instruction_list", "known_bug") if key in recorded},
        "plan": [plan_item(segment) for segment in document],
        "texts": [segment.text for segment in document if isinstance(segment, Text)],
        "num_tokens": sum(map(num_tokens, encoded)),
        "image_sizes": [list(image.pixels.shape[:2]) for image in images if image.pixels is not None],
    }
