"""Which torch tensor is which parameter: one table per component, read in both directions. numpy only.

A row names the tensor and its torch shape, the parameter's path (on disk: one leaf per layer), and how the axes move.
Shapes are spelled in letters: D width, F mlp width, A head width, HA all query heads, KA all kv heads, V vocabulary;
of the ViT W width, M mlp width, B head width, N positions, X values of a patch; R rows of the latent table, Z latent
width, T timestep frequencies.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from loom_jax.core import AutoencoderConfig, LoomConfig

TIMESTEP_FREQUENCIES = 256
"""Values that the timestep embedder's first layer reads: sines and cosines (spec section 7)."""


@dataclasses.dataclass(frozen=True)
class Move:
    """How the axes of a torch tensor become those of a parameter: split or drop axes, then permute.

    Attributes:
      axes: permutation after splitting or dropping, as for np.transpose.
      split: torch axis that holds heads x head width, cut in two; None where there is none.
      pointwise: the torch tensor ends in two axes of length 1 (a 1x1 convolution) that the parameter lacks.
    """

    axes: tuple[int, ...]
    split: int | None = None
    pointwise: bool = False

    def _unmoved(self, shape: tuple[int, ...], head: int) -> tuple[int, ...]:
        """Torch shape with heads split and 1x1 dropped: what is then permuted."""
        if self.pointwise:
            return shape[:-2]
        if self.split is not None:
            return (*shape[: self.split], shape[self.split] // head, head, *shape[self.split + 1 :])
        return shape

    def shape(self, shape: tuple[int, ...], head: int) -> tuple[int, ...]:
        """Returns the parameter's shape for a torch shape."""
        unmoved = self._unmoved(shape, head)
        return tuple(unmoved[axis] for axis in self.axes)

    def from_torch(self, array: np.ndarray, head: int) -> np.ndarray:
        """Returns the parameter as a view of the torch tensor."""
        return array.reshape(self._unmoved(array.shape, head)).transpose(self.axes)

    def to_torch(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the torch tensor of `shape`; a view where `array` is contiguous."""
        if self.split is not None:
            at = self.axes.index(self.split)  # heads and head width stay neighbours in every row of the tables
            array = array.reshape(*array.shape[:at], -1, *array.shape[at + 2 :])
            kept = [axis - (axis > self.split) for axis in self.axes if axis != self.split + 1]
            return array.transpose(np.argsort(kept))
        return array.transpose(np.argsort(self.axes)).reshape(shape)


VECTOR = Move((0,))
TABLE = Move((0, 1))
LINEAR = Move((1, 0))
HEADS = Move((2, 0, 1), split=0)
HEADS_BIAS = Move((0, 1), split=0)
FROM_HEADS = Move((1, 2, 0), split=1)
CONV = Move((2, 3, 1, 0))
POINTWISE = Move((1, 0), pointwise=True)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table. `{i}` stands for the layer, `{e}` for the expert and `{moe}` for its torch suffix."""

    torch: str
    shape: str
    path: str
    move: Move
    head: str = ""


DECODER = (
    Row("embed_tokens.weight", "V D", "embed_tokens/embedding", TABLE),
    Row("norm{moe}.weight", "D", "decoder/norm/{e}/scale", VECTOR),
)
"""Of `language_model.model.`; the layers stand in DECODER_LAYER, lm_head in CONNECTORS."""

DECODER_LAYER = (
    Row("input_layernorm{moe}.weight", "D", "input_norm/scale", VECTOR),
    Row("self_attn.q_proj{moe}.weight", "HA D", "q_proj/kernel", HEADS, "A"),
    Row("self_attn.q_proj{moe}.bias", "HA", "q_proj/bias", HEADS_BIAS, "A"),
    Row("self_attn.k_proj{moe}.weight", "KA D", "k_proj/kernel", HEADS, "A"),
    Row("self_attn.k_proj{moe}.bias", "KA", "k_proj/bias", HEADS_BIAS, "A"),
    Row("self_attn.v_proj{moe}.weight", "KA D", "v_proj/kernel", HEADS, "A"),
    Row("self_attn.v_proj{moe}.bias", "KA", "v_proj/bias", HEADS_BIAS, "A"),
    Row("self_attn.o_proj{moe}.weight", "D HA", "o_proj/kernel", FROM_HEADS, "A"),
    Row("self_attn.q_norm{moe}.weight", "A", "q_norm/scale", VECTOR),
    Row("self_attn.k_norm{moe}.weight", "A", "k_norm/scale", VECTOR),
    Row("post_attention_layernorm{moe}.weight", "D", "post_attention_norm/scale", VECTOR),
    Row("mlp{moe}.gate_proj.weight", "F D", "gate_proj/kernel", LINEAR),
    Row("mlp{moe}.up_proj.weight", "F D", "up_proj/kernel", LINEAR),
    Row("mlp{moe}.down_proj.weight", "D F", "down_proj/kernel", LINEAR),
)
"""Of `language_model.model.layers.{i}.` and `decoder/layers/{i}/{e}/`."""

VIT = (
    Row("embeddings.patch_embedding.weight", "W X", "vit/patch_embedding/kernel", LINEAR),
    Row("embeddings.patch_embedding.bias", "W", "vit/patch_embedding/bias", VECTOR),
    Row("embeddings.position_embedding.weight", "N W", "vit/position_embedding/embedding", TABLE),
    Row("post_layernorm.weight", "W", "vit/post_layernorm/scale", VECTOR),
    Row("post_layernorm.bias", "W", "vit/post_layernorm/bias", VECTOR),
)
"""Of `vit_model.vision_model.`."""

VIT_LAYER = (
    Row("layer_norm1.weight", "W", "layer_norm1/scale", VECTOR),
    Row("layer_norm1.bias", "W", "layer_norm1/bias", VECTOR),
    Row("self_attn.q_proj.weight", "W W", "q_proj/kernel", HEADS, "B"),
    Row("self_attn.q_proj.bias", "W", "q_proj/bias", HEADS_BIAS, "B"),
    Row("self_attn.k_proj.weight", "W W", "k_proj/kernel", HEADS, "B"),
    Row("self_attn.k_proj.bias", "W", "k_proj/bias", HEADS_BIAS, "B"),
    Row("self_attn.v_proj.weight", "W W", "v_proj/kernel", HEADS, "B"),
    Row("self_attn.v_proj.bias", "W", "v_proj/bias", HEADS_BIAS, "B"),
    Row("self_attn.out_proj.weight", "W W", "out_proj/kernel", FROM_HEADS, "B"),
    Row("self_attn.out_proj.bias", "W", "out_proj/bias", VECTOR),
    Row("layer_norm2.weight", "W", "layer_norm2/scale", VECTOR),
    Row("layer_norm2.bias", "W", "layer_norm2/bias", VECTOR),
    Row("mlp.fc1.weight", "M W", "fc1/kernel", LINEAR),
    Row("mlp.fc1.bias", "M", "fc1/bias", VECTOR),
    Row("mlp.fc2.weight", "W M", "fc2/kernel", LINEAR),
    Row("mlp.fc2.bias", "W", "fc2/bias", VECTOR),
)
"""Of `vit_model.vision_model.encoder.layers.{i}.` and `vit/layers/{i}/`."""

CONNECTORS = (
    Row("language_model.lm_head.weight", "V D", "lm_head/kernel", LINEAR),
    Row("connector.fc1.weight", "D W", "connector/fc1/kernel", LINEAR),
    Row("connector.fc1.bias", "D", "connector/fc1/bias", VECTOR),
    Row("connector.fc2.weight", "D D", "connector/fc2/kernel", LINEAR),
    Row("connector.fc2.bias", "D", "connector/fc2/bias", VECTOR),
    Row("vit_pos_embed.pos_embed", "N D", "vit_pos_embed/table", TABLE),
    Row("latent_pos_embed.pos_embed", "R D", "latent_pos_embed/table", TABLE),
    Row("time_embedder.mlp.0.weight", "D T", "time_embedder/fc1/kernel", LINEAR),
    Row("time_embedder.mlp.0.bias", "D", "time_embedder/fc1/bias", VECTOR),
    Row("time_embedder.mlp.2.weight", "D D", "time_embedder/fc2/kernel", LINEAR),
    Row("time_embedder.mlp.2.bias", "D", "time_embedder/fc2/bias", VECTOR),
    Row("vae2llm.weight", "D Z", "vae2llm/kernel", LINEAR),
    Row("vae2llm.bias", "D", "vae2llm/bias", VECTOR),
    Row("llm2vae.weight", "Z D", "llm2vae/kernel", LINEAR),
    Row("llm2vae.bias", "Z", "llm2vae/bias", VECTOR),
)

EXPERTS = {"und": "", "gen": "_moe_gen"}
"""Expert -> its suffix in torch names."""

NORM, CONV3, CONV1, ATTENTION = "norm", "conv3", "conv1", "attention"
AUTOENCODER_KINDS: dict[str, tuple[tuple[str, str, str, Move], ...]] = {
    NORM: (("weight", "I", "scale", VECTOR), ("bias", "I", "bias", VECTOR)),
    CONV3: (("weight", "O I 3 3", "kernel", CONV), ("bias", "O", "bias", VECTOR)),
    CONV1: (("weight", "O I 1 1", "kernel", CONV), ("bias", "O", "bias", VECTOR)),
    ATTENTION: (("weight", "O I 1 1", "kernel", POINTWISE), ("bias", "O", "bias", VECTOR)),
}
"""Leaves of each kind of autoencoder module: torch name, shape (I in, O out), our name, move."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a concrete checkpoint: torch key and shape, path of the parameter on disk, how axes move."""

    key: str
    shape: tuple[int, ...]
    path: str
    move: Move
    head: int = 0

    @property
    def param_shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return self.move.shape(self.shape, self.head)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether tensor and parameter are the same matrix, transposed or not: then it can be converted in pieces."""
        return self.move in (TABLE, LINEAR)

    @property
    def first_axis(self) -> int:
        """The parameter's axis that is the torch tensor's first."""
        return self.move.axes.index(0)

    def from_torch(self, array: np.ndarray) -> np.ndarray:
        """Returns the parameter as a view of the torch tensor."""
        return self.move.from_torch(array, self.head)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Returns the torch tensor; a view where `array` is contiguous."""
        return self.move.to_torch(array, self.shape)


def model_entries(config: LoomConfig) -> list[Entry]:
    """Returns every tensor of ema.safetensors, layer by layer."""
    decoder, vit = config.decoder, config.vit
    sizes = {
        "V": decoder.vocab_size,
        "D": decoder.hidden_size,
        "F": decoder.intermediate_size,
        "A": decoder.head_dim,
        "HA": decoder.num_heads * decoder.head_dim,
        "KA": decoder.num_kv_heads * decoder.head_dim,
        "W": vit.hidden_size,
        "M": vit.intermediate_size,
        "B": vit.hidden_size // vit.num_heads,
        "N": vit.num_positions,
        "X": vit.patch_dim,
        "R": config.max_latent_size**2,
        "Z": config.latent_dim,
        "T": TIMESTEP_FREQUENCIES,
    }
    return [
        Entry(key, tuple(sizes[letter] for letter in row.shape.split()), path, row.move, sizes.get(row.head, 0))
        for key, path, row in _model_rows(decoder.num_layers, vit.num_layers)
    ]


def _model_rows(decoder_layers: int, vit_layers: int) -> Iterator[tuple[str, str, Row]]:
    """Yields (torch key, path, row) of all tables, with layers and experts spelled out."""
    language, vision = "language_model.model.", "vit_model.vision_model."
    for row in DECODER:
        for expert, suffix in EXPERTS.items() if "{moe}" in row.torch else [("", "")]:
            yield language + row.torch.format(moe=suffix), row.path.format(e=expert), row
    for row in CONNECTORS:
        yield row.torch, row.path, row
    for layer in range(decoder_layers):
        for expert, suffix in EXPERTS.items():
            for row in DECODER_LAYER:
                key = f"{language}layers.{layer}.{row.torch.format(moe=suffix)}"
                yield key, f"decoder/layers/{layer}/{expert}/{row.path}", row
    for row in VIT:
        yield vision + row.torch, row.path, row
    for layer in range(vit_layers):
        for row in VIT_LAYER:
            yield f"{vision}encoder.layers.{layer}.{row.torch}", f"vit/layers/{layer}/{row.path}", row


def autoencoder_entries(config: AutoencoderConfig) -> list[Entry]:
    """Returns every tensor of ae.safetensors."""
    entries = []
    for module, kind, inputs, outputs in _autoencoder_modules(config):
        sizes = {"I": inputs, "O": outputs, "1": 1, "3": 3}
        path = module.removesuffix(".conv").replace(".", "/")  # downsample.conv and upsample.conv wrap one convolution
        for torch_name, letters, name, move in AUTOENCODER_KINDS[kind]:
            shape = tuple(sizes[letter] for letter in letters.split())
            entries.append(Entry(f"{module}.{torch_name}", shape, f"{path}/{name}", move))
    return entries


def _autoencoder_modules(config: AutoencoderConfig) -> Iterator[tuple[str, str, int, int]]:
    """Yields (torch module, kind, channels in, channels out); level 0 has the highest resolution."""
    widths = [config.ch * mult for mult in config.ch_mult]
    last = len(widths) - 1
    yield "encoder.conv_in", CONV3, config.in_channels, config.ch
    for level, width in enumerate(widths):
        inputs = widths[level - 1] if level else config.ch
        for block in range(config.num_res_blocks):
            yield from _res_block(f"encoder.down.{level}.block.{block}", width if block else inputs, width)
        if level < last:
            yield f"encoder.down.{level}.downsample.conv", CONV3, width, width
    yield from _middle("encoder.mid", widths[-1])
    yield "encoder.norm_out", NORM, widths[-1], widths[-1]
    yield "encoder.conv_out", CONV3, widths[-1], 2 * config.z_channels
    yield "decoder.conv_in", CONV3, config.z_channels, widths[-1]
    yield from _middle("decoder.mid", widths[-1])
    for level, width in enumerate(widths):
        inputs = widths[min(level + 1, last)]
        for block in range(config.num_res_blocks + 1):
            yield from _res_block(f"decoder.up.{level}.block.{block}", width if block else inputs, width)
        if level:
            yield f"decoder.up.{level}.upsample.conv", CONV3, width, width
    yield "decoder.norm_out", NORM, widths[0], widths[0]
    yield "decoder.conv_out", CONV3, widths[0], config.out_ch


def _res_block(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, str, int, int]]:
    yield f"{name}.norm1", NORM, inputs, inputs
    yield f"{name}.conv1", CONV3, inputs, outputs
    yield f"{name}.norm2", NORM, outputs, outputs
    yield f"{name}.conv2", CONV3, outputs, outputs
    if inputs != outputs:
        yield f"{name}.nin_shortcut", CONV1, inputs, outputs


def _middle(name: str, width: int) -> Iterator[tuple[str, str, int, int]]:
    yield from _res_block(f"{name}.block_1", width, width)
    yield f"{name}.attn_1.norm", NORM, width, width
    for projection in ("q", "k", "v", "proj_out"):
        yield f"{name}.attn_1.{projection}", ATTENTION, width, width
    yield from _res_block(f"{name}.block_2", width, width)
