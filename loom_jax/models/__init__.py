"""The networks, one file each. They know no mesh: `constrain` and `attend` are handed in."""

from loom_jax.models.autoencoder import Autoencoder, to_uint8
from loom_jax.models.capture import Capture, Captured
from loom_jax.models.load import LoadedModel, load_folder
from loom_jax.models.loom import LoomModel
from loom_jax.models.lora import add_lora, merge_lora
from loom_jax.models.mot import Backend, Constrain, Decoded, Decoder, KeysValues, MoTLayer, Past, unconstrained
from loom_jax.models.quantize import QUANTIZATIONS, quantize_decoder
from loom_jax.models.siglip import Siglip

__all__ = [
    "QUANTIZATIONS",
    "Autoencoder",
    "Backend",
    "Capture",
    "Captured",
    "Constrain",
    "Decoded",
    "Decoder",
    "KeysValues",
    "LoadedModel",
    "LoomModel",
    "MoTLayer",
    "Past",
    "Siglip",
    "add_lora",
    "load_folder",
    "merge_lora",
    "quantize_decoder",
    "to_uint8",
    "unconstrained",
]
