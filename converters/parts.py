"""An untrained Bagel from its parts: a plain Qwen2.5 folder, a SigLIP folder and the FLUX autoencoder's file.

Both experts begin as the language model; its queries and keys get norms of scale one; the velocity head is zero, so
that the first velocity is zero everywhere; what joins the parts is drawn from a seed (spec section 9, `init_moe`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loom_jax.checkpoint import check_shapes
from loom_jax.checkpoint.compare import named
from loom_jax.converters.release import POSITION_TABLES, Release, read_config, read_json, tokenizer_files, weight_files
from loom_jax.converters.tables import EXPERTS, Entry, autoencoder_entries, model_entries
from loom_jax.converters.tensors import TensorSource
from loom_jax.core import CheckpointError
from loom_jax.nn import sincos_2d_table

LATENT_PATCH = 2
"""Side of a latent token in latent cells."""

_LANGUAGE, _VISION = "language_model.", "vit_model."
_PATCHES = "vision_model.embeddings.patch_embedding.weight"
_POSITIONS = "vision_model.embeddings.position_embedding.weight"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"

# What a part may hold that Bagel has no use for: tables that are computed, SigLIP's pooling head and its text side.
_LEFT_OUT = re.compile(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|vision_model\.head\..*|text_model\..*|logit_(scale|bias)"
    r"|vision_model\.embeddings\.position_ids"
)
_HEAD_NORM = re.compile(r".*\.self_attn\.[qk]_norm\.weight")
_VIT_LAYER = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class _Made:
    """A tensor that no part holds: `norm` is ones, `zero` zeros, `table` sines and cosines, `drawn` a random Linear."""

    kind: str
    shape: tuple[int, ...]
    fan_in: int = 0


class PartsSource(TensorSource):
    """The tensors of Bagel by their torch keys, read from the parts' files or made.

    Args:
      files: safetensors files of the language model and of the ViT.
      taken: torch key of Bagel -> key in those files.
      made: torch key of Bagel -> what it is made as, in the dtype of the language model.
      seed: of the random ones.
    """

    def __init__(self, files: Sequence[Path], taken: Mapping[str, str], made: Mapping[str, _Made], seed: int) -> None:
        super().__init__(files)
        self._taken, self._made, self._seed = taken, made, seed
        raw_shapes, raw_dtypes = super().shapes, super().dtypes
        self._shapes = {key: _flat(raw_shapes[source]) for key, source in taken.items()}
        self._shapes |= {key: tensor.shape for key, tensor in made.items()}
        self._dtypes = {key: raw_dtypes[source] for key, source in taken.items()}
        self._dtypes |= dict.fromkeys(made, raw_dtypes[_EMBEDDING])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by key."""
        return self._shapes

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """Dtype by key."""
        return self._dtypes

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return sum(math.prod(shape) * self._dtypes[key].itemsize for key, shape in self._shapes.items())

    def __getitem__(self, key: str) -> np.ndarray:
        """Returns a tensor: a view of its file, or a new array."""
        if key not in self._taken:
            return self._make(key).astype(self._dtypes[key])
        array = super().__getitem__(self._taken[key])
        # A convolution [O, 3, P, P] becomes a Linear on patches whose values stand in the order row, column, channel.
        return array.transpose(0, 2, 3, 1).reshape(array.shape[0], -1) if array.ndim == 4 else array

    def _make(self, key: str) -> np.ndarray:
        made = self._made[key]
        if made.kind == "table":
            rows, width = made.shape
            return sincos_2d_table(width, math.isqrt(rows))
        if made.kind == "drawn":  # uniform within 1 / sqrt(inputs), weights and biases, as torch begins a Linear
            rng = np.random.default_rng([self._seed, *key.encode()])
            return rng.uniform(-1, 1, made.shape) / math.sqrt(made.fan_in)
        return np.full(made.shape, 1.0 if made.kind == "norm" else 0.0)


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], math.prod(shape[1:])) if len(shape) == 4 else shape


def open_parts(llm: Path, vit: Path, vae: Path, *, max_latent_size: int = 64, seed: int = 0) -> Release:
    """Opens the parts as if they were a release, without reading a value.

    Args:
      llm: Qwen2.5 folder: config.json, model.safetensors or its shards, tokenizer.
      vit: SigLIP folder: config.json, model.safetensors or its shards; the last layer is not used.
      vae: ae.safetensors of FLUX.
      max_latent_size: side of the table of latent positions, in tokens.

    Raises:
      CheckpointError: a part is missing, corrupt, holds unknown tensors or lacks some, or contradicts its config.json.
      TokenizerError: the tokenizer's files are missing or of an unknown kind.
    """
    for folder, what in ((llm, "Qwen2.5"), (vit, "SigLIP")):
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder: give the {what} folder with config.json and its weights")
    if not vae.is_file():
        raise CheckpointError(f"{vae} is not a file: give ae.safetensors of the FLUX autoencoder")
    llm_files, vit_files = (weight_files(folder, "model", "a Hugging Face model")[1] for folder in (llm, vit))
    raw, autoencoder = TensorSource([*llm_files, *vit_files]), TensorSource([vae])
    jsons = _configs(read_json(llm / "config.json"), read_json(vit / "config.json"), max_latent_size)
    sizes = _sizes(raw.shapes, autoencoder.shapes, jsons["llm_config.json"], max_latent_size)
    config = read_config(jsons, sizes, autoencoder.shapes, llm_files[0].name)
    taken, made = _plan(model_entries(config), raw.shapes, bool(jsons["config.json"].pop("tied")))
    model = PartsSource([*llm_files, *vit_files], taken, made, seed)
    way_out = "the parts are of other kinds, or a file was not downloaded to its end"
    check_shapes(f"{llm} and {vit}", model.shapes, {e.key: e.shape for e in model_entries(config)}, way_out)
    expected = {entry.key: entry.shape for entry in autoencoder_entries(config.vae)}
    check_shapes(str(vae), autoencoder.shapes, expected, way_out)
    return Release(llm, config, model, autoencoder, "parts", tuple(tokenizer_files(llm)), ())


