"""The ViT against the records of the original, and its packing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open

from loom_jax.converters.tables import model_entries
from loom_jax.core import AutoencoderConfig, DecoderConfig, LoomConfig, SiglipConfig
from loom_jax.document import PADDING
from loom_jax.models.siglip import Siglip
from loom_jax.nn import blockwise_attention
from tests.reference import CKPT, assert_close, golden

CONFIG = SiglipConfig(hidden_size=48, intermediate_size=88, num_layers=3, num_heads=3, patch_size=14, num_positions=100)
DECODER = DecoderConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16
)
VAE = AutoencoderConfig(
    ch=32, ch_mult=(1, 2, 2, 2), num_res_blocks=1, z_channels=16, scale_factor=0.3611, shift_factor=0.1159
)
MODEL = LoomConfig(decoder=DECODER, vit=CONFIG, vae=VAE, max_latent_size=16, vit_max_num_patch_per_side=10)


@functools.cache
def siglip() -> Siglip:
    """The ViT of the tiny checkpoint, upcast to float32."""
    model = nnx.eval_shape(lambda: Siglip(CONFIG, rngs=nnx.Rngs(0)))
    with safe_open(CKPT / "ema.safetensors", "np") as tensors:
        params = {
            entry.path: jnp.asarray(entry.from_torch(tensors.get_tensor(entry.key)), jnp.float32)
            for entry in model_entries(MODEL)
            if entry.path.startswith("vit/")
        }
    leaves = nnx.to_flat_state(nnx.state(model, nnx.Param))
    nnx.update(model, nnx.from_flat_state([(path, leaf.replace(_leaf(params, path))) for path, leaf in leaves]))
    return model


def _leaf(params: dict[str, jax.Array], path: tuple) -> jax.Array:
    """One leaf; those of layers lie apart in the checkpoint and together in memory."""
    place = "/".join(map(str, path))
    if path[0] != "layers":
        return params[f"vit/{place}"]
    return jnp.stack([params[f"vit/{place}".replace("layers", f"layers/{i}")] for i in range(CONFIG.num_layers)])


def packed(batch: int = 1, filler: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two recorded images in one row, followed by filler whose patches and ids must not matter."""
    vit = golden("vit")
    lengths = np.diff(vit["cu_seqlens"])
    segments = np.repeat(np.arange(len(lengths)), lengths)
    patches = np.concatenate([vit["patches"], np.full((filler, CONFIG.patch_dim), 7.0, np.float32)])
    ids = np.concatenate([vit["position_ids"], np.full(filler, 10**6)]).astype(np.int32)
    segments = np.concatenate([segments, np.full(filler, PADDING)]).astype(np.int32)
    return tuple(np.stack([a] * batch) for a in (patches, ids, segments))


def test_features_equal_original():
    vit = golden("vit")
    out = jax.jit(siglip().activations)(*packed())
    assert_close(out.embeddings[0], vit["embeddings"])
    for i in range(CONFIG.num_layers):
        assert_close(out.layers[i, 0], vit[f"layer_{i}"])
    assert_close(out.features[0], vit["features"])


def test_filler_and_other_rows_do_not_matter():
    patches, ids, segments = packed(batch=2, filler=5)
    patches[1, 0] += 1.0
    features = jax.jit(siglip())(patches, ids, segments)
    assert_close(features[0, :14], golden("vit")["features"])
    assert np.isfinite(np.asarray(features)).all()
    first = int(golden("vit")["cu_seqlens"][1])
    assert np.abs(np.asarray(features[1, :first] - features[0, :first])).max() > 1e-3
    np.testing.assert_allclose(features[1, first:14], features[0, first:14], atol=1e-5)


def test_backend_and_remat_do_not_change_the_result():
    arguments = packed(filler=3)

    def loss(patches: jax.Array, **options) -> jax.Array:
        features = siglip()(patches, *arguments[1:], **options)
        return jnp.sum(jnp.where(arguments[2][..., None] == PADDING, 0.0, features) ** 2)

    expected = jax.grad(loss)(arguments[0])
    for options in ({"remat": "full"}, {"attend": functools.partial(blockwise_attention, block_size=4)}):
        assert_close(jax.grad(functools.partial(loss, **options))(arguments[0]), np.asarray(expected))


def test_layers_start_different_and_are_stacked():
    model = Siglip(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    kernel = model.layers.q_proj.kernel[...]
    assert kernel.shape == (3, 48, 3, 16)
    assert model.layers.out_proj.kernel[...].shape == (3, 3, 16, 48)
    assert not np.array_equal(kernel[0], kernel[1])
    assert kernel.dtype == jnp.float32
    assert model(*packed()).dtype == jnp.bfloat16
