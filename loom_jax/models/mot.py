"""The mixture-of-transformers decoder: two streams, two experts, one joint attention (spec section 4, DESIGN 5.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from loom_jax.core import DecoderConfig
from loom_jax.document import TokenLayout
from loom_jax.models.capture import Capture, Captured, Watched, layer_slots, no_captures
from loom_jax.nn import (
    Attend,
    Projection,
    RMSNorm,
    apply_rope,
    auto_attention,
    dense_attention,
    rope_tables,
    scan_layers,
    stack_layers,
)

Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]
RopeTables = tuple[jax.Array, jax.Array]


def unconstrained(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """The default of `constrain(x, names)`: a model that runs on one device places nothing."""
    return x


class Backend(NamedTuple):
    """How a model computes on the devices at hand: its attention, and where activations are placed."""

    attend: Attend = auto_attention
    constrain: Constrain = unconstrained


class KeysValues(NamedTuple):
    """Keys (after norm and rope) and values of many tokens: [B, N, K, A], or [L, B, N, K, A] of all layers."""

    k: jax.Array
    v: jax.Array


class Past(NamedTuple):
    """Tokens that were already computed: keys and values [L, B, N, K, A] of every layer and their layout [B, N]."""

    kv: KeysValues
    layout: TokenLayout


class Decoded(NamedTuple):
    """What the decoder returns: hidden states after the final norms, und [B, U, D] and gen [B, G, D].

    `residual` holds both as they were before those norms, `kv` keys and values [L, B, U + G, K, A] of the new tokens
    if asked for, `layers` the output of every layer as ([L, B, U, D], [L, B, G, D]) if asked for, `captured` what a
    Capture asks for; else None.
    """

    und: jax.Array
    gen: jax.Array
    residual: tuple[jax.Array, jax.Array]
    kv: KeysValues | None
    layers: tuple[jax.Array, jax.Array] | None
    captured: Captured | None


def detach(x: Any, und: bool) -> Any:
    """Cuts the gradient of an und activation where `und` is set: the original's freeze_und (spec section 8)."""
    return jax.lax.stop_gradient(x) if und else x


class Expert(nnx.Module):
    """One parameter set of a layer. Projections keep heads apart: kernels [D, H, A] and [H, A, D]."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width, head = config.hidden_size, config.head_dim
        norm = {"epsilon": config.rms_norm_eps, **options}
        self.input_norm = RMSNorm(width, **norm)
        self.q_proj = Projection(width, (config.num_heads, head), **options)
        self.k_proj = Projection(width, (config.num_kv_heads, head), **options)
        self.v_proj = Projection(width, (config.num_kv_heads, head), **options)
        self.o_proj = Projection((config.num_heads, head), width, axis=(-2, -1), use_bias=False, **options)
        self.q_norm = RMSNorm(head, **norm)
        self.k_norm = RMSNorm(head, **norm)
        self.post_attention_norm = RMSNorm(width, **norm)
        self.gate_proj = Projection(width, config.intermediate_size, use_bias=False, **options)
        self.up_proj = Projection(width, config.intermediate_size, use_bias=False, **options)
        self.down_proj = Projection(config.intermediate_size, width, use_bias=False, **options)

    def project(self, x: jax.Array, rope: RopeTables) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, S, D] -> q [B, S, H, A], k and v [B, S, K, A]; q and k normed per head, then rotated."""
        x = self.input_norm(x)
        q = apply_rope(self.q_norm(self.q_proj(x)), rope)
        k = apply_rope(self.k_norm(self.k_proj(x)), rope)
        return q, k, self.v_proj(x)

    def mlp(self, x: jax.Array) -> jax.Array:
        """SwiGLU, [B, S, D] -> [B, S, D]."""
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


