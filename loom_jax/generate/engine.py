"""The compiled calls of generation, and what they compiled. Everything above this file is plain Python over numpy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from loom_jax.data import Streams
from loom_jax.document import SpecialIds
from loom_jax.generate.buckets import canvas_side
from loom_jax.generate.context import BACKEND, Context, extend_context, start_context
from loom_jax.generate.denoise import denoise, guided_velocity
from loom_jax.generate.guidance import Guidance, RenormType
from loom_jax.generate.taylor import Forecast, forecast_velocity, start_forecast
from loom_jax.generate.text import DecodedText, TextControls, decode_text
from loom_jax.models import Autoencoder, Backend, Capture, Captured, LoomModel, to_uint8


class Denoising(NamedTuple):
    """All that stays the same over the steps of a batch of pictures: branches * B rows of contexts and queries."""

    contexts: Context
    streams: Streams
    guidance: Guidance
    schedule: jax.Array


class Engine:
    """Holds the weights and one jitted function for each kind of work; shapes decide what is compiled anew.

    Args:
      model: the transformer.
      vae: the autoencoder.
      special: marks that frame segments.
      vocabulary: number of real tokens; text never uses ids from here on.
      backend: attention and placing of activations.
    """

    def __init__(
        self,
        model: LoomModel,
        vae: Autoencoder,
        special: SpecialIds,
        vocabulary: int,
        backend: Backend = BACKEND,
    ):
        self.config, self.dtype = model.config, model.dtype
        self._graphdef, self._params = graphdef, _ = nnx.split(model)
        vae_graphdef, self._vae_params = nnx.split(vae)

        def start(params: Any, streams: Streams, latents: Any, position: Any, split: Any, capacity: int) -> Context:
            return start_context(nnx.merge(graphdef, params), streams, latents, position, split, capacity, backend)[0]

        def extend(
            params: Any, context: Context, streams: Streams, latents: Any, position: Any, split: Any
        ) -> tuple[Context, jax.Array]:
            model = nnx.merge(graphdef, params)
            context, decoded = extend_context(model, context, streams, latents, position, split, backend)
            return context, model.logits(decoded.und)

        def text(params: Any, context: Context, keys: Any, controls: TextControls, limit: Any, buffer: int) -> Any:
            model = nnx.merge(graphdef, params)
            return decode_text(model, context, keys, controls, limit, special, vocabulary, buffer, backend)

        def forecast(rows: int, cells: int) -> Forecast:
            return start_forecast(rows, cells, model.config.decoder.hidden_size, backend)

        def steps(
            params: Any, work: Denoising, x: Any, memory: Any, first: Any, last: Any, branches: int, renorm: RenormType
        ) -> Any:
            make = forecast_velocity if isinstance(memory, Forecast) else guided_velocity
            model = nnx.merge(graphdef, params)
            velocity = make(model, work.contexts, work.streams, work.guidance, branches, renorm, backend)
            return denoise(velocity, x, memory, work.schedule, first, last)

        def look(params: Any, streams: Streams, latents: Any, timesteps: Any, capture: Capture) -> Any:
            model = nnx.merge(graphdef, params)
            decoded = model(streams, latents, timesteps, capture=capture, **backend._asdict())
            return decoded.captured, model.velocity(decoded.gen)

        def encode(params: Any, pixels: Any, sizes: Any, noise: Any) -> jax.Array:
            vae = nnx.merge(vae_graphdef, params)
            return vae.sample(vae.encode(pixels, sizes), noise, sizes)

        def decode(params: Any, latents: Any, sizes: Any) -> jax.Array:
            return to_uint8(nnx.merge(vae_graphdef, params).decode(latents, sizes))

        self._start = jax.jit(start, static_argnames="capacity")
        self._extend = jax.jit(extend)
        self._text = jax.jit(text, static_argnames="buffer")
        self._forecast = jax.jit(forecast, static_argnums=(0, 1))
        self._steps = jax.jit(steps, static_argnames=("branches", "renorm"), donate_argnames="memory")
        self._look = jax.jit(look, static_argnames="capture")
        self._encode = jax.jit(encode)
        self._decode = jax.jit(decode)

    def use_weights(self, model: LoomModel) -> None:
        """Goes on with the weights of a model of the same structure; nothing is compiled anew."""
        self._params = nnx.split(model)[1]

    def model(self) -> LoomModel:
        """Returns the transformer with its weights."""
        return nnx.merge(self._graphdef, self._params)

    def compilations(self) -> dict[str, int]:
        """Returns how many shapes each compiled call has seen: a server's life should hold a handful."""
        calls: dict[str, Any] = {
            "start": self._start,
            "extend": self._extend,
            "text": self._text,
            "forecast": self._forecast,
            "steps": self._steps,
            "look": self._look,
            "encode": self._encode,
            "decode": self._decode,
        }
        return {name: call._cache_size() for name, call in calls.items()}

    def start(
        self, streams: Streams, latents: np.ndarray, position: np.ndarray, split: np.ndarray, capacity: int
    ) -> Context:
        """Reads documents into new contexts; see `start_context`."""
        return self._start(self._params, streams, latents, position, split, capacity=capacity)

    def extend(
        self, context: Context, streams: Streams, latents: np.ndarray, position: np.ndarray, split: np.ndarray
    ) -> tuple[Context, jax.Array]:
        """Reads more into contexts; also returns the logits of the new und tokens, float32 [B, U, vocab]."""
        return self._extend(self._params, context, streams, latents, position, split)

    def decode_text(
        self, context: Context, keys: jax.Array, controls: TextControls, max_new_tokens: int, buffer: int
    ) -> DecodedText:
        """Writes text after contexts; see `decode_text`."""
        return self._text(self._params, context, keys, controls, np.int32(max_new_tokens), buffer=buffer)

    def denoise(
        self,
        work: Denoising,
        x: np.ndarray,
        num_steps: int,
        branches: int,
        renorm: RenormType,
        chunks: int = 1,
        taylorseer: bool = False,
    ) -> Iterator[tuple[int, jax.Array]]:
        """Denoises x [B, G, C] over `num_steps` steps, in about `chunks` parts; yields (steps done, state) after each.

        The number of parts changes neither the result nor what is compiled. `taylorseer` predicts most steps instead of
        computing them, see `forecast_velocity`.
        """
        work, state = jax.device_put((work, x))  # once: the parts share it
        memory = self._memory(work, x, taylorseer)
        chunk = -(-num_steps // chunks)
        for first in range(0, num_steps, chunk):
            last = min(first + chunk, num_steps)
            span = jax.device_put((np.int32(first), np.int32(last)))
            state, memory = self._steps(self._params, work, state, memory, *span, branches=branches, renorm=renorm)
            yield last, state

    def _memory(self, work: Denoising, x: np.ndarray, taylorseer: bool) -> Any:
        """What the velocity remembers before the first step."""
        if not taylorseer:
            return ()
        return self._forecast(work.contexts.length.shape[0], x.shape[1])

    def look(
        self, streams: Streams, latents: np.ndarray, timesteps: np.ndarray, capture: Capture
    ) -> tuple[Captured, jax.Array]:
        """Runs whole documents at timesteps [B, G]; returns what `capture` asks for, and the velocity [B, G, C]."""
        return self._look(self._params, streams, latents, timesteps, capture=capture)

    def lower_denoising(self, work: Denoising, x: Any, branches: int, renorm: RenormType = "global") -> Any:
        """Returns the denoising loop as `jax.stages.Lowered`, for shapes in place of arrays: for plans."""
        span = (jax.ShapeDtypeStruct((), jnp.int32),) * 2
        return self._steps.lower(self._params, work, x, (), *span, branches=branches, renorm=renorm)

    def encode_image(self, pixels: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Returns the latents [h, w, C] of one image [H, W, 3] in [-1, 1], encoded as if alone; `noise` [h, w, C]."""
        height, width = pixels.shape[:2]
        down = self.config.vae.downsample
        canvas = _on_canvas(pixels, canvas_side(height), canvas_side(width))
        draws = _on_canvas(noise, canvas.shape[0] // down, canvas.shape[1] // down)
        sizes = np.asarray([[height, width]], np.int32)
        latents = np.asarray(self._encode(self._vae_params, canvas[None], sizes, draws[None]))
        return latents[0, : height // down, : width // down]

    def decode_image(self, latents: np.ndarray) -> np.ndarray:
        """Returns the picture uint8 [H, W, 3] of latents [h, w, C], decoded as if alone."""
        down = self.config.vae.downsample
        height, width = latents.shape[0] * down, latents.shape[1] * down
        canvas = _on_canvas(latents, canvas_side(height) // down, canvas_side(width) // down)
        sizes = np.asarray([[height, width]], np.int32)
        pixels = np.asarray(self._decode(self._vae_params, canvas[None], sizes))
        return pixels[0, :height, :width]


def _on_canvas(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """Lays x [h, w, C] into the top left corner of a canvas of zeros."""
    canvas = np.zeros((height, width, x.shape[2]), np.float32)
    canvas[: x.shape[0], : x.shape[1]] = x
    return canvas
