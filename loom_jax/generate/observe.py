"""Looking into a model at work: hidden states and attention of chosen layers for one request."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from loom_jax.core import InputError
from loom_jax.data import Packable, pack
from loom_jax.document import NOISE, EncodedSegment, ImageTokens, TokenLayout, lay_out
from loom_jax.generate.generator import Generator
from loom_jax.generate.requests import Request
from loom_jax.models import Capture, Captured


class Observed(NamedTuple):
    """What was seen of one request, which is the one row (B = 1) of every array.

    `und` int32 [1, U] and `gen` [1, G]: layouts of the two streams; attention has the tokens of both, und first.
    `token_ids` int32 [1, U]: text and marks, 0 at ViT tokens. `velocity` float32 [1, G, C].
    """

    captured: Captured
    und: TokenLayout
    gen: TokenLayout
    token_ids: np.ndarray
    velocity: np.ndarray


def observe(
    generator: Generator, request: Request, capture: Capture, latents: np.ndarray | None = None, time: float = 1.0
) -> Observed:
    """Runs the model once on a request and the picture that it asks for, and returns what chosen layers did.

    Text, pictures and the picture to be made are read in one forward pass, as in training: what a layer computes for
    them is what it computes while the picture is denoised, in the conditional branch.

    Args:
      generator: from `loom_jax.api.load`.
      request: for `understand` there is no picture to be made.
      capture: numbers of layers, see Capture.
      latents: float32 [cells, C], the picture at `time`; by default the noise that the request's seed starts from.
      time: between 1 (noise) and 0 (clean).

    Raises:
      InputError: the request cannot be met, or `latents` have another shape.
      ConfigError: there is no such layer.

    Example, how much the tokens of the picture look at each token of the text in layer 13, all heads together:
      seen = observe(generator, Request(("a red boat",)), Capture(attention=(13,)))
      weights = seen.captured.attention[0][0].mean(axis=0)
      text = seen.und.order.shape[1]
      weights[text:, :text].mean(axis=0)
    """
    source, config = generator.read_request(request), generator.config
    segments: list[EncodedSegment] = list(source.segments)
    states = list(source.latents)
    if request.task != "understand":
        rows, columns = (side // config.latent_stride for side in source.size)
        shape = rows * columns, config.latent_dim
        if latents is not None and latents.shape != shape:
            raise InputError(f"latents have shape {latents.shape}, the request's picture has {shape}")
        segments.append(ImageTokens("noisy", (rows, columns)))
        states.append(generator.noise.initial(request.seed, 0, *shape) if latents is None else latents)
    document = Packable(segments, lay_out(segments, generator.encoder.special))
    batch = pack([[document]], document.need, generator.tables)
    timesteps = np.where(batch.streams.gen.mode == NOISE, np.float32(time), np.float32(0))
    captured, velocity = generator.engine.look(batch.streams, generator.fill(batch, [states]), timesteps, capture)
    return Observed(captured, batch.streams.und, batch.streams.gen, batch.streams.token_ids, np.asarray(velocity))
