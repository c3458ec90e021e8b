"""Reading a release folder: weights, tokenizer files, and a configuration whose every size comes from the weights."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loom_jax.checkpoint import check_shapes, refuse_address
from loom_jax.converters.tables import Entry, autoencoder_entries, model_entries
from loom_jax.converters.tensors import TensorSource
from loom_jax.core import CheckpointError, LoomConfig, TokenizerError, from_mapping

Shapes = Mapping[str, tuple[int, ...]]

WEIGHTS = ("ema", "model")
"""The two sets of weights that a training run of the original leaves; the release has the first."""

AUTOENCODER = "ae.safetensors"
POSITION_TABLES = ("vit_pos_embed.pos_embed", "latent_pos_embed.pos_embed")
"""Tensors that a release may lack: they are computed, never trained."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
CONFIG_FILES = (
    "llm_config.json",
    "vit_config.json",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
)

_LLM, _VIT = "language_model.model.", "vit_model.vision_model."
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SENTENCEPIECE = ("*.model", "*.spm", "*.vocab")

# What this framework computes in one way only: file, key, value.
_FIXED = (
    ("llm_config.json", "hidden_act", "silu"),
    ("llm_config.json", "tie_word_embeddings", False),
    ("llm_config.json", "rope_scaling", None),
    ("llm_config.json", "use_sliding_window", False),
    ("vit_config.json", "hidden_act", "gelu_pytorch_tanh"),
    ("config.json", "connector_act", "gelu_pytorch_tanh"),
)


@dataclasses.dataclass(frozen=True)
class Release:
    """A release folder whose files were checked against each other.

    Attributes:
      path: the folder.
      config: of the networks.
      model, vae: the tensors of the transformer and of the autoencoder.
      weights: `ema` or `model`: which weights of the transformer.
      files: names of tokenizer and configuration files, to be taken along.
      recomputed: keys of position tables that the weights lack.
    """

    path: Path
    config: LoomConfig
    model: TensorSource
    vae: TensorSource
    weights: str
    files: tuple[str, ...]
    recomputed: tuple[str, ...]

    @property
    def model_entries(self) -> list[Entry]:
        """Every tensor of the transformer, those to be recomputed included."""
        return model_entries(self.config)

    @property
    def vae_entries(self) -> list[Entry]:
        """Every tensor of the autoencoder."""
        return autoencoder_entries(self.config.vae)


def open_release(path: Path, weights: str | None = None) -> Release:
    """Opens a release folder and checks it, without reading a value.

    Args:
      weights: `ema` or `model`; by default what is there, `ema` first.

    Raises:
      CheckpointError: files are missing, corrupt or pickles; keys are missing or unknown; a shape is wrong; or a
        configuration disagrees with the weights.
      TokenizerError: the tokenizer's files are missing or of an unknown kind.
    """
    refuse_address(path, "a release")
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a folder: give the release folder that holds ema.safetensors and ae.safetensors"
        )
    weights, paths = weight_files(path, weights)
    vae_path = path / AUTOENCODER
    if not vae_path.is_file():
        raise _missing(path, AUTOENCODER, "ae.*")
    model, vae = TensorSource(paths), TensorSource([vae_path])
    _check_index(path, weights, model)
    files = (*tokenizer_files(path), *(name for name in CONFIG_FILES if (path / name).is_file()))
    jsons = {name: read_json(path / name) for name in CONFIG_FILES[:3] if (path / name).is_file()}
    config = read_config(jsons, model.shapes, vae.shapes, paths[0].name)
    recomputed = tuple(key for key in POSITION_TABLES if key not in model.shapes)
    expected = {entry.key: entry.shape for entry in model_entries(config) if entry.key not in recomputed}
    way_out = "the folder is no BAGEL release, or the file was not downloaded to its end"
    check_shapes(", ".join(file.path.name for file in model.files[:2]), model.shapes, expected, way_out)
    check_shapes(
        AUTOENCODER, vae.shapes, {entry.key: entry.shape for entry in autoencoder_entries(config.vae)}, way_out
    )
    return Release(path, config, model, vae, weights, files, recomputed)


