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

__all__ = [
    "CAUSAL",
    "FULL",
    "NOISE",
    "NO_TOKEN",
    "PADDING",
    "DocumentLayout",
    "EncodedSegment",
    "ImageTokens",
    "LayoutState",
    "Picture",
    "Role",
    "Segment",
    "SpecialIds",
    "Text",
    "TextTokens",
    "TokenLayout",
    "Weighting",
    "drop_segments",
    "label_weight",
    "lay_out",
    "may_attend",
]
