"""From a training run to a folder for inference, with adapters and without, and on to PyTorch."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import numpy as safetensors_numpy

from loom_jax.checkpoint import (
    AUTOENCODER_RECORD,
    RECORD,
    RunCheckpoints,
    portable,
    read_folder,
    read_params,
    save_params,
    start_run,
    stored_params,
)
from loom_jax.cli import main as loom
from loom_jax.converters import from_orbax, from_run
from loom_jax.core import CheckpointError, to_mapping
from loom_jax.models import add_lora, merge_lora
from loom_jax.models.load import load_folder
from tests import tiny
from tests.reference import CKPT

FILES = ("tokenizer.json", "tokenizer_config.json")


def make_run(path: Path, model: Any, trained: Any, train: dict[str, Any], origin: Any = None, meta: Any = None) -> None:
    """A run folder with steps 3 and 6 of a model whose `trained` parameters have a moving average."""
    _, trainable, frozen = nnx.split(model, trained, ...)
    average = jax.tree.map(lambda a: a + 0.25, trainable)
    vae = nnx.state(tiny.vae(), nnx.Param)
    start_run(path, tiny.CONFIG, train, CKPT, FILES, vae, "loom_jax test", origin)
    with RunCheckpoints(path) as checkpoints:
        for step in (3, 6):
            now = jax.tree.map(lambda a, step=step: a + step, average)
            state = {"step": jnp.int32(step), "trainable": trainable, "frozen": frozen, "ema": now}
            checkpoints.save(step, state, meta=meta)


def make_autoencoder(path: Path, change: Any = lambda params: params, **config: Any) -> Path:
    """A finished run of an autoencoder whose weights are those of `tiny.vae()`, changed."""
    save_params(path / "vae", change(nnx.to_pure_dict(nnx.state(tiny.vae(), nnx.Param))))
    record = {"created_by": "loom_jax test", "config": {"vae": to_mapping(tiny.CONFIG.vae), "seed": 5, **config}}
    (path / AUTOENCODER_RECORD).write_text(json.dumps(record))
    return path


def shifted(part: str) -> Any:
    """A change of one bias of the encoder or the decoder."""

    def change(params: Any) -> Any:
        params[part]["conv_in"]["bias"] = params[part]["conv_in"]["bias"] + 1
        return params

    return change


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    make_run(path, tiny.build(), lambda path, _: path[0] != "vit", {"lora": {"rank": 0, "alpha": 16.0}})
    return path


def leaves(folder: Path) -> dict[str, np.ndarray]:
    return read_params(folder / "model", stored_params(folder / "model"))


def test_a_run_becomes_a_folder_for_inference(run, tmp_path):
    from_run(run, tmp_path / "average")
    from_run(run, tmp_path / "older", step=3)
    assert loom(["convert", "from-run", str(run), str(tmp_path / "raw"), "--weights", "params"]) == 0
    average, older, raw = (leaves(tmp_path / name) for name in ("average", "older", "raw"))
    model = tiny.build()
    kernel = np.asarray(model.decoder.layers.gen.q_proj.kernel[...])
    for layer in range(2):
        path = f"decoder/layers/{layer}/gen/q_proj/kernel"
        np.testing.assert_array_equal(raw[path], kernel[layer])
        np.testing.assert_array_equal(average[path], kernel[layer] + np.float32(0.25) + 6)
        np.testing.assert_array_equal(older[path], kernel[layer] + np.float32(0.25) + 3)
    np.testing.assert_array_equal(average["vit/post_layernorm/scale"], raw["vit/post_layernorm/scale"])  # frozen
    loaded = load_folder(tmp_path / "raw")
    for expected, found in ((model, loaded.model), (tiny.vae(), loaded.vae)):
        jax.tree.map(np.testing.assert_array_equal, nnx.state(found, nnx.Param), nnx.state(expected, nnx.Param))
    folder = read_folder(tmp_path / "average")
    assert folder.provenance["source"] == "run step 6" and folder.provenance["weights"] == "ema"
    assert folder.files == FILES and (tmp_path / "average" / "tokenizer.json").is_file()


def test_and_then_a_release_of_the_original(run, tmp_path):
    from_run(run, tmp_path / "folder", weights="params", dtype="bfloat16")
    from_orbax(tmp_path / "folder", tmp_path / "release")
    tensors = safetensors_numpy.load_file(tmp_path / "release" / "ema.safetensors")
    head = np.asarray(tiny.build().lm_head.kernel[...])
    np.testing.assert_array_equal(tensors["language_model.lm_head.weight"], head.T.astype(ml_dtypes.bfloat16))
    assert (tmp_path / "release" / "llm_config.json").is_file()


def test_adapters_are_merged(tmp_path):
    model = tiny.build()
    add_lora(model, 3, 12.0, ("q_proj", "o_proj", "decoder/layers/gen/down_proj"), nnx.Rngs(0))
    for module in (model.decoder.layers.gen.q_proj, model.decoder.layers.und.o_proj):
        module.lora_b[...] = jax.random.normal(jax.random.key(1), module.lora_b.shape)
    adapters = lambda path, _: path[-1] in ("lora_a", "lora_b")  # noqa: E731
    make_run(tmp_path / "run", model, adapters, {"lora": {"rank": 3, "alpha": 12.0}})
    with pytest.raises(CheckpointError, match="trained 10 low-rank adapters.*give --merge-lora"):
        from_run(tmp_path / "run", tmp_path / "folder", weights="params")
    from_run(tmp_path / "run", tmp_path / "folder", weights="params", merge_lora=True)
    merge_lora(model)
    loaded = load_folder(tmp_path / "folder").model
    for expected, found in zip(
        jax.tree.leaves(nnx.state(model, nnx.Param)), jax.tree.leaves(nnx.state(loaded, nnx.Param)), strict=True
    ):
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-5, atol=1e-5)


def test_runs_that_cannot_be_exported(run, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint of step 4: there are 3, 6"):
        from_run(run, tmp_path / "folder", step=4)
    with pytest.raises(CheckpointError, match="is not a training run: it holds no run.json"):
        from_run(tmp_path, run.parent / "folder")
    start_run(tmp_path / "young", tiny.CONFIG, {}, CKPT, (), nnx.state(tiny.vae(), nnx.Param), "test")
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        from_run(tmp_path / "young", tmp_path / "folder")
    assert loom(["convert", "from-run", str(tmp_path / "young"), str(tmp_path / "folder")]) == 2
    assert not (tmp_path / "folder").exists()


TRAINED = {"seed": 3, "data": {"seed": 4}, "total_steps": 9, "lora": {"rank": 0, "alpha": 16.0}}


def test_the_record_leads_back_to_the_first_weights(run, tmp_path):
    from_run(run, tmp_path / "first")
    vae = make_autoencoder(tmp_path / "autoencoder", total_steps=7)
    train = TRAINED | {"init_from": str(tmp_path / "first"), "vae_from": str(vae)}
    make_run(tmp_path / "old", tiny.build(), lambda path, _: path[0] != "vit", train)
    from_run(tmp_path / "old", tmp_path / "folder")
    trained = read_folder(tmp_path / "folder").provenance["trained"]
    assert trained["tool"] == "loom_jax test" and trained["total_steps"] == 9
    assert (trained["seed"], trained["data_seed"], trained["step"]) == (3, 4, 6)
    assert trained["init_from"] == {"folder": "first", **read_folder(tmp_path / "first").provenance}
    assert (trained["vae_from"]["folder"], trained["vae_from"]["total_steps"]) == ("autoencoder", 7)
    assert str(tmp_path) not in (tmp_path / "folder" / RECORD).read_text()


def test_what_the_run_wrote_down_counts_and_old_runs_wrote_nothing(tmp_path):
    origin = {"recipe": ["/data/me/x.py:on", "init_from=/data/w"], "init_from": {"folder": "w", "source": "v step 2"}}
    train = TRAINED | {"init_from": str(tmp_path / "gone")}
    later = [{"after_step": 2, "recipe": ["/data/me/y.py"], "devices": "4 cpu"}]
    make_run(tmp_path / "run", tiny.build(), lambda path, _: path[0] != "vit", train, origin, {"went_on": later})
    from_run(tmp_path / "run", tmp_path / "folder")
    trained = read_folder(tmp_path / "folder").provenance["trained"]
    assert trained["recipe"] == ["x.py:on", "init_from=w"] and trained["init_from"] == origin["init_from"]
    assert trained["went_on"] == [{**later[0], "recipe": ["y.py"]}]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    del record["origin"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    from_run(tmp_path / "run", tmp_path / "older")
    trained = read_folder(tmp_path / "older").provenance["trained"]
    assert trained["init_from"] == {"folder": "gone"} and "recipe" not in trained


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("/data/runs/a b/world", "world"),
        ("init_from=/data/runs/world", "init_from=world"),
        ("data.mixture.0.paths=('/data/a/*.parquet', '/b.parquet')", "data.mixture.0.paths=('*.parquet', 'b.parquet')"),
        ("configs/world_tiny.py:second", "configs/world_tiny.py:second"),
        ("init_from=../runs/world", "init_from=../runs/world"),
        ("init_from=gs://bucket/folder/model", "init_from=gs://bucket/folder/model"),
        ("1 NVIDIA H200 / other", "1 NVIDIA H200 / other"),
    ],
)
def test_records_hold_no_paths_of_a_machine(given, kept):
    assert portable({"a": [given, 3]}) == {"a": [kept, 3]}


def test_a_decoder_that_was_trained_on_takes_the_place_of_the_first(run, tmp_path):
    vae = make_autoencoder(tmp_path / "decoder", shifted("decoder"), keep_encoder=True)
    command = ["convert", "from-run", str(run), str(tmp_path / "folder"), "--vae"]
    assert loom([*command, str(vae)]) == 0
    bias = load_folder(tmp_path / "folder").vae.decoder.conv_in.bias[...]
    np.testing.assert_array_equal(bias, tiny.vae().decoder.conv_in.bias[...] + 1)
    provenance = read_folder(tmp_path / "folder").provenance
    assert provenance["autoencoder"]["folder"] == "decoder" and provenance["autoencoder"]["keep_encoder"]


def test_an_autoencoder_with_other_latents_is_refused(run, tmp_path):
    vae = make_autoencoder(tmp_path / "other", shifted("encoder"))
    with pytest.raises(CheckpointError, match=r"encodes pictures otherwise .*\(encoder/conv_in/bias\)"):
        from_run(run, tmp_path / "folder", vae=vae)
    with pytest.raises(CheckpointError, match="no finished autoencoder"):
        from_run(run, tmp_path / "folder", vae=tmp_path)
    assert not (tmp_path / "folder").exists()