def weight_files(path: Path, weights: str | None, what: str = "a BAGEL release") -> tuple[str, list[Path]]:
    """Returns which weights to use, and their files.

    Raises:
      CheckpointError: they are not there, or are pickles, or an index names what is not there.
    """
    if weights is not None and weights not in WEIGHTS:
        raise CheckpointError(f"weights {weights!r} are not one of {', '.join(WEIGHTS)}")
    for name in WEIGHTS if weights is None else (weights,):
        if (path / f"{name}.safetensors").is_file():
            return name, [path / f"{name}.safetensors"]
        index = _index_of(path, name)
        if index.is_file():
            return name, _shards(index)
    raise _missing(path, " or ".join(f"{name}.safetensors" for name in ([weights] if weights else WEIGHTS)), "*", what)


def _index_of(path: Path, name: str) -> Path:
    return path / f"{name}.safetensors.index.json"


def _shards(index: Path) -> list[Path]:
    """The files that an index names."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index} has no weight_map that gives the file of each tensor: download it again")
    names = sorted(set(places.values()))
    for name in names:
        if name != Path(name).name:
            raise CheckpointError(f"{index} names shard {name!r}: shards must lie beside their index")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names shard {name}, which is not there: download it")
    return [index.parent / name for name in names]


def _check_index(path: Path, weights: str, model: TensorSource) -> None:
    """Checks that every tensor lies in the shard that the index names."""
    index = _index_of(path, weights)
    if (path / f"{weights}.safetensors").is_file() or not index.is_file():
        return
    for key, name in read_json(index)["weight_map"].items():
        if key not in model.shapes or model.file_of(key).name != name:
            raise CheckpointError(f"{index} says that {name} holds {key}, which it does not: download both again")


def _missing(path: Path, name: str, pattern: str, what: str = "a BAGEL release") -> CheckpointError:
    """The error for weights that are not there, or are pickles."""
    pickles = sorted(file.name for file in path.glob(pattern) if file.suffix in _PICKLES)
    if pickles:
        return CheckpointError(
            f"{path / pickles[0]} is a pickle, which can run code when loaded, so it is never loaded: save its tensors "
            f"with safetensors.torch.save_file as {name}"
        )
    return CheckpointError(f"{path} holds no {name}: give the folder of {what}")


def tokenizer_files(path: Path) -> list[str]:
    """Returns the names of the tokenizer's files.

    Raises:
      TokenizerError: they are missing or of an unknown kind.
    """
    names = [name for name in TOKENIZER_FILES if (path / name).is_file()]
    if "tokenizer.json" in names or {"vocab.json", "merges.txt"} <= set(names):
        return names
    others = sorted(file.name for pattern in _SENTENCEPIECE for file in path.glob(pattern))
    if others:
        raise TokenizerError(
            f"{path / others[0]} is a tokenizer of another kind (sentencepiece): a byte-level BPE tokenizer is needed, "
            "as tokenizer.json or as vocab.json with merges.txt"
        )
    raise TokenizerError(
        f"{path} holds no tokenizer: tokenizer.json, or vocab.json and merges.txt, must lie beside the weights"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      CheckpointError: it is unreadable or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected an object: download it again")
    return value


class _Sizes:
    """Sizes read off the shapes of one file's tensors."""

    def __init__(self, shapes: Shapes, file: str) -> None:
        self.shapes, self.file = shapes, file

    def axis(self, key: str, axis: int, ndim: int) -> int:
        """Length of one axis of a tensor."""
        if key not in self.shapes:
            raise CheckpointError(f"{self.file} lacks {key}: the folder is no BAGEL release, or its format is another")
        shape = self.shapes[key]
        if len(shape) != ndim:
            raise CheckpointError(f"{self.file}: {key} has shape {shape}, expected {ndim} axes")
        return shape[axis]

    def count(self, pattern: str) -> int:
        """One more than the largest number that `pattern` finds in the keys; gaps come out as missing keys later."""
        return max((int(match[1]) for key in self.shapes if (match := re.match(pattern, key))), default=-1) + 1

    def root(self, key: str, rows: int) -> int:
        """Side of a square grid."""
        if math.isqrt(rows) ** 2 != rows:
            raise CheckpointError(f"{self.file}: {key} has {rows} rows, which make no square grid")
        return math.isqrt(rows)

    def ratio(self, key: str, whole: int, part: int, what: str) -> int:
        """How often `part` fits."""
        if part < 1 or whole % part:
            raise CheckpointError(f"{self.file}: {key} has {whole} rows, no multiple of {what} {part}")
        return whole // part