def _configs(llm: dict[str, Any], vit: dict[str, Any], max_latent_size: int) -> dict[str, dict[str, Any]]:
    """The parts' config.json as the JSON files of a release; `tied` in config.json says whether lm_head is missing."""
    vit = vit.get("vision_config", vit)
    if "num_attention_heads" not in llm:
        raise CheckpointError("config.json of the language model lacks num_attention_heads: take the model's own file")
    tied = llm.get("tie_word_embeddings", False)
    llm = {key: value for key, value in llm.items() if key != "tie_word_embeddings"}
    top = {"max_latent_size": max_latent_size, "tied": tied}
    return {"llm_config.json": llm, "vit_config.json": vit, "config.json": top}


def _sizes(
    raw: Mapping[str, tuple[int, ...]],
    vae: Mapping[str, tuple[int, ...]],
    llm: Mapping[str, Any],
    max_latent_size: int,
) -> dict[str, tuple[int, ...]]:
    """Shapes by Bagel's keys, as far as they tell the sizes of the model."""
    query, first = "model.layers.0.self_attn.q_proj.weight", "vision_model.encoder.layers.0.mlp.fc1.weight"
    for key in (_EMBEDDING, query, _PATCHES, _POSITIONS, first):
        if key not in raw:
            raise CheckpointError(
                f"the parts lack {key}: the first must be a Qwen2.5 folder, the second a SigLIP folder"
            )
    if "encoder.conv_out.weight" not in vae:
        raise CheckpointError("the autoencoder lacks encoder.conv_out.weight: give ae.safetensors of FLUX")
    if len(raw[_PATCHES]) != 4:
        raise CheckpointError(f"{_PATCHES} has shape {raw[_PATCHES]}, expected a convolution [O, 3, P, P]")
    width, heads = raw[_EMBEDDING][1], llm["num_attention_heads"]
    latent = vae["encoder.conv_out.weight"][0] // 2 * LATENT_PATCH**2
    head = (raw[query][0] // heads,)
    sizes = {_LANGUAGE + key: shape for key, shape in raw.items() if key.startswith(("model.", "lm_head."))}
    last = _last_layer(raw)
    sizes |= {
        _VISION + key: _flat(shape)
        for key, shape in raw.items()
        if key.startswith("vision") and not key.startswith(last)
    }
    sizes[f"{_LANGUAGE}model.layers.0.self_attn.q_norm.weight"] = head
    return sizes | {"vae2llm.weight": (width, latent), POSITION_TABLES[1]: (max_latent_size**2, width)}


def _last_layer(raw: Mapping[str, tuple[int, ...]]) -> str:
    """How the keys of SigLIP's last layer begin, which Bagel does not use."""
    return f"vision_model.encoder.layers.{max(int(match[1]) for key in raw if (match := _VIT_LAYER.match(key)))}."


def _plan(
    entries: Sequence[Entry], raw: Mapping[str, tuple[int, ...]], tied: bool
) -> tuple[dict[str, str], dict[str, _Made]]:
    """Where each tensor of Bagel comes from: (taken, made). Every tensor of the parts is used, or left out by name."""
    taken: dict[str, str] = {}
    made: dict[str, _Made] = {}
    shapes = {entry.key: entry.shape for entry in entries}
    for key, shape in shapes.items():
        if key.startswith((_LANGUAGE, _VISION)):
            source = key.removeprefix(_LANGUAGE).removeprefix(_VISION).replace(EXPERTS["gen"], "")
            if source == _HEAD and tied and _HEAD not in raw:
                source = _EMBEDDING
            if _HEAD_NORM.fullmatch(source) and source not in raw:
                made[key] = _Made("norm", shape)
            else:
                taken[key] = source
        elif key in POSITION_TABLES:
            made[key] = _Made("table", shape)
        elif key.startswith("llm2vae."):
            made[key] = _Made("zero", shape)
        else:
            made[key] = _Made("drawn", shape, shapes[key.rsplit(".", 1)[0] + ".weight"][1])
    missing = [source for source in dict.fromkeys(taken.values()) if source not in raw]
    last = _last_layer(raw)
    unknown = [
        key
        for key in sorted(set(raw) - set(taken.values()))
        if not _LEFT_OUT.fullmatch(key) and not key.startswith(last)
    ]
    if missing or unknown:
        said = [
            f"{len(keys)} {what}: {named(keys)}" for what, keys in (("missing", missing), ("unknown", unknown)) if keys
        ]
        raise CheckpointError(
            f"the parts have tensors {'; '.join(said)}; give a plain Qwen2.5 and a SigLIP vision model"
        )
    return taken, made
