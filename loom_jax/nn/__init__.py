"""Layers and kernels without a model: attention, norms, rope, position tables, the flow, stacking, random keys."""

from loom_jax.nn.attention import (
    ATTENTION_OUTPUT,
    Attend,
    attention_weights,
    auto_attention,
    blockwise_attention,
    dense_attention,
)
from loom_jax.nn.backends import ATTENTION_BACKENDS, choose_attention
from loom_jax.nn.document_attention import document_attention
from loom_jax.nn.embeddings import PositionTable, TimestepEmbedder, sincos_2d_table, timestep_sinusoid
from loom_jax.nn.flow import (
    denoising_schedule,
    interpolate,
    shift_timesteps,
    training_timesteps,
    velocity_target,
)
from loom_jax.nn.keys import Purpose, make_key
from loom_jax.nn.norm import LayerNorm, RMSNorm
from loom_jax.nn.permutation import permute
from loom_jax.nn.projection import Projection, linear_dot, quantize_int8
from loom_jax.nn.rope import apply_rope, rope_frequencies, rope_tables
from loom_jax.nn.stack import REMAT_POLICIES, scan_layers, stack_layers
from loom_jax.nn.tpu_attention import tpu_attention

__all__ = [
    "ATTENTION_BACKENDS",
    "ATTENTION_OUTPUT",
    "REMAT_POLICIES",
    "Attend",
    "LayerNorm",
    "PositionTable",
    "Projection",
    "Purpose",
    "RMSNorm",
    "TimestepEmbedder",
    "apply_rope",
    "attention_weights",
    "auto_attention",
    "blockwise_attention",
    "choose_attention",
    "denoising_schedule",
    "dense_attention",
    "document_attention",
    "interpolate",
    "linear_dot",
    "make_key",
    "permute",
    "quantize_int8",
    "rope_frequencies",
    "rope_tables",
    "scan_layers",
    "shift_timesteps",
    "sincos_2d_table",
    "stack_layers",
    "timestep_sinusoid",
    "tpu_attention",
    "training_timesteps",
    "velocity_target",
]
