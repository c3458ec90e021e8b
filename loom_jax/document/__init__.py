"""Documents, prompts, tokenizer, image transforms, layout and the mask rule: one source for training and generation."""

from loom_jax.document.document import (
    EncodedSegment,
    ImageTokens,
    Picture,
    Role,
    Segment,
    Text,
    TextTokens,
    drop_segments,
)
from loom_jax.document.encode import Encoder
from loom_jax.document.layout import (
    NO_TOKEN,
    DocumentLayout,
    LayoutState,
    SpecialIds,
    Weighting,
    label_weight,
    lay_out,
)
from loom_jax.document.mask import CAUSAL, FULL, NOISE, PADDING, TokenLayout, may_attend
from loom_jax.document.plan import parse_steps
from loom_jax.document.positions import grid_position_ids, interpolated_position_ids
from loom_jax.document.prompts import THINK_THEN_ANSWER, THINK_THEN_DRAW
from loom_jax.document.tokenizer import LOOM_TOKENS, SPECIAL_TOKENS, Tokenizer
from loom_jax.document.transforms import (
    MAX_IMAGE_PIXELS,
    VAE_TRANSFORM,
    VIT_TRANSFORM,
    ImageTransform,
    normalize,
    open_image,
    pack_latent,
    patchify,
    to_rgb,
    unit_range,
    unpack_latent,
)

__all__ = [
    "CAUSAL",
    "FULL",
    "LOOM_TOKENS",
    "MAX_IMAGE_PIXELS",
    "NOISE",
    "NO_TOKEN",
    "PADDING",
    "SPECIAL_TOKENS",
    "THINK_THEN_ANSWER",
    "THINK_THEN_DRAW",
    "VAE_TRANSFORM",
    "VIT_TRANSFORM",
    "DocumentLayout",
    "EncodedSegment",
    "Encoder",
    "ImageTokens",
    "ImageTransform",
    "LayoutState",
    "Picture",
    "Role",
    "Segment",
    "SpecialIds",
    "Text",
    "TextTokens",
    "TokenLayout",
    "Tokenizer",
    "Weighting",
    "drop_segments",
    "grid_position_ids",
    "interpolated_position_ids",
    "label_weight",
    "lay_out",
    "may_attend",
    "normalize",
    "open_image",
    "pack_latent",
    "parse_steps",
    "patchify",
    "to_rgb",
    "unit_range",
    "unpack_latent",
]