def read_config(jsons: Mapping[str, Mapping[str, Any]], model: Shapes, vae: Shapes, file: str) -> LoomConfig:
    """Returns the configuration that the weights have, completed from the release's JSON files.

    Args:
      jsons: llm_config.json, vit_config.json, config.json, as far as they are there.
      model, vae: shapes of the tensors by key.
      file: name of the model's file, for messages.

    Raises:
      CheckpointError: a JSON file and the weights disagree, or a size cannot be told.
    """
    top = jsons.get("config.json", {})
    llm, vit = (
        jsons.get("llm_config.json", top.get("llm_config", {})),
        jsons.get("vit_config.json", top.get("vit_config", {})),
    )
    sizes = _Sizes(model, file)
    autoencoder = _autoencoder_config(_Sizes(vae, AUTOENCODER), top.get("vae_config", {}))
    decoder = _decoder_config(sizes, llm)
    siglip = _siglip_config(sizes, vit)
    side = sizes.root(f"{_VIT}embeddings.position_embedding.weight", siglip["num_positions"])
    table = POSITION_TABLES[1]
    tokens = sizes.axis("vae2llm.weight", 1, 2)
    patch = sizes.ratio("vae2llm.weight", tokens, autoencoder["z_channels"], "z_channels")
    max_latent = sizes.root(table, model[table][0]) if model.get(table) else top.get("max_latent_size", 64)
    config = {
        "decoder": decoder,
        "vit": siglip,
        "vae": autoencoder,
        "max_latent_size": max_latent,
        "vit_max_num_patch_per_side": side,
        "latent_patch_size": sizes.root("vae2llm.weight", patch),
        **{key: top[key] for key in ("timestep_shift", "interpolate_pos") if key in top},
    }
    loom = from_mapping(LoomConfig, config, "")
    for name, content in (("llm_config.json", llm), ("vit_config.json", vit), ("config.json", top)):
        _check_agreement(name, content, _truth(loom, name))
    for name, key in (("llm_config.json", "llm_config"), ("vit_config.json", "vit_config"), ("vae", "vae_config")):
        _check_agreement(f"config.json {key}", top.get(key, {}), _truth(loom, name))
    return loom


