"""Weights of the decoder as int8, for inference in half the memory of bfloat16."""

from __future__ import annotations

from flax import nnx

from loom_jax.core import ConfigError
from loom_jax.models.loom import LoomModel
from loom_jax.nn import Projection

QUANTIZATIONS = ("int8",)
"""Names of the schemes that `quantize_decoder` knows."""


def quantize_decoder(model: LoomModel, scheme: str = "int8") -> None:
    """Turns the kernels of all projections of the decoder into int8 with a scale for each layer and output channel.

    All else keeps its dtype: embeddings, norms, biases, both heads, the ViT. The floats of one kernel are freed before
    the next is turned. Computation goes on in the model's dtype.

    Raises:
      ConfigError: `scheme` is not known.
    """
    if scheme not in QUANTIZATIONS:
        raise ConfigError(f"quantize={scheme!r} is not one of {', '.join(QUANTIZATIONS)}")
    for _, module in nnx.iter_modules(model.decoder):
        if isinstance(module, Projection):
            module.quantize()
