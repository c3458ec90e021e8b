"""Checks of the training path: embeddings, layers, losses and gradients of the recorded pack."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from loom_jax.converters.parity.packs import (
    flex_splits,
    original_arrays,
    packed_patches,
    padded_images,
    training_documents,
)
from loom_jax.converters.parity.port import Port, channels_first, channels_last
from loom_jax.converters.parity.records import Checked, Records
from loom_jax.converters.tables import model_entries
from loom_jax.data import Batch, Packable, pack, total_need
from loom_jax.document import NO_TOKEN
from loom_jax.models import LoomModel
from loom_jax.nn import Attend, blockwise_attention, dense_attention, interpolate, training_timesteps
from loom_jax.train import cross_entropy, loss_sums, mean_losses, training_forward, velocity_error


@dataclasses.dataclass(frozen=True)
class Pack:
    """The recorded pack: documents, batch of one row, and what was drawn for it, by gen token of the row."""

    documents: list[Packable]
    batch: Batch
    clean: np.ndarray
    noise: np.ndarray
    normal: np.ndarray
    latents: np.ndarray

    def to_packed(self, und: Any, gen: Any) -> np.ndarray:
        """Returns a stream pair [1, U, ...], [1, G, ...] as one array in the original's order of tokens."""
        offsets = np.cumsum([0, *(len(d.layout) for d in self.documents)])
        out = np.zeros((offsets[-1], und.shape[-1]), np.float32)
        for layout, values in ((self.batch.streams.und, und), (self.batch.streams.gen, gen)):
            out[offsets[layout.document[0]] + layout.order[0]] = np.asarray(values)[0]
        return out


