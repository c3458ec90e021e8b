"""The autoencoder against the records of the original, and images on a shared canvas against each image alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from loom_jax.converters.tables import autoencoder_entries
from loom_jax.core import AutoencoderConfig, ConfigError, ImageError
from loom_jax.models.autoencoder import Autoencoder, attend_to_cells, to_uint8
from loom_jax.nn.conv import GroupNorm
from tests.reference import CKPT, assert_close, golden

CONFIG = AutoencoderConfig(
    ch=32, ch_mult=(1, 2, 2, 2), num_res_blocks=1, z_channels=16, scale_factor=0.3611, shift_factor=0.1159
)
CANVAS = (48, 64)
SIZES = np.array([[32, 48], [48, 64], [0, 0], [16, 24]], np.int32)


@functools.cache
def autoencoder() -> Autoencoder:
    """The autoencoder of the tiny checkpoint."""
    model = nnx.eval_shape(lambda: Autoencoder(CONFIG, rngs=nnx.Rngs(0)))
    tensors = load_file(CKPT / "ae.safetensors")
    params = {entry.path: entry.from_torch(tensors[entry.key]) for entry in autoencoder_entries(CONFIG)}
    leaves = nnx.to_flat_state(nnx.state(model, nnx.Param))
    new = [(path, leaf.replace(jnp.asarray(params["/".join(map(str, path))]))) for path, leaf in leaves]
    nnx.update(model, nnx.from_flat_state(new))
    return model


def channels_last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1)


def test_encode_equals_original():
    vae, model = golden("vae"), autoencoder()
    moments = jax.jit(model.encode)(channels_last(vae["image"]))
    assert_close(moments.mean, channels_last(vae["mean"]))
    assert_close(moments.logvar, channels_last(vae["logvar"]))
    assert_close(model.sample(moments, channels_last(vae["noise"])), channels_last(vae["z"]))
    assert_close(model.sample(moments, None), CONFIG.scale_factor * (channels_last(vae["mean"]) - CONFIG.shift_factor))
    padded = jax.jit(model.encode)(channels_last(vae["padded_batch"]))
    assert_close(padded.mean, channels_last(vae["padded_mean"]))


def test_decode_equals_original():
    vae, model = golden("vae"), autoencoder()
    assert_close(jax.jit(model.decode)(channels_last(vae["z_dec"])), channels_last(vae["decoded"]))
    assert_close(jax.jit(model.decode)(channels_last(vae["z"])), channels_last(vae["roundtrip"]))


def test_stages_equal_original():
    vae, model = golden("vae"), autoencoder()
    encoded = jax.jit(lambda x: dict(model.encoder.stages(x)))(channels_last(vae["image"]))
    assert_close(encoded["down.0.downsample"][..., :8], channels_last(vae["enc_down0"]))
    assert_close(encoded["mid.block_2"], channels_last(vae["enc_mid"]))
    unscaled = channels_last(vae["z"]) / CONFIG.scale_factor + CONFIG.shift_factor
    decoded = jax.jit(lambda z: dict(model.decoder.stages(z)))(unscaled)
    assert_close(decoded["mid.block_2"], channels_last(vae["dec_mid"]))
    assert_close(decoded["conv_out"], channels_last(vae["roundtrip"]))


def test_blocks_equal_original():
    vae, model = golden("vae"), autoencoder()
    blocks = {
        "res": model.encoder.down[1].block[0],
        "attn": model.encoder.mid.attn_1,
        "down": model.encoder.down[0].downsample,
        "up": model.decoder.up[1].upsample,
    }
    for name, block in blocks.items():
        assert_close(block(channels_last(vae[f"{name}_in"])), channels_last(vae[f"{name}_out"]))


def test_encoding_on_a_canvas_equals_each_image_alone():
    pixels = jax.random.uniform(jax.random.key(1), (len(SIZES), *CANVAS, 3), minval=-1.0)
    inside = _inside(1)
    on_canvas = jax.jit(autoencoder().encode)(jnp.where(inside, pixels, jnp.nan), SIZES)
    alone = jax.jit(autoencoder().encode)
    for n, (h, w) in _images():
        for together, single in zip(on_canvas, alone(pixels[n : n + 1, :h, :w]), strict=True):
            assert_close(together[n : n + 1, : h // 8, : w // 8], np.asarray(single), 1e-5)
    noise = jax.random.normal(jax.random.key(2), on_canvas.mean.shape)
    z = autoencoder().sample(on_canvas, noise, SIZES)
    for x in (*on_canvas, z):
        np.testing.assert_array_equal(np.where(_inside(8), 0, x), 0)


def test_decoding_on_a_canvas_equals_each_image_alone():
    z = jax.random.normal(jax.random.key(3), (len(SIZES), CANVAS[0] // 8, CANVAS[1] // 8, 16))
    on_canvas = jax.jit(autoencoder().decode)(jnp.where(_inside(8), z, jnp.nan), SIZES)
    alone = jax.jit(autoencoder().decode)
    for n, (h, w) in _images():
        assert_close(on_canvas[n : n + 1, :h, :w], np.asarray(alone(z[n : n + 1, : h // 8, : w // 8])), 1e-5)
    np.testing.assert_array_equal(np.where(_inside(1), 0, on_canvas), 0)


def test_gradients_stay_inside_the_image():
    model = autoencoder()

    def loss(pixels: jax.Array) -> jax.Array:
        moments = model.encode(pixels, SIZES)
        return jnp.sum(moments.mean**2) + jnp.sum(model.decode(moments.mean, SIZES) ** 2)

    pixels = jax.random.uniform(jax.random.key(4), (len(SIZES), *CANVAS, 3), minval=-1.0)
    grad = np.asarray(jax.jit(jax.grad(loss))(jnp.where(_inside(1), pixels, jnp.inf)))
    assert np.isfinite(grad).all()
    np.testing.assert_array_equal(np.where(_inside(1), 0, grad), 0)
    assert (np.abs(grad).max(axis=(1, 2, 3)) > 0).tolist() == (SIZES[:, 0] > 0).tolist()


def test_attention_over_blocks_equals_direct_attention():
    q, k, v = jax.random.normal(jax.random.key(5), (3, 2, 35, 1, 6))
    inside = jnp.arange(35) < jnp.array([[35], [21]])
    for valid in (None, inside):
        direct = attend_to_cells(q, k, v, valid)
        over_blocks = attend_to_cells(q, k, v, valid, max_direct=0)
        shown = np.ones((2, 35), bool) if valid is None else np.asarray(valid)
        assert_close(np.asarray(over_blocks)[shown], np.asarray(direct)[shown], 1e-5)
        assert np.isfinite(np.asarray(over_blocks)).all()


def test_attention_of_a_large_canvas_needs_little_memory():
    x = jax.ShapeDtypeStruct((1, 128 * 128, 1, 8), jnp.float32)
    compiled = jax.jit(lambda q, k, v: attend_to_cells(q, k, v, None)).lower(x, x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 128 * 2**20


def test_pictures_are_truncated_not_rounded():
    values = jnp.array([-3.0, -1.0, 0.0, 253.9 / 127.5 - 1, 1.0, 2.0])
    assert to_uint8(values).tolist() == [0, 0, 127, 253, 255, 255]
    assert to_uint8(values).dtype == jnp.uint8


def test_bfloat16_compute_stays_close_and_returns_float32():
    model = nnx.eval_shape(lambda: Autoencoder(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    nnx.update(model, nnx.state(autoencoder(), nnx.Param))
    vae = golden("vae")
    moments = jax.jit(model.encode)(channels_last(vae["image"]))
    assert moments.mean.dtype == jnp.float32
    assert_close(moments.mean, channels_last(vae["mean"]), 0.1)


def test_wrong_shapes_are_named():
    with pytest.raises(ImageError, match=r"\[N, height, width, 3\]"):
        autoencoder().encode(jnp.zeros((3, 16, 16)))
    with pytest.raises(ImageError, match="multiples of 8"):
        autoencoder().encode(jnp.zeros((1, 16, 20, 3)))
    with pytest.raises(ConfigError, match="48 channels"):
        GroupNorm(48, rngs=nnx.Rngs(0))


def _images() -> list[tuple[int, np.ndarray]]:
    """Number and size of the images of SIZES that have any cells."""
    return [(n, size) for n, size in enumerate(SIZES) if size.all()]


def _inside(stride: int) -> np.ndarray:
    """True on the images of SIZES at one cell per `stride` pixels, [N, h, w, 1]."""
    rows, columns = np.indices((CANVAS[0] // stride, CANVAS[1] // stride)) * stride
    return np.stack([(rows < h) & (columns < w) for h, w in SIZES])[..., None]
