"""An untrained Bagel from a plain language model, a SigLIP and an autoencoder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from loom_jax.checkpoint import read_folder, read_params, stored_params
from loom_jax.converters import from_orbax, to_orbax
from loom_jax.converters.bagel import main
from loom_jax.core import CheckpointError, TokenizerError
from loom_jax.models import Autoencoder, LoomModel
from loom_jax.models.load import load_folder
from loom_jax.nn import sincos_2d_table
from tests.reference import CKPT

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def release() -> Tensors:
    return safetensors_numpy.load_file(CKPT / "ema.safetensors")


def write_parts(release: Tensors, path: Path) -> Path:
    """The tiny checkpoint taken apart: what its parts must have been, with what Bagel leaves out."""
    llm = {
        key.removeprefix("language_model."): array
        for key, array in release.items()
        if key.startswith("language_model.") and "moe_gen" not in key and "k_norm" not in key and "q_norm" not in key
    }
    vit = {key.removeprefix("vit_model."): array for key, array in release.items() if key.startswith("vit_model.")}
    patches = "vision_model.embeddings.patch_embedding.weight"
    vit[patches] = np.ascontiguousarray(vit[patches].reshape(48, 14, 14, 3).transpose(0, 3, 1, 2))
    last = 1 + max(int(key.split(".")[3]) for key in vit if ".layers." in key)
    layer = {key: array for key, array in vit.items() if ".layers.0." in key}
    vit |= {key.replace(".layers.0.", f".layers.{last}."): array + 1 for key, array in layer.items()}
    vit |= {"vision_model.head.probe": np.ones((1, 1, 48), ml_dtypes.bfloat16)}
    for name, tensors in (("llm", llm), ("vit", vit)):
        (path / name).mkdir(parents=True)
        safetensors_numpy.save_file(tensors, path / name / "model.safetensors")
        shutil.copyfile(CKPT / f"{name}_config.json", path / name / "config.json")
    for name in TOKENIZER:
        shutil.copyfile(CKPT / name, path / "llm" / name)
    shutil.copyfile(CKPT / "ae.safetensors", path / "ae.safetensors")
    return path


@pytest.fixture
def parts(release: Tensors, tmp_path: Path) -> Path:
    return write_parts(release, tmp_path / "parts")


def command(parts: Path, *more: str) -> list[str]:
    folders = ["--llm", str(parts / "llm"), "--vit", str(parts / "vit"), "--vae", str(parts / "ae.safetensors")]
    return ["from-parts", *folders, str(parts.parent / "untrained"), "--max-latent-size", "16", *more]


def made(parts: Path) -> Tensors:
    path = parts.parent / "untrained" / "model"
    return read_params(path, stored_params(path))


def test_parts_become_an_untrained_bagel(release, parts, tmp_path):
    assert main(command(parts)) == 0
    to_orbax(CKPT, tmp_path / "trained")
    assert read_folder(tmp_path / "untrained").config == read_folder(tmp_path / "trained").config
    trained, untrained = read_params(tmp_path / "trained/model", stored_params(tmp_path / "trained/model")), made(parts)
    assert trained.keys() == untrained.keys()
    fresh = ("connector/", "time_embedder/", "vae2llm/", "llm2vae/", "vit_pos_embed/", "latent_pos_embed/")
    for path, array in untrained.items():
        assert array.shape == trained[path].shape, path
        if path.endswith(("q_norm/scale", "k_norm/scale")):
            assert (array == 1).all(), path
        elif "/gen/" in path:
            np.testing.assert_array_equal(array, untrained[path.replace("/gen/", "/und/")], path)
        elif not path.startswith(fresh):
            np.testing.assert_array_equal(array, trained[path], path)
    assert not untrained["llm2vae/kernel"].any() and not untrained["llm2vae/bias"].any()
    np.testing.assert_array_equal(
        untrained["latent_pos_embed/table"], sincos_2d_table(64, 16).astype(ml_dtypes.bfloat16)
    )
    for path, inputs in (("connector/fc1/kernel", 48), ("vae2llm/bias", 64), ("time_embedder/fc1/kernel", 256)):
        drawn = untrained[path].astype(np.float64) * inputs**0.5
        assert 0.8 < np.abs(drawn).max() <= 1.01 and abs(drawn.std() - 3**-0.5) < 0.1, path
    folder = read_folder(tmp_path / "untrained")
    assert folder.provenance["weights"] == "parts" and "tokenizer.json" in folder.files
    loaded = load_folder(tmp_path / "untrained")
    assert isinstance(loaded.model, LoomModel) and isinstance(loaded.vae, Autoencoder)
    assert (loaded.model.velocity(jnp.ones((2, 64))) == 0).all()
    from_orbax(tmp_path / "untrained", tmp_path / "release")
    assert safetensors_numpy.load_file(tmp_path / "release" / "ema.safetensors").keys() == release.keys()


def test_another_seed_draws_other_connectors(parts):
    main(command(parts))
    first = made(parts)
    main(command(parts, "--seed", "1", "--overwrite"))
    second = made(parts)
    same = {path for path in first if np.array_equal(first[path], second[path])}
    drawn = {path for path in first if path.startswith(("connector/", "time_embedder/", "vae2llm/"))}
    assert first.keys() - same == drawn


def test_a_tied_head_is_the_embedding(parts):
    spoil(parts / "llm", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match="1 missing: lm_head.weight"):
        main(command(parts))
    change_json(parts / "llm", tie_word_embeddings=True)
    main(command(parts))
    params = made(parts)
    np.testing.assert_array_equal(params["lm_head/kernel"], params["embed_tokens/embedding"].T)


def test_shards_and_a_whole_siglip(parts):
    tensors = safetensors_numpy.load_file(parts / "llm" / "model.safetensors")
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    places = {key: names[n % 2] for n, key in enumerate(sorted(tensors))}
    for name in names:
        safetensors_numpy.save_file({key: a for key, a in tensors.items() if places[key] == name}, parts / "llm" / name)
    (parts / "llm" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (parts / "llm" / "model.safetensors").unlink()
    text = {
        "text_model.embeddings.token_embedding.weight": np.ones((3, 2), np.float32),
        "logit_scale": np.ones(1, np.float32),
    }
    spoil(parts / "vit", lambda tensors: tensors.update(text))
    config = parts / "vit" / "config.json"
    config.write_text(json.dumps({"vision_config": json.loads(config.read_text()), "model_type": "siglip"}))
    assert main(command(parts)) == 0


def spoil(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = safetensors_numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors_numpy.save_file(tensors, folder / "model.safetensors")


def change_json(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def without(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: without(p / "llm"), "llm is not a folder: give the Qwen2.5 folder"),
        (lambda p: without(p / "ae.safetensors"), "ae.safetensors is not a file"),
        (
            lambda p: without(p / "vit" / "model.safetensors"),
            "holds no model.safetensors: give the folder of a Hugging",
        ),
        (lambda p: without(p / "vit" / "config.json"), "config.json cannot be read as JSON"),
        (
            lambda p: spoil(p / "llm", lambda t: t.update({"model.extra": np.ones(2, np.float32)})),
            "1 unknown: model.extra",
        ),
        (
            lambda p: spoil(p / "llm", lambda t: t.pop("model.layers.1.self_attn.q_proj.bias")),
            "1 missing: model.layers.1.self_attn.q_proj.bias",
        ),
        (
            lambda p: spoil(p / "vit", lambda t: t.pop("vision_model.post_layernorm.bias")),
            "1 missing: vision_model.post_layernorm.bias",
        ),
        (lambda p: change_json(p / "llm", num_attention_heads=None), "lacks num_attention_heads"),
        (lambda p: change_json(p / "llm", rope_scaling={"type": "yarn"}), "llm_config.json says rope_scaling"),
        (lambda p: change_json(p / "vit", num_hidden_layers=9), "vit_config.json says num_hidden_layers = 9"),
        (lambda p: shutil.copyfile(p / "llm/model.safetensors", p / "vit/model.safetensors"), "stands in"),
        (lambda p: shutil.copyfile(p / "vit/model.safetensors", p / "ae.safetensors"), "lacks encoder.conv_out.weight"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, damage, message):
    damage(parts)
    with pytest.raises(CheckpointError, match=message) as caught:
        main(command(parts))
    assert "\n" not in str(caught.value)
    assert not (parts.parent / "untrained").exists()


def test_a_part_without_a_tokenizer(parts):
    for name in TOKENIZER:
        (parts / "llm" / name).unlink()
    with pytest.raises(TokenizerError, match="holds no tokenizer"):
        main(command(parts))
