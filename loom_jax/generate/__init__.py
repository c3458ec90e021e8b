"""Generation: contexts, text decoding, denoising, guidance, and the generator that answers requests."""

from loom_jax.generate.buckets import bucket, canvas_side
from loom_jax.generate.context import Context, empty_context, extend_context, start_context, take_rows
from loom_jax.generate.denoise import branch_velocity, denoise, guided_velocity
from loom_jax.generate.engine import Denoising, Engine
from loom_jax.generate.generator import Generator, Source, branch_segments
from loom_jax.generate.guidance import Guidance, RenormType, guidance_is_active, guide
from loom_jax.generate.noise import NoiseSource, SeededNoise
from loom_jax.generate.reader import Query, Read, Reader, count_branches, make_guidance, text_room
from loom_jax.generate.requests import (
    TASK_SETTINGS,
    ImageSettings,
    Request,
    Result,
    Task,
    TextSettings,
)
from loom_jax.generate.text import DecodedText, TextControls, choose_tokens, decode_text, keep_top_p

__all__ = [
    "TASK_SETTINGS",
    "Context",
    "DecodedText",
    "Denoising",
    "Engine",
    "Generator",
    "Guidance",
    "ImageSettings",
    "NoiseSource",
    "Query",
    "Read",
    "Reader",
    "RenormType",
    "Request",
    "Result",
    "SeededNoise",
    "Source",
    "Task",
    "TextControls",
    "TextSettings",
    "branch_segments",
    "branch_velocity",
    "bucket",
    "canvas_side",
    "choose_tokens",
    "count_branches",
    "decode_text",
    "denoise",
    "empty_context",
    "extend_context",
    "guidance_is_active",
    "guide",
    "guided_velocity",
    "keep_top_p",
    "make_guidance",
    "start_context",
    "take_rows",
    "text_room",
]
