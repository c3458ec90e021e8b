"""Generation: contexts, text decoding, denoising, guidance, and the generator that answers requests."""

from loom_jax.generate.buckets import bucket, canvas_side
from loom_jax.generate.context import Context, empty_context, extend_context, start_context, take_rows
from loom_jax.generate.denoise import Velocity, branch_velocity, decode_latents, denoise, guided_velocity
from loom_jax.generate.engine import Denoising, Engine
from loom_jax.generate.gallery import GALLERY, render_gallery, write_gallery
from loom_jax.generate.generator import Generator, Source, branch_segments
from loom_jax.generate.guidance import Guidance, RenormType, guidance_is_active, guide
from loom_jax.generate.interleave import (
    LOOM_SETTINGS,
    Done,
    Event,
    FrameMade,
    InterleavedRequest,
    PlanWritten,
    Preview,
    RequestFailed,
    TurnStarted,
    interleave,
)
from loom_jax.generate.noise import NoiseSource, SeededNoise
from loom_jax.generate.observe import Observed, observe
from loom_jax.generate.reader import Query, Read, Reader, count_branches, make_guidance, text_room
from loom_jax.generate.requests import (
    TASK_SETTINGS,
    ImageSettings,
    Request,
    Result,
    Task,
    TextSettings,
)
from loom_jax.generate.saved import RECORD, Refused, SavedWork, write_whole
from loom_jax.generate.taylor import Forecast, extrapolate, forecast_velocity, is_full, since_full, start_forecast
from loom_jax.generate.text import DecodedText, TextControls, choose_tokens, decode_text, keep_top_p

__all__ = [
    "GALLERY",
    "LOOM_SETTINGS",
    "RECORD",
    "TASK_SETTINGS",
    "Context",
    "DecodedText",
    "Denoising",
    "Done",
    "Engine",
    "Event",
    "Forecast",
    "FrameMade",
    "Generator",
    "Guidance",
    "ImageSettings",
    "InterleavedRequest",
    "NoiseSource",
    "Observed",
    "PlanWritten",
    "Preview",
    "Query",
    "Read",
    "Reader",
    "Refused",
    "RenormType",
    "Request",
    "RequestFailed",
    "Result",
    "SavedWork",
    "SeededNoise",
    "Source",
    "Task",
    "TextControls",
    "TextSettings",
    "TurnStarted",
    "Velocity",
    "branch_segments",
    "branch_velocity",
    "bucket",
    "canvas_side",
    "choose_tokens",
    "count_branches",
    "decode_latents",
    "decode_text",
    "denoise",
    "empty_context",
    "extend_context",
    "extrapolate",
    "forecast_velocity",
    "guidance_is_active",
    "guide",
    "guided_velocity",
    "interleave",
    "is_full",
    "keep_top_p",
    "make_guidance",
    "observe",
    "render_gallery",
    "since_full",
    "start_context",
    "start_forecast",
    "take_rows",
    "text_room",
    "write_gallery",
    "write_whole",
]
