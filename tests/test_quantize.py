"""int8 weights: how far each kernel and the velocity move, and what memory they save."""

import dataclasses
import functools
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loom_jax import api, cli
from loom_jax.converters.synthetic import write_synthetic_release
from loom_jax.core import ConfigError
from loom_jax.models import add_lora, quantize_decoder
from loom_jax.nn import Projection, quantize_int8
from tests import tiny
from tests.reference import CKPT
from tests.sources import ROOT


def projections(model):
    return {"/".join(map(str, path)): m for path, m in nnx.iter_modules(model) if isinstance(m, Projection)}


@functools.cache
def quantized():
    model = tiny.build()
    quantize_decoder(model)
    return model


def floats(module):
    """The kernel that values and scales stand for."""
    kernel, scale = np.asarray(module.kernel[...], np.float32), np.asarray(module.kernel_scale[...])
    inner = tuple(range(1, 1 + len(module.in_features)))
    return kernel * np.expand_dims(scale, inner)


def test_no_weight_moves_by_more_than_half_a_step_of_its_channel():
    exact, found = projections(tiny.model().decoder), projections(quantized().decoder)
    assert exact.keys() == found.keys() and len(found) == 14
    for path, module in found.items():
        kernel = np.asarray(exact[path].kernel[...])
        inner = tuple(range(1, 1 + len(module.in_features)))
        largest = np.abs(kernel).max(axis=inner, keepdims=True)
        assert module.kernel[...].dtype == jnp.int8 and module.kernel[...].shape == kernel.shape
        assert module.kernel_scale[...].shape == (len(kernel), *module.out_features), path
        assert (np.abs(floats(module) - kernel) <= largest / 127 * 0.5001).all(), path
        assert (np.abs(np.asarray(module.kernel[...])).max(axis=inner) == 127).all(), path


def test_a_channel_of_zeros_stays_zero():
    values, scale = quantize_int8(jnp.zeros((3, 4)).at[:, 1].set(2.0), (0,))
    assert np.isfinite(scale).all() and values[:, 1].tolist() == [127] * 3 and not values[:, [0, 2, 3]].any()


def forward(model, drawn):
    graphdef, params = nnx.split(model)

    @jax.jit
    def call(params, streams, state, timesteps):
        model = nnx.merge(graphdef, params)
        out = model(streams, state, timesteps)
        return out.und, model.velocity(out.gen)

    return call(params, drawn.batch.streams, drawn.state, drawn.timesteps)


def test_the_model_computes_with_what_the_values_stand_for():
    """Biases, stacked layers and adapters included."""
    drawn, sides = tiny.draw([tiny.DOCUMENTS]), []
    for through_values in (False, True):
        model = tiny.build()
        add_lora(model, 2, 4.0, ["o_proj", "q_proj"], nnx.Rngs(0))
        for module in projections(model).values():
            if hasattr(module, "lora_b"):
                module.lora_b[...] = jnp.full_like(module.lora_b[...], 0.1)
        quantize_decoder(model)
        if not through_values:
            for module in projections(model.decoder).values():
                module.kernel = nnx.Param(jnp.asarray(floats(module)))
                del module.kernel_scale
        sides.append(forward(model, drawn))
    for values, expected in zip(sides[1], sides[0], strict=True):
        assert tiny.relative(values, expected) < 1e-5


def test_the_velocity_moves_by_about_a_hundredth():
    drawn = tiny.draw([tiny.DOCUMENTS])
    (_, exact), (_, found) = forward(tiny.model(), drawn), forward(quantized(), drawn)
    held = drawn.batch.streams.gen.document >= 0
    difference = np.asarray(found - exact)[held]
    error = math.sqrt((difference**2).mean() / (np.asarray(exact)[held] ** 2).mean())
    assert 1e-3 < error < 0.02


def nbytes(module):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def test_kernels_take_a_quarter_of_float32_and_all_else_what_it_took():
    exact, found = tiny.model(), quantized()
    kernels = sum(m.kernel[...].size for m in projections(exact.decoder).values())
    scales = sum(m.kernel_scale[...].size for m in projections(found.decoder).values())
    assert nbytes(exact.decoder) - nbytes(found.decoder) == 3 * kernels - 4 * scales
    assert nbytes(found.decoder) < 0.3 * nbytes(exact.decoder)
    for part in ("embed_tokens", "vit", "lm_head", "llm2vae", "vae2llm"):
        assert nbytes(getattr(exact, part)) == nbytes(getattr(found, part))


def test_no_more_than_a_layer_is_ever_turned_back_into_floats():
    """A forward pass through 16 layers of int8 needs less beside what float32 needs than one layer's kernels."""
    decoder = dataclasses.replace(tiny.CONFIG.decoder, num_layers=16, intermediate_size=920)
    config = dataclasses.replace(tiny.CONFIG, decoder=decoder)
    drawn, temporary = tiny.draw([tiny.DOCUMENTS]), []
    for int8 in (False, True):
        model = tiny.build(config)
        if int8:
            quantize_decoder(model)
        graphdef, params = nnx.split(model)
        call = jax.jit(lambda p, *args, graphdef=graphdef: nnx.merge(graphdef, p)(*args).gen)
        compiled = call.lower(params, drawn.batch.streams, drawn.state, drawn.timesteps).compile()
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    layer = 4 * sum(m.kernel[...].size for m in projections(model.decoder).values()) // 16
    assert temporary[1] - temporary[0] < layer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("quantized")
    write_synthetic_release(path / "release", tiny.CONFIG, seed=5, tokenizer=CKPT)
    api.convert(path / "release", path / "converted")
    return path / "converted"


def test_a_quantized_generator_draws_nearly_the_same_on_one_device_and_on_eight(folder):
    request, settings = api.Request(("A boat",), size=(12, 18)), api.ImageSettings(num_timesteps=4)
    options = ({}, {"quantize": "int8"}, {"quantize": "int8", "preset": "fsdp"})
    exact, int8, spread = (api.load(folder, **o).generate([request], settings)[0].latents for o in options)
    assert 1e-4 < tiny.relative(int8, exact) < 0.1
    assert tiny.relative(spread, int8) < 1e-4


def test_an_unknown_scheme_is_named(folder):
    with pytest.raises(ConfigError, match="quantize='int3' is not one of int8"):
        api.load(folder, quantize="int3")
    with pytest.raises(ConfigError, match="quantize='int3' is not one of int8"):
        quantize_decoder(tiny.build(), "int3")


@pytest.mark.parametrize("task", ["image", "tutorial"])
def test_the_command_loads_int8_and_predicts_steps(folder, tmp_path, task):
    words = f"generate --checkpoint {folder} --out {tmp_path} --prompt hut --task {task} --quantize int8 --taylorseer"
    options = "--height 24 --width 24 --steps 9" + (" --plan Step1:dig" if task == "tutorial" else "")
    assert cli.main([*words.split(), *options.split()]) == 0
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["quantize"] == "int8" and record["image_settings"]["taylorseer"] is True
    compilations = record.get("compilations") or record["sessions"][0]["compilations"]
    assert compilations["forecast"] == 1


@pytest.mark.slow
def test_the_benchmark_holds_every_variant_against_float32(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "precision", "--smoke", "--out", str(tmp_path / "p.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    exact, *others = json.loads((tmp_path / "p.json").read_text())["rows"]
    assert exact["latents_rms"] == 0 and len(others) == 4
    assert all(0 < row["latents_rms"] < 0.05 for row in others)
    assert min(others, key=lambda row: row["weights_bytes"])["variant"] == "bfloat16, int8 weights"
