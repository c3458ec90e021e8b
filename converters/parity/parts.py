"""Checks of single parts: positions, rope and norms, one layer, logits, ViT, autoencoder, timesteps, masks."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from loom_jax.converters.parity.port import Port, channels_first, channels_last
from loom_jax.converters.parity.records import Checked, Records
from loom_jax.data import Streams
from loom_jax.document import (
    TokenLayout,
    grid_position_ids,
    interpolated_position_ids,
    may_attend,
    pack_latent,
    patchify,
    unpack_latent,
)
from loom_jax.models import Autoencoder
from loom_jax.nn import (
    apply_rope,
    denoising_schedule,
    rope_frequencies,
    rope_tables,
    sincos_2d_table,
    timestep_sinusoid,
    training_timesteps,
)


def check_pos(records: Records, port: Port) -> Checked:
    """Position tables and position ids."""
    recorded, out = records.arrays("pos"), Checked()
    for name in recorded:
        if match := re.fullmatch(r"sincos_(\d+)_(\d+)", name):
            out.computed[name] = sincos_2d_table(int(match[1]), int(match[2]))
        elif match := re.fullmatch(r"(ext|int)_\d+_ids", name):
            height, width, patch, side = recorded[name.replace("ids", "args")]
            ids = grid_position_ids if match[1] == "ext" else interpolated_position_ids
            out.computed[name] = ids((height // patch, width // patch), int(side))
        elif name.endswith("_args"):
            out.inputs.add(name)
    for name in ("latent_pos_embed", "vit_pos_embed"):
        out.computed[name] = port.params[f"{name}/table"]
    return out


def check_rope(records: Records, port: Port) -> Checked:
    """Rotary tables, their use, and the norms and MLP of single experts."""
    r, decoder, layer = records.arrays("rope"), port.config.decoder, port.expert_layer(0)
    tables = rope_tables(r["positions"][None], decoder.head_dim, decoder.rope_theta)
    q, k, h = r["q_in"][None], r["k_in"][None], r["h_in"]
    out = Checked(inputs={"positions", "q_in", "k_in", "h_in"})
    out.computed = {
        "inv_freq": rope_frequencies(decoder.head_dim, decoder.rope_theta),
        "cos": jnp.concatenate([tables[0][0]] * 2, axis=-1),
        "sin": jnp.concatenate([tables[1][0]] * 2, axis=-1),
        "q_rot": apply_rope(q, tables)[0],
        "k_rot": apply_rope(k, tables)[0],
        "q_norm_out": layer.und.q_norm(r["q_in"]),
        "q_norm_moe_gen_out": layer.gen.q_norm(r["q_in"]),
        "k_norm_out": layer.und.k_norm(r["k_in"]),
        "k_norm_moe_gen_out": layer.gen.k_norm(r["k_in"]),
        "input_layernorm_out": layer.und.input_norm(h),
        "norm_moe_gen_out": port.model.decoder.norm.gen(h),
        "mlp_out": layer.und.mlp(h),
        "mlp_moe_gen_out": layer.gen.mlp(h),
    }
    return out


def split_layout(split_lengths: list[np.ndarray], modes: list[np.ndarray], positions: np.ndarray | None) -> TokenLayout:
    """Returns the layout [S] of documents that are given as split lengths and modes."""
    lengths = [int(s.sum()) for s in split_lengths]
    total = sum(lengths)
    return TokenLayout(
        document=np.repeat(np.arange(len(lengths)), lengths).astype(np.int32),
        split=np.concatenate([np.repeat(np.arange(len(s)), s) for s in split_lengths]).astype(np.int32),
        mode=np.concatenate([np.repeat(m, s) for m, s in zip(modes, split_lengths, strict=True)]).astype(np.int32),
        order=np.concatenate([np.arange(n) for n in lengths]).astype(np.int32),
        position=np.zeros(total, np.int32) if positions is None else positions,
    )


LAYER_MODES = ([0, 1, 0, 2], [0, 2])
"""Modes of the recorded layer's splits: spoken of in the set's README, not recorded as arrays."""


def check_mot_layer(records: Records, port: Port) -> Checked:
    """One decoder layer on two packed documents."""
    r = records.arrays("mot_layer")
    lengths = [r["split_lens_0"], r["split_lens_1"]]
    flat = split_layout(lengths, [np.asarray(m) for m in LAYER_MODES], r["position_ids"])
    und, gen = r["und_idx"], r["gen_idx"]
    pick = [TokenLayout(*(a[index][None] for a in flat)) for index in (und, gen)]
    joint = TokenLayout(*(np.concatenate(pair, axis=1) for pair in zip(*pick, strict=True)))
    decoder, layer = port.config.decoder, port.expert_layer(1)
    ropes = tuple(rope_tables(p.position, decoder.head_dim, decoder.rope_theta) for p in pick)
    streams = (jnp.asarray(r["x"][None, und]), jnp.asarray(r["x"][None, gen]))

    def whole(parts: Any) -> np.ndarray:
        out = np.zeros_like(r["x"])
        out[und], out[gen] = parts[0][0], parts[1][0]
        return out

    attended, _ = nnx.jit(lambda layer: layer.attention(streams, ropes, joint))(layer)
    result, _ = nnx.jit(lambda layer: layer(streams, ropes, joint))(layer)
    mask = may_attend(flat, flat)
    edge = int(r["sample_lens"][0])
    return Checked(
        computed={
            "attn_out": whole(attended),
            "out": whole(result),
            "mask_0": mask[:edge, :edge],
            "mask_1": mask[edge:, edge:],
            "sample_lens": [int(s.sum()) for s in lengths],
        },
        inputs={"x", "split_lens_0", "split_lens_1", "position_ids", "und_idx", "gen_idx"},
    )


def text_streams(ids: np.ndarray, patch_dim: int) -> Streams:
    """Returns one row that is a single causal run of given tokens, as the original's bare language model reads it."""
    n = len(ids)
    zero, empty = np.zeros((1, n), np.int32), np.zeros((1, 0), np.int32)
    order = np.arange(n, dtype=np.int32)[None]
    return Streams(
        und=TokenLayout(zero, zero, zero, order, order),
        token_ids=ids[None].astype(np.int32),
        vit_index=zero - 1,
        gen=TokenLayout(*[empty] * 5),
        latent_positions=empty,
        patches=np.zeros((1, 0, patch_dim), np.float32),
        vit_positions=empty,
        vit_segments=empty,
    )