def build_pack(records: Records, port: Port, spare: int = 0) -> Pack:
    """Packs the recorded documents into one row with `spare` filler in each stream.

    All VAE images are encoded as one zero-padded tensor, as the original does in training.
    """
    r = records.arrays("train")
    documents = [port.packable(segments) for segments in training_documents(records, port)]
    need = total_need(documents)
    budget = dataclasses.replace(need, und=need.und + spare, gen=need.gen + spare)
    batch = pack([documents], budget, port.tables)
    moments = port.vae.encode(channels_last(padded_images(documents)))
    latents = np.asarray(port.vae.sample(moments, channels_last(r["vae_noise"])))
    patch = port.config.latent_patch_size
    cut = latents.reshape(len(latents), latents.shape[1] // patch, patch, latents.shape[2] // patch, patch, -1)
    cut = cut.transpose(0, 1, 3, 2, 4, 5).reshape(*cut.shape[:2], cut.shape[3], -1)
    grids = [s.grid for d in documents for s in d.images("clean", "noisy")]
    tokens = [z[:rows, :columns].reshape(rows * columns, -1) for z, (rows, columns) in zip(cut, grids, strict=True)]
    filled = functools.partial(_with_filler, spare=spare)
    return Pack(
        documents,
        batch,
        filled(np.concatenate(tokens)),
        filled(r["noise"]),
        filled(r["packed_timesteps"]),
        latents,
    )


def _with_filler(x: np.ndarray, spare: int) -> np.ndarray:
    """[G, ...] -> [1, G + spare, ...]."""
    return np.pad(x, [(0, spare), *[(0, 0)] * (x.ndim - 1)])[None]


@functools.partial(jax.jit, static_argnames=("graphdef", "attend", "shift"))
def _outputs(graphdef: Any, params: Any, batch: Batch, drawn: Any, attend: Attend, shift: float) -> dict[str, Any]:
    model: LoomModel = nnx.merge(graphdef, params)
    clean, noise, normal = drawn
    t = training_timesteps(normal, shift)
    decoded = training_forward(model, batch.streams, clean, noise, t, attend=attend, return_layers=True)
    logits, velocity = model.logits(decoded.und), model.velocity(decoded.gen)
    noisy = batch.targets.noise_split != NO_TOKEN
    state = interpolate(clean, noise, t)
    return {
        "timesteps": t,
        "x_t": state,
        "h_in": (model.embed_und(batch.streams), model.embed_gen(state, t, batch.streams.latent_positions)),
        "layers": decoded.layers,
        "last_hidden": (decoded.und, decoded.gen),
        "logits": logits,
        "velocity": velocity,
        "ce": cross_entropy(logits, batch.targets.labels),
        "mse": velocity_error(velocity, clean, noise, noisy),
        "sums": loss_sums(model, decoded, batch.targets, clean, noise),
    }


def run_pack(port: Port, pack_: Pack, shift: float = 1.0, attend: Attend = dense_attention) -> dict[str, Any]:
    """Runs the training forward on a pack; everything by stream, see `_outputs`."""
    graphdef, params = nnx.split(port.model)
    return _outputs(graphdef, params, pack_.batch, (pack_.clean, pack_.noise, pack_.normal), attend=attend, shift=shift)


def _at_labels(pack_: Pack, values: Any) -> np.ndarray:
    return np.asarray(values)[0][pack_.batch.targets.labels[0] != NO_TOKEN]


def _at_noise(pack_: Pack, values: Any) -> np.ndarray:
    return np.asarray(values)[0][pack_.batch.targets.noise_split[0] != NO_TOKEN]


def check_train(records: Records, port: Port) -> Checked:
    """The training forward, from source pictures to losses."""
    r = records.arrays("train")
    pack_ = build_pack(records, port)
    out = run_pack(port, pack_)
    ce, mse = mean_losses(out["sums"])
    filler = int(r["split_lens_flex"][-1])
    flex = flex_splits(pack_.documents, filler)
    layers = {
        f"h_{i}": pack_.to_packed(out["layers"][0][i], out["layers"][1][i])
        for i in range(port.config.decoder.num_layers)
    }
    computed = original_arrays(pack_.documents, port) | layers
    computed |= {
        "split_lens_flex": flex["split_lens"],
        "attn_modes_flex": flex["attn_modes"],
        "padded_images": padded_images(pack_.documents),
        "packed_vit_tokens": packed_patches(pack_.documents, port.config.vit.patch_size),
        "padded_latent": channels_first(pack_.latents),
        "timesteps": out["timesteps"][0],
        "x_t": out["x_t"][0],
        "h_in": pack_.to_packed(*out["h_in"]),
        "last_hidden": pack_.to_packed(*out["last_hidden"]),
        "mse_pred": _at_noise(pack_, out["velocity"]),
        "ce_logits": _at_labels(pack_, out["logits"]),
        "ce": _at_labels(pack_, out["ce"]),
        "mse": _at_noise(pack_, out["mse"]),
        "ce_loss": ce,
        "mse_loss": mse,
        "loss": ce + mse,
    }
    fed = {name for name in r if name.startswith("src_image_")} | {"packed_timesteps", "vae_noise", "noise"}
    return Checked(computed, fed)


def check_train_alt(records: Records, port: Port) -> Checked:
    """The same pack with reweighting, another shift, filler under the blockwise attention, und gradients cut."""
    r = records.arrays("train_alt")
    plain, filled = build_pack(records, port), build_pack(records, port, spare=5)
    base, shifted = run_pack(port, plain), run_pack(port, plain, shift=3.0)
    flex = run_pack(port, filled, attend=blockwise_attention)
    reweighted = mean_losses(base["sums"], reweight=True)
    frozen_loss, frozen = loss_and_gradients(port, plain, freeze_und=True)
    computed = {
        "rw_ce_loss": reweighted[0],
        "rw_loss": sum(reweighted),
        "shift3_ce": _at_labels(plain, shifted["ce"]),
        "shift3_mse": _at_noise(plain, shifted["mse"]),
        "shift3_loss": sum(mean_losses(shifted["sums"])),
        "flex_ce": _at_labels(filled, flex["ce"]),
        "flex_mse": _at_noise(filled, flex["mse"]),
        "freeze_und_loss": frozen_loss,
        "freeze_und_norms": _norms(by_release_key(port, frozen), [str(n) for n in r["freeze_und_names"]]),
    }
    return Checked(computed, {"freeze_und_names"})


def check_train_grads(records: Records, port: Port) -> Checked:
    """Gradients of the loss of every parameter."""
    r = records.arrays("train_grads")
    _, found = loss_and_gradients(port, build_pack(records, port))
    gradients = by_release_key(port, found)
    out = Checked(inputs={"norm_names", "frozen_names"})
    for name in r:
        if match := re.fullmatch(r"grad\.([^\[]+)(?:\[:(\d+)\])?", name):
            gradient = gradients[match[1]]
            out.computed[name] = gradient if match[2] is None else gradient[: int(match[2])]
    named = [str(n) for n in r["norm_names"]]
    out.computed["norms"] = _norms(gradients, named)
    out.computed["total_norm"] = np.float32(np.sqrt((out.computed["norms"].astype(np.float64) ** 2).sum()))
    return out


def _norms(gradients: dict[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    return np.asarray([np.linalg.norm(gradients[name].astype(np.float64)) for name in names], np.float32)


@functools.partial(jax.jit, static_argnames=("graphdef", "freeze_und"))
def _value_and_grad(
    graphdef: Any, params: Any, batch: Batch, clean: Any, noise: Any, normal: Any, freeze_und: bool
) -> Any:
    def loss(params: Any) -> jax.Array:
        model = nnx.merge(graphdef, params)
        t = training_timesteps(normal, 1.0)
        decoded = training_forward(model, batch.streams, clean, noise, t, freeze_und=freeze_und)
        return jnp.sum(jnp.stack(mean_losses(loss_sums(model, decoded, batch.targets, clean, noise))))

    return jax.value_and_grad(loss)(params)


def loss_and_gradients(port: Port, pack_: Pack, params: Any = None, freeze_und: bool = False) -> tuple[Any, Any]:
    """Returns the pack's loss and its gradient by parameter; with the weights of the set unless others are given."""
    graphdef, own = nnx.split(port.model)
    drawn = pack_.clean, pack_.noise, pack_.normal
    return _value_and_grad(graphdef, own if params is None else params, pack_.batch, *drawn, freeze_und=freeze_und)


def by_release_key(port: Port, tree: Any) -> dict[str, np.ndarray]:
    """Returns values of all parameters by the key and in the shape of each tensor of the release."""
    flat = {"/".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(tree)}
    out = {}
    for entry in model_entries(port.config):
        if match := re.fullmatch(r"(.*layers)/(\d+)/(.*)", entry.path):
            leaf = flat[f"{match[1]}/{match[3]}"][int(match[2])]
        else:
            leaf = flat[entry.path]
        out[entry.key] = entry.to_torch(leaf)
    return out