class MoTLayer(nnx.Module):
    """One decoder layer: each stream through its own expert, all tokens in one attention."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        self.und = Expert(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.gen = Expert(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)

    def attention(
        self,
        streams: tuple[jax.Array, jax.Array],
        ropes: tuple[RopeTables, RopeTables],
        layout: TokenLayout,
        past: Past | None = None,
        attend: Attend = dense_attention,
        constrain: Constrain = unconstrained,
        freeze_und: bool = False,
    ) -> tuple[tuple[jax.Array, jax.Array], KeysValues]:
        """Joint attention after the output projections: ((und [B, U, D], gen [B, G, D]), keys and values of all)."""
        und = detach(self.und.project(streams[0], ropes[0]), freeze_und)
        parts = zip(und, self.gen.project(streams[1], ropes[1]), strict=True)
        q, k, v = (
            constrain(jnp.concatenate(pair, axis=1), ("batch", "length", heads, None))
            for pair, heads in zip(parts, ("heads", "kv_heads", "kv_heads"), strict=True)
        )
        keys, values, k_layout = k, v, layout
        if past is not None:
            keys = jnp.concatenate([past.kv.k.astype(k.dtype), k], axis=1)
            values = jnp.concatenate([past.kv.v.astype(v.dtype), v], axis=1)
            k_layout = concatenate_layouts(past.layout, layout)
        attended = attend(q, keys, values, layout, k_layout)
        num_und = streams[0].shape[1]
        und_out = detach(self.und.o_proj(attended[:, :num_und]), freeze_und)
        return (und_out, self.gen.o_proj(attended[:, num_und:])), KeysValues(k, v)

    def __call__(
        self,
        streams: tuple[jax.Array, jax.Array],
        ropes: tuple[RopeTables, RopeTables],
        layout: TokenLayout,
        past: Past | None = None,
        attend: Attend = dense_attention,
        constrain: Constrain = unconstrained,
        freeze_und: bool = False,
    ) -> tuple[tuple[jax.Array, jax.Array], KeysValues]:
        """(und [B, U, D], gen [B, G, D]) -> the same after this layer, and the new tokens' keys and values.

        `layout` is that of both streams one after the other, `past` this layer's slice of earlier tokens.
        """
        attended, kv = self.attention(streams, ropes, layout, past, attend, constrain, freeze_und)
        out = []
        for expert, x, a in zip((self.und, self.gen), streams, attended, strict=True):
            x = constrain(x + a, ("batch", "length", "embed"))
            x = x + detach(expert.mlp(expert.post_attention_norm(x)), freeze_und and expert is self.und)
            out.append(constrain(x, ("batch", "length", "embed")))
        return (out[0], out[1]), kv


class FinalNorms(nnx.Module):
    """The norm after the last layer, one for each stream."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        options: dict[str, Any] = {"epsilon": config.rms_norm_eps, "dtype": dtype, "param_dtype": param_dtype}
        self.und = RMSNorm(config.hidden_size, rngs=rngs, **options)
        self.gen = RMSNorm(config.hidden_size, rngs=rngs, **options)


class Decoder(nnx.Module):
    """All layers, stacked and scanned, and the final norms."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        self.config = config
        self.layers = stack_layers(
            lambda r: MoTLayer(config, rngs=r, dtype=dtype, param_dtype=param_dtype), config.num_layers, rngs
        )
        self.norm = FinalNorms(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)

    def __call__(
        self,
        und: jax.Array,
        gen: jax.Array,
        und_layout: TokenLayout,
        gen_layout: TokenLayout,
        past: Past | None = None,
        *,
        attend: Attend = dense_attention,
        constrain: Constrain = unconstrained,
        remat: str = "none",
        freeze_und: bool = False,
        return_kv: bool = False,
        return_layers: bool = False,
        capture: Capture | None = None,
    ) -> Decoded:
        """und [B, U, D], gen [B, G, D] -> hidden states; see Decoded. Layouts [B, U] and [B, G].

        Raises:
          ConfigError: `remat` is not known, or `capture` names a layer that is not there.
        """
        head_dim, theta = self.config.head_dim, self.config.rope_theta
        ropes = (rope_tables(und_layout.position, head_dim, theta), rope_tables(gen_layout.position, head_dim, theta))
        layout = concatenate_layouts(und_layout, gen_layout)

        slots, captured = None, None
        if capture is not None:
            slots = layer_slots(capture, self.config.num_layers)
            captured = no_captures(
                capture, self.config.num_heads, (und, gen), 0 if past is None else past.kv.k.shape[2]
            )

        def apply(layer: MoTLayer, carry: Any, scanned: Any) -> tuple[Any, Any]:
            (streams, captured), (layer_kv, slots) = carry, scanned
            layer_past = None if layer_kv is None or past is None else Past(layer_kv, past.layout)
            watched = None if captured is None else Watched(attend, captured, slots)
            streams, kv = layer(streams, ropes, layout, layer_past, watched or attend, constrain, freeze_und)
            if watched is not None:
                watched.keep_hidden(streams)
                captured = watched.captured
            return (streams, captured), (kv if return_kv else None, streams if return_layers else None)

        scanned = (None if past is None else past.kv, slots)
        (streams, captured), (kv, layers) = scan_layers(
            self.layers, apply, ((und, gen), captured), scanned, remat=remat
        )
        normed = detach(self.norm.und(streams[0]), freeze_und), self.norm.gen(streams[1])
        return Decoded(*normed, streams, kv, layers, captured)


def concatenate_layouts(first: TokenLayout, second: TokenLayout) -> TokenLayout:
    """Joins two layouts [B, N] and [B, M] to [B, N + M]."""
    return TokenLayout(*(jnp.concatenate(pair, axis=1) for pair in zip(first, second, strict=True)))