def check_llm_und(records: Records, port: Port) -> Checked:
    """The decoder as a plain language model."""
    r = records.arrays("llm_und")
    streams = text_streams(r["ids"], port.config.vit.patch_dim)
    latents = np.zeros((1, 0, port.config.latent_dim), np.float32)
    decoded = port.model(streams, latents, np.zeros((1, 1), np.float32), return_kv=True)
    assert decoded.kv is not None
    return Checked(
        computed={
            "hidden": decoded.und[0],
            "logits": port.model.logits(decoded.und)[0],
            "k0": decoded.kv.k[0, 0],
            "v0": decoded.kv.v[0, 0],
        },
        inputs={"ids"},
    )


def check_vit(records: Records, port: Port) -> Checked:
    """The ViT on two packed images, the connector, and the tokens that enter the decoder."""
    r, model = records.arrays("vit"), port.model
    side, patch = port.config.vit_max_num_patch_per_side, port.config.vit.patch_size
    images = [channels_last(r[f"image_{i}"]) for i in range(2)]
    grids = [(image.shape[0] // patch, image.shape[1] // patch) for image in images]
    patches = np.concatenate([patchify(image, patch) for image in images])
    ids = np.concatenate([grid_position_ids(grid, side) for grid in grids])
    lengths = [rows * columns for rows, columns in grids]
    segments = np.repeat(np.arange(2), lengths).astype(np.int32)
    seen = model.vit.activations(patches[None], ids[None], segments[None])
    connected = model.connector(seen.features)
    position = model.vit_pos_embed(ids)
    assert seen.layers is not None
    computed: dict[str, Any] = {
        "patches": patches,
        "position_ids": ids,
        "cu_seqlens": np.cumsum([0, *lengths]),
        "embeddings": seen.embeddings[0],
        "features": seen.features[0],
        "connector": connected[0],
        "vit_pos": position,
        "tokens": connected[0] + position,
    }
    computed |= {f"layer_{i}": seen.layers[i, 0] for i in range(port.config.vit.num_layers)}
    return Checked(computed, {"image_0", "image_1"})


def check_vae(records: Records, port: Port) -> Checked:
    """The autoencoder, whole and in parts, and the packing of latents."""
    r, vae = records.arrays("vae"), port.vae
    last = {name: channels_last(r[name]) for name in r if r[name].ndim == 4}
    layers = nnx.jit(_autoencoder_layers)(vae, last)
    patch = port.config.latent_patch_size
    packed = pack_latent(channels_last(r["pack_in"]), patch)
    grid = (r["pack_in"].shape[1] // patch, r["pack_in"].shape[2] // patch)
    computed: dict[str, Any] = {name: channels_first(value) for name, value in layers.items()}
    computed |= {
        "scale_factor": np.float32(vae.config.scale_factor),
        "shift_factor": np.float32(vae.config.shift_factor),
        "pack_out": packed,
        "unpack_out": channels_first(unpack_latent(packed, grid, patch))[None],
        "patchify_out": patchify(channels_last(r["patchify_in"]), port.config.vit.patch_size),
    }
    fed = {"image", "noise", "z_dec", "padded_batch", "res_in", "attn_in", "down_in", "up_in", "pack_in", "patchify_in"}
    return Checked(computed, fed)


def _autoencoder_layers(vae: Autoencoder, given: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns what the autoencoder and its parts make of the recorded inputs."""
    moments = vae.encode(given["image"])
    z = vae.sample(moments, given["noise"])
    encoded = dict(vae.encoder.stages(given["image"]))
    decoded = dict(vae.decoder.stages(z / vae.config.scale_factor + vae.config.shift_factor))
    part = given["enc_down0"].shape[-1]
    mid = f"mid.{_last_block(encoded)}"
    return {
        "mean": moments.mean,
        "logvar": moments.logvar,
        "z": z,
        "enc_down0": encoded["down.0.downsample"][..., :part],
        "enc_mid": encoded[mid],
        "dec_mid": decoded[mid],
        "decoded": vae.decode(given["z_dec"]),
        "roundtrip": vae.decode(z),
        "padded_mean": vae.encode(given["padded_batch"]).mean,
        "res_out": vae.encoder.down[1].block[0](given["res_in"]),
        "attn_out": vae.encoder.mid.attn_1(given["attn_in"]),
        "down_out": vae.encoder.down[0].downsample(given["down_in"]),
        "up_out": vae.decoder.up[1].upsample(given["up_in"]),
    }


def _last_block(stages: dict[str, Any]) -> str:
    """Returns the name of the middle's last block."""
    return max(name.removeprefix("mid.") for name in stages if name.startswith("mid.block"))


def check_time(records: Records, port: Port) -> Checked:
    """Timestep embedding, sampling schedules, and the timesteps of training."""
    r = records.arrays("time")
    out = Checked(inputs={"t", "train_normal"})
    out.computed = {"sinusoid": timestep_sinusoid(r["t"]), "embed": port.model.time_embedder(r["t"])}
    for name in r:
        if match := re.fullmatch(r"(steps|dts)_(\d+)_(\d+)", name):
            schedule = denoising_schedule(int(match[2]), float(match[3]))
            out.computed[name] = schedule[:-1] if match[1] == "steps" else schedule[:-1] - schedule[1:]
        elif match := re.fullmatch(r"train_t_(\d+)", name):
            out.computed[name] = training_timesteps(jnp.asarray(r["train_normal"]), float(match[1]))
    return out


def check_mask(records: Records, port: Port) -> Checked:
    """The mask rule, document by document and on a whole padded pack."""
    r = records.arrays("mask")
    count = sum(name.startswith("dense_") for name in r)
    lengths, modes = ([r[f"{kind}_{i}"] for i in range(count)] for kind in ("split_lens", "modes"))
    out = Checked(inputs={"pad_len", *(f"{kind}_{i}" for kind in ("split_lens", "modes") for i in range(count))})
    for i in range(count):
        layout = split_layout(lengths[i : i + 1], modes[i : i + 1], None)
        out.computed[f"dense_{i}"] = may_attend(layout, layout)
    # The original's filler is one more causal document; ours attends to nothing. Both are compared: the records
    # through a causal document, our filler in the project's tests.
    filler = np.asarray([int(r["pad_len"])])
    whole = split_layout([*lengths, filler], [*modes, np.asarray([0])], None)
    out.computed["sparse"] = may_attend(whole, whole)
    return out