def _decoder_config(sizes: _Sizes, llm: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of DecoderConfig."""
    layer = f"{_LLM}layers.0."
    head = sizes.axis(f"{layer}self_attn.q_norm.weight", 0, 1)
    query, key = f"{layer}self_attn.q_proj.weight", f"{layer}self_attn.k_proj.weight"
    return {
        "vocab_size": sizes.axis(f"{_LLM}embed_tokens.weight", 0, 2),
        "hidden_size": sizes.axis(f"{_LLM}embed_tokens.weight", 1, 2),
        "intermediate_size": sizes.axis(f"{layer}mlp.gate_proj.weight", 0, 2),
        "num_layers": sizes.count(re.escape(_LLM) + r"layers\.(\d+)\."),
        "num_heads": sizes.ratio(query, sizes.axis(query, 0, 2), head, "head width"),
        "num_kv_heads": sizes.ratio(key, sizes.axis(key, 0, 2), head, "head width"),
        "head_dim": head,
        "rope_theta": llm.get("rope_theta", 1e6),
        "rms_norm_eps": llm.get("rms_norm_eps", 1e-6),
    }


def _siglip_config(sizes: _Sizes, vit: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of SiglipConfig. The number of heads leaves no trace in the weights."""
    patch, layers = f"{_VIT}embeddings.patch_embedding.weight", f"{_VIT}encoder.layers."
    if "num_attention_heads" not in vit:
        raise CheckpointError(
            "vit_config.json lacks num_attention_heads, which the weights cannot tell: add it (16 in the release)"
        )
    values = sizes.axis(patch, 1, 2)
    return {
        "hidden_size": sizes.axis(patch, 0, 2),
        "intermediate_size": sizes.axis(f"{layers}0.mlp.fc1.weight", 0, 2),
        "num_layers": sizes.count(re.escape(layers) + r"(\d+)\."),
        "num_heads": vit["num_attention_heads"],
        "patch_size": sizes.root(patch, sizes.ratio(patch, values, 3, "channels")),
        "num_positions": sizes.axis(f"{_VIT}embeddings.position_embedding.weight", 0, 2),
        "layer_norm_eps": vit.get("layer_norm_eps", 1e-6),
    }


def _autoencoder_config(sizes: _Sizes, given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of AutoencoderConfig. Scale, shift and the groups of norms leave no trace in the weights."""
    ch = sizes.axis("encoder.conv_in.weight", 0, 4)
    firsts = [f"encoder.down.{level}.block.0.conv1.weight" for level in range(sizes.count(r"encoder\.down\.(\d+)\."))]
    return {
        "ch": ch,
        "ch_mult": [sizes.ratio(key, sizes.axis(key, 0, 4), ch, "ch") for key in firsts],
        "num_res_blocks": sizes.count(r"encoder\.down\.0\.block\.(\d+)\."),
        "z_channels": sizes.ratio(
            "encoder.conv_out.weight", sizes.axis("encoder.conv_out.weight", 0, 4), 2, "mean and logvar"
        ),
        "scale_factor": given.get("scale_factor", 0.3611),
        "shift_factor": given.get("shift_factor", 0.1159),
        "in_channels": sizes.axis("encoder.conv_in.weight", 1, 4),
        "out_ch": sizes.axis("decoder.conv_out.weight", 0, 4),
        "num_groups": given.get("num_groups", 32),
    }


def _truth(config: LoomConfig, name: str) -> dict[str, Any]:
    """Key -> value that a JSON file of the release must have, where it has the key."""
    decoder, vit, vae = config.decoder, config.vit, config.vae
    truth: dict[str, dict[str, Any]] = {
        "llm_config.json": {
            "vocab_size": decoder.vocab_size,
            "hidden_size": decoder.hidden_size,
            "intermediate_size": decoder.intermediate_size,
            "num_hidden_layers": decoder.num_layers,
            "num_attention_heads": decoder.num_heads,
            "num_key_value_heads": decoder.num_kv_heads,
            "head_dim": decoder.head_dim,
        },
        "vit_config.json": {
            "hidden_size": vit.hidden_size,
            "intermediate_size": vit.intermediate_size,
            "num_hidden_layers": vit.num_layers + 1,  # the original counts one layer that it then drops
            "patch_size": vit.patch_size,
            "image_size": vit.patch_size * config.vit_max_num_patch_per_side,
            "num_channels": 3,
        },
        "config.json": {
            "max_latent_size": config.max_latent_size,
            "vit_max_num_patch_per_side": config.vit_max_num_patch_per_side,
            "latent_patch_size": config.latent_patch_size,
            "visual_gen": True,
            "visual_und": True,
        },
        "vae": {
            "ch": vae.ch,
            "ch_mult": list(vae.ch_mult),
            "num_res_blocks": vae.num_res_blocks,
            "z_channels": vae.z_channels,
            "in_channels": vae.in_channels,
            "out_ch": vae.out_ch,
            "downsample": vae.downsample,
        },
    }
    return truth[name] | {key: value for file, key, value in _FIXED if file == name}


def _check_agreement(where: str, given: Any, truth: Mapping[str, Any]) -> None:
    """Raises CheckpointError where a JSON file says something else than the weights."""
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{where} is a {type(given).__name__}, expected an object")
    for key, value in truth.items():
        if key in given and given[key] != value:
            raise CheckpointError(
                f"{where} says {key} = {given[key]!r}, but the weights have (or this framework computes) {value!r}: "
                "they belong to different models, or the file must be mended"
            )


def config_files(config: LoomConfig) -> dict[str, dict[str, Any]]:
    """Returns name -> content of the release's JSON files, for weights that never were in a release."""
    decoder, vit = config.decoder, config.vit
    llm = {
        **_truth(config, "llm_config.json"),
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "rms_norm_eps": decoder.rms_norm_eps,
        "rope_theta": decoder.rope_theta,
    }
    siglip = {
        **_truth(config, "vit_config.json"),
        "model_type": "siglip_vision_model",
        "num_attention_heads": vit.num_heads,
        "layer_norm_eps": vit.layer_norm_eps,
    }
    top = {
        **_truth(config, "config.json"),
        "model_type": "bagel",
        "timestep_shift": config.timestep_shift,
        "interpolate_pos": config.interpolate_pos,
        "vae_config": {
            **_truth(config, "vae"),
            "scale_factor": config.vae.scale_factor,
            "shift_factor": config.vae.shift_factor,
            "num_groups": config.vae.num_groups,
        },
    }
    return {"llm_config.json": llm, "vit_config.json": siglip, "config.json": top}
