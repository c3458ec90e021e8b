"""Conversion of releases: the mapping tables, the way there and back bit for bit, and bad input."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import numpy as safetensors_numpy

from loom_jax.checkpoint import ParamWriter, read_folder, read_params, stored_params, write_record
from loom_jax.converters import from_orbax, inspect, to_orbax
from loom_jax.converters.bagel import main
from loom_jax.converters.release import open_release
from loom_jax.converters.synthetic import write_synthetic_release
from loom_jax.converters.tables import Entry, autoencoder_entries, model_entries
from loom_jax.converters.tensors import DTYPES, TensorFile, TensorFileWriter
from loom_jax.core import (
    AutoencoderConfig,
    CheckpointError,
    ConfigError,
    DecoderConfig,
    InputError,
    LoomConfig,
    SiglipConfig,
    TokenizerError,
)
from loom_jax.models import Autoencoder, LoomModel
from loom_jax.parallel import flatten_params
from tests.reference import CKPT, manifest
from tests.sources import ROOT

BAGEL_7B = LoomConfig(
    decoder=DecoderConfig(152064, 3584, 18944, 28, 28, 4, 128),
    vit=SiglipConfig(1152, 4304, 26, 16, 14, 4900),
    vae=AutoencoderConfig(128, (1, 2, 4, 4), 2, 16, 0.3611, 0.1159),
    max_latent_size=64,
    vit_max_num_patch_per_side=70,
)
SMALL = LoomConfig(
    decoder=DecoderConfig(516, 24, 40, 2, 6, 2, 10),
    vit=SiglipConfig(36, 28, 3, 3, 7, 25),
    vae=AutoencoderConfig(32, (1, 3), 1, 5, 0.4, 0.2),
    max_latent_size=6,
    vit_max_num_patch_per_side=5,
)
LAYER = "language_model.model.layers.1."


def mixed(key: str) -> np.dtype:
    """A dtype for every tensor, so that each file holds all of them."""
    return list(DTYPES.values())[sum(key.encode()) % 4]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("release") / "small"
    write_synthetic_release(path, SMALL, dtype=mixed, tokenizer=CKPT)
    return path


@pytest.fixture
def copy(release: Path, tmp_path: Path) -> Path:
    """A release that a test may spoil."""
    return Path(shutil.copytree(release, tmp_path / "copy"))


def on_disk(module: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Path on disk -> shape of a module's parameters."""
    shapes = {}
    for path, leaf in flatten_params(nnx.state(module, nnx.Param))[0].items():
        if "layers/" in path:
            head, tail = path.split("layers/")
            shapes |= {f"{head}layers/{i}/{tail}": leaf.shape[1:] for i in range(leaf.shape[0])}
        else:
            shapes[path] = leaf.shape
    return shapes


@pytest.mark.parametrize("name", ["7b", "ae"])
def test_the_real_release_maps_onto_the_abstract_model_both_ways(name: str) -> None:
    recorded = {key: tuple(tensor["shape"]) for key, tensor in manifest(name)["tensors"].items()}
    entries = model_entries(BAGEL_7B) if name == "7b" else autoencoder_entries(BAGEL_7B.vae)
    assert {entry.key: entry.shape for entry in entries} == recorded
    assert len(entries) == len(recorded)
    build = (
        (lambda: LoomModel(BAGEL_7B, rngs=nnx.Rngs(0)))
        if name == "7b"
        else (lambda: Autoencoder(BAGEL_7B.vae, rngs=nnx.Rngs(0)))
    )
    assert {entry.path: entry.param_shape for entry in entries} == on_disk(nnx.eval_shape(build))
    assert sum(entry.size for entry in entries) == {"7b": 14_607_260_128, "ae": 83_819_683}[name]


def test_sizes_of_the_real_release_are_read_off_its_shapes() -> None:
    from loom_jax.converters.release import read_config

    shapes = [{key: tuple(t["shape"]) for key, t in manifest(name)["tensors"].items()} for name in ("7b", "ae")]
    jsons = {"vit_config.json": {"num_attention_heads": 16, "num_hidden_layers": 27, "image_size": 980}}
    assert read_config(jsons | {"config.json": {"model_type": "bagel"}}, *shapes, "ema.safetensors") == BAGEL_7B


@pytest.mark.parametrize("entry", model_entries(SMALL) + autoencoder_entries(SMALL.vae), ids=lambda entry: entry.key)
def test_every_move_has_its_inverse(entry: Entry) -> None:
    tensor = np.arange(entry.size).reshape(entry.shape)
    param = entry.from_torch(tensor)
    assert param.shape == entry.param_shape and np.shares_memory(param, tensor)
    np.testing.assert_array_equal(entry.to_torch(np.ascontiguousarray(param)), tensor)


def test_axes_land_where_the_networks_expect_them(release: Path) -> None:
    source = open_release(release)
    params = {
        entry.path: np.asarray(entry.from_torch(tensors[entry.key]), np.float64)
        for tensors, entries in ((source.model, source.model_entries), (source.vae, source.vae_entries))
        for entry in entries
    }
    x = np.random.default_rng(1).standard_normal(24)
    weight = source.model[f"{LAYER}self_attn.k_proj_moe_gen.weight"].astype(np.float64)
    np.testing.assert_allclose(
        np.einsum("d,dna->na", x, params["decoder/layers/1/gen/k_proj/kernel"]), (weight @ x).reshape(2, 10)
    )
    heads = np.random.default_rng(2).standard_normal((6, 10))
    weight = source.model[f"{LAYER}self_attn.o_proj.weight"].astype(np.float64)
    np.testing.assert_allclose(
        np.einsum("na,nad->d", heads, params["decoder/layers/1/und/o_proj/kernel"]), weight @ heads.reshape(-1)
    )
    kernel = params["decoder/conv_in/kernel"]
    assert kernel.shape == (3, 3, 5, 96)
    assert kernel[0, 2, 3, 7] == source.vae["decoder.conv_in.weight"][7, 3, 0, 2]


def test_there_and_back_is_bit_for_bit(copy: Path, tmp_path: Path) -> None:
    ema = copy / "ema.safetensors"
    tensors = safetensors_numpy.load_file(ema)
    rng = np.random.default_rng(5)
    for key, array in tensors.items():  # any bits: NaNs with payloads, infinities, denormals
        tensors[key] = np.frombuffer(rng.bytes(array.nbytes), array.dtype).reshape(array.shape)
    safetensors_numpy.save_file(tensors, ema)
    to_orbax(copy, tmp_path / "orbax")
    from_orbax(tmp_path / "orbax", tmp_path / "back")
    for name in ("ema.safetensors", "ae.safetensors"):
        before, after = safetensors_numpy.load_file(copy / name), safetensors_numpy.load_file(tmp_path / "back" / name)
        assert set(before) == set(after)
        for key, array in before.items():
            assert array.dtype == after[key].dtype and array.shape == after[key].shape, key
            assert array.tobytes() == after[key].tobytes(), key
    assert {array.dtype for array in tensors.values()} == set(DTYPES.values())
    others = {path.name for path in copy.iterdir()} - {"ema.safetensors", "ae.safetensors"}
    assert {path.name for path in (tmp_path / "back").iterdir()} == others | {"ema.safetensors", "ae.safetensors"}
    assert all((copy / name).read_bytes() == (tmp_path / "back" / name).read_bytes() for name in others)


def test_large_tensors_go_in_pieces_both_ways(release: Path, tmp_path: Path, monkeypatch) -> None:
    from loom_jax.checkpoint import arrays
    from loom_jax.converters import stream, tensors

    for module, name, size in (
        (arrays, "CONCURRENT_BYTES", 20_000),
        (arrays, "PIECE_BYTES", 8_000),
        (arrays, "CHUNK_BYTES", 3_000),
        (stream, "CONCURRENT_BYTES", 20_000),
        (tensors, "_BLOCK", 1_000),
        (tensors, "_TILE", 7),
    ):
        monkeypatch.setattr(module, name, size)
    to_orbax(release, tmp_path / "orbax")
    from_orbax(tmp_path / "orbax", tmp_path / "back")
    for name in ("ema.safetensors", "ae.safetensors"):
        before, after = TensorFile(release / name), TensorFile(tmp_path / "back" / name)
        assert before.shapes == after.shapes and before.dtypes == after.dtypes
        assert all(before[key].tobytes() == after[key].tobytes() for key in before.shapes)
    to_orbax(release, tmp_path / "cast", dtype="float32")
    source = open_release(release)
    leaves = read_params(tmp_path / "cast/model", stored_params(tmp_path / "cast/model"))
    for entry in source.model_entries:
        cast = entry.from_torch(source.model[entry.key]).astype(np.float32)
        np.testing.assert_array_equal(leaves[entry.path], cast)


def test_a_converted_folder_says_where_it_came_from(release: Path, tmp_path: Path) -> None:
    import hashlib

    to_orbax(release, tmp_path / "orbax")
    folder = read_folder(tmp_path / "orbax")
    assert folder.config == SMALL
    first = folder.provenance["source_files"][0]
    assert first == {
        "name": "ema.safetensors",
        "bytes": (release / "ema.safetensors").stat().st_size,
        "sha256": hashlib.sha256((release / "ema.safetensors").read_bytes()).hexdigest(),
    }
    assert set(folder.provenance["source_dtypes"]["model"]) == {"bfloat16", "float16", "float32", "float64"}
    assert all((tmp_path / "orbax" / name).is_file() for name in ("tokenizer.json", "llm_config.json"))


def test_weights_in_shards(copy: Path, tmp_path: Path) -> None:
    tensors = safetensors_numpy.load_file(copy / "ema.safetensors")
    keys, places = sorted(tensors), {}
    for number in range(3):
        name = f"model-{number + 1:05d}-of-00003.safetensors"
        safetensors_numpy.save_file({key: tensors[key] for key in keys[number::3]}, copy / name)
        places |= dict.fromkeys(keys[number::3], name)
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert open_release(copy).weights == "ema"
    (copy / "ema.safetensors").unlink()
    sharded = open_release(copy)
    assert sharded.weights == "model" and len(sharded.model.files) == 3
    to_orbax(copy, tmp_path / "orbax")
    assert read_folder(tmp_path / "orbax").provenance["weights"] == "model"
    with pytest.raises(CheckpointError, match="holds no ema.safetensors"):
        open_release(copy, "ema")
    index.write_text(json.dumps({"weight_map": places | {keys[0]: places[keys[1]]}}))
    with pytest.raises(CheckpointError, match=f"says that {places[keys[1]]} holds {keys[0]}, which it does not"):
        open_release(copy)
    index.write_text(json.dumps({"weight_map": places | {keys[0]: "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="shards must lie beside their index"):
        open_release(copy)
    (copy / places[keys[2]]).unlink()
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match="which is not there"):
        open_release(copy)


def test_position_tables_that_are_missing_are_computed_and_left_out_again(tmp_path: Path) -> None:
    tables = ("vit_pos_embed.pos_embed", "latent_pos_embed.pos_embed")
    for name, leave_out in (("with", ()), ("without", tables)):
        write_synthetic_release(tmp_path / name, SMALL, tokenizer=CKPT, leave_out=leave_out)
        to_orbax(tmp_path / name, tmp_path / f"{name}_orbax")
    folders = [tmp_path / "with_orbax", tmp_path / "without_orbax"]
    stored = [stored_params(folder / "model") for folder in folders]
    assert stored[0] == stored[1]
    assert read_folder(folders[1]).provenance["recomputed"] == list(tables)
    from_orbax(folders[1], tmp_path / "back")
    assert (
        TensorFile(tmp_path / "back" / "ema.safetensors").shapes
        == TensorFile(tmp_path / "without/ema.safetensors").shapes
    )


def test_dtype_casts_the_transformer_only(release: Path, tmp_path: Path) -> None:
    to_orbax(release, tmp_path / "orbax", dtype="bfloat16")
    assert {leaf.dtype for leaf in stored_params(tmp_path / "orbax/model").values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert {leaf.dtype for leaf in stored_params(tmp_path / "orbax/vae").values()} == {np.dtype(np.float32)}


def test_a_folder_that_never_was_a_release_becomes_one(release: Path, tmp_path: Path) -> None:
    to_orbax(release, tmp_path / "orbax")
    folder = read_folder(tmp_path / "orbax")
    write_record(folder.path, folder.config, {}, tuple(name for name in folder.files if "config.json" not in name))
    from_orbax(folder.path, tmp_path / "back")
    assert open_release(tmp_path / "back").config == SMALL


# Bad input: what is done to a good release -> what the one line must say.


def edit_json(name: str, key: str, value: object) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = json.loads((path / name).read_text())
        *parents, last = key.split("/")
        node = content
        for parent in parents:
            node = node[parent]
        node[last] = value
        (path / name).write_text(json.dumps(content))

    return edit


def edit_tensors(
    change: Callable[[dict[str, np.ndarray]], object], name: str = "ema.safetensors"
) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        tensors = safetensors_numpy.load_file(path / name)
        change(tensors)
        safetensors_numpy.save_file(tensors, path / name)

    return edit


def edit_bytes(change: Callable[[bytes], bytes], name: str = "ema.safetensors") -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes(change((path / name).read_bytes())) and None


def remove(*names: str, leaving: str = "") -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        for name in names:
            (path / name).unlink()
        if leaving:
            (path / leaving).write_bytes(b"\x80\x04")

    return edit


BAD = {
    "missing keys": (
        edit_tensors(lambda t: [t.pop(f"{LAYER}mlp.{n}_proj.weight") for n in ("up", "down", "gate")]),
        rf"ema.safetensors: 3 missing: {LAYER}mlp.gate_proj.weight.*",
    ),
    "missing size": (edit_tensors(lambda t: t.pop("vae2llm.weight")), "ema.safetensors lacks vae2llm.weight"),
    "unknown key": (edit_tensors(lambda t: t.update(rope=np.ones(2, np.float32))), "1 unknown: rope;"),
    "missing autoencoder key": (
        edit_tensors(lambda t: t.pop("decoder.up.1.block.1.norm2.bias"), "ae.safetensors"),
        "ae.safetensors: 1 missing: decoder.up.1.block.1.norm2.bias",
    ),
    "wrong shape": (
        edit_tensors(lambda t: t.update({"llm2vae.bias": np.ones(7, np.float32)})),
        r"llm2vae.bias has shape \(7,\), expected \(20,\)",
    ),
    "wrong rank": (
        edit_tensors(lambda t: t.update({f"{LAYER.replace('1', '0')}mlp.gate_proj.weight": np.ones(7, np.float32)})),
        "expected 2 axes",
    ),
    "integers": (
        edit_tensors(lambda t: t.update({"llm2vae.bias": np.ones(20, np.int8)})),
        "has dtype I8, expected one of",
    ),
    "truncated": (edit_bytes(lambda b: b[:-100]), r"ema.safetensors is truncated or corrupt: it has \d+ bytes"),
    "truncated header": (edit_bytes(lambda b: b[:100]), "ema.safetensors is truncated or not a safetensors file"),
    "empty": (edit_bytes(lambda b: b[:3], "ae.safetensors"), "ae.safetensors is truncated or not a safetensors file"),
    "corrupt header": (
        edit_bytes(lambda b: b[:8] + b"#" + b[9:]),
        "ema.safetensors is corrupt: its header is not valid JSON",
    ),
    "corrupt offsets": (
        edit_bytes(lambda b: b.replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1)),
        "ema.safetensors is corrupt: tensor",
    ),
    "no weights": (remove("ema.safetensors"), "holds no ema.safetensors or model.safetensors"),
    "no autoencoder": (remove("ae.safetensors"), "holds no ae.safetensors"),
    "pickle": (remove("ema.safetensors", leaving="pytorch_model.bin"), "pytorch_model.bin is a pickle.*save_file"),
    "pickled autoencoder": (remove("ae.safetensors", leaving="ae.pt"), "ae.pt is a pickle"),
    "no tokenizer": (
        remove("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"),
        "holds no tokenizer",
    ),
    "sentencepiece": (
        remove("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", leaving="tokenizer.model"),
        "tokenizer.model is a tokenizer of another kind",
    ),
    "broken json": (lambda path: (path / "config.json").write_text("{") and None, "config.json cannot be read as JSON"),
    "vocabulary": (
        edit_json("llm_config.json", "vocab_size", 512),
        r"llm_config.json says vocab_size = 512, but the weights have .* 516",
    ),
    "kv heads": (edit_json("llm_config.json", "num_key_value_heads", 6), "num_key_value_heads = 6.* 2"),
    "layers": (edit_json("llm_config.json", "num_hidden_layers", 28), "num_hidden_layers = 28.* 2"),
    "ViT layers": (
        edit_json("vit_config.json", "num_hidden_layers", 3),
        "vit_config.json says num_hidden_layers = 3.* 4",
    ),
    "ViT side": (edit_json("vit_config.json", "image_size", 49), "vit_config.json says image_size = 49.* 35"),
    "ViT heads": (
        edit_json("vit_config.json", "num_attention_heads", 5),
        "hidden_size=36 is not a multiple of .*=5",
    ),
    "activation": (edit_json("llm_config.json", "hidden_act", "gelu"), "hidden_act = 'gelu'.* 'silu'"),
    "latent table": (edit_json("config.json", "max_latent_size", 64), "config.json says max_latent_size = 64.* 6"),
    "autoencoder": (
        edit_json("config.json", "vae_config/ch_mult", [1, 2]),
        r"config.json vae_config says ch_mult = \[1, 2\].* \[1, 3\]",
    ),
    "rope theta": (edit_json("llm_config.json", "rope_theta", "large"), "decoder.rope_theta='large' is a str"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_releases_are_refused_and_leave_nothing(copy: Path, name: str) -> None:
    spoil, message = BAD[name]
    spoil(copy)
    with pytest.raises(InputError, match=message) as caught:
        to_orbax(copy, copy.parent / "orbax")
    assert isinstance(caught.value, CheckpointError | TokenizerError | ConfigError)
    assert "\n" not in str(caught.value)
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


@pytest.mark.parametrize("fault", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failure_halfway_leaves_nothing(release: Path, tmp_path: Path, monkeypatch, fault: BaseException) -> None:
    write = ParamWriter.write

    def fail(writer: ParamWriter, *arguments: Any) -> None:
        write(writer, *arguments)
        raise fault

    monkeypatch.setattr(ParamWriter, "write", fail)
    with pytest.raises(type(fault)):
        to_orbax(release, tmp_path / "orbax")
    assert not list(tmp_path.iterdir())


def test_a_damaged_converted_folder_is_refused(release: Path, tmp_path: Path) -> None:
    folder = tmp_path / "orbax"
    to_orbax(release, folder)
    (folder / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match="lacks merges.txt"):
        from_orbax(folder, tmp_path / "back")
    shutil.rmtree(folder / "vae")
    with pytest.raises(CheckpointError, match="vae holds no readable Orbax checkpoint"):
        from_orbax(folder, tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["orbax"]


def test_places_that_may_not_be_written(release: Path, copy: Path, tmp_path: Path) -> None:
    target = tmp_path / "orbax"
    to_orbax(release, target)
    with pytest.raises(CheckpointError, match="is already there.*--overwrite"):
        to_orbax(release, target)
    (target / "mark").touch()
    to_orbax(release, target, overwrite=True)
    assert not (target / "mark").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match=r"mine holds no loom.json, so it is not replaced"):
        to_orbax(release, tmp_path / "mine", overwrite=True)
    for place in (copy, copy / "orbax", copy.parent):
        with pytest.raises(CheckpointError, match="lie one inside the other"):
            to_orbax(copy, place, overwrite=True)
    with pytest.raises(CheckpointError, match="is not a folder"):
        to_orbax(release / "ema.safetensors", tmp_path / "other")
    with pytest.raises(CheckpointError, match="is not a converted model"):
        from_orbax(release, tmp_path / "other")


def test_the_writer_keeps_what_readers_need(tmp_path: Path) -> None:
    tensors = {
        "a": np.arange(3, dtype=np.float16),
        "b": np.arange(10, dtype=np.float64).reshape(2, 5).T,
        "c": np.float32(4).reshape(()),
        "d": np.zeros((0, 3), ml_dtypes.bfloat16),
    }
    with TensorFileWriter(
        tmp_path / "t", {key: (array.shape, array.dtype) for key, array in tensors.items()}
    ) as writer:
        for key, array in tensors.items():
            writer.write(key, array)
    read = safetensors_numpy.load_file(tmp_path / "t")
    for key, array in tensors.items():
        np.testing.assert_array_equal(read[key], array)
        assert TensorFile(tmp_path / "t")[key].flags.aligned
    header = (tmp_path / "t").read_bytes()
    ranges = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    assert all(ranges[key]["data_offsets"][0] % array.dtype.itemsize == 0 for key, array in tensors.items())
    with (
        pytest.raises(ValueError, match="1 tensors were never written, a for one"),
        TensorFileWriter(tmp_path / "u", {"a": ((3,), np.dtype(np.float16))}),
    ):
        pass


def test_inspect_shows_both_kinds_of_folder(release: Path, tmp_path: Path, capsys) -> None:
    to_orbax(release, tmp_path / "orbax")
    total = sum(entry.size for entry in model_entries(SMALL) + autoencoder_entries(SMALL.vae))
    for path, kind in ((release, "release, ema weights"), (tmp_path / "orbax", "converted model, loom_jax")):
        inspect(path)
        out = capsys.readouterr().out
        assert kind in out and f"{total:,}" in out and "decoder.num_kv_heads" in out and "float16" in out


def test_the_command(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["to-orbax", "--help"])
    assert stop.value.code == 0
    assert "example:\n  loom convert to-orbax" in capsys.readouterr().out
    assert main(["to-orbax", str(CKPT), str(tmp_path / "orbax")]) == 0
    assert main(["inspect", str(tmp_path / "orbax")]) == 0
    assert main(["from-orbax", str(tmp_path / "orbax"), str(tmp_path / "back")]) == 0
    command = [sys.executable, "-m", "loom_jax.converters.bagel", "to-orbax", str(tmp_path), str(tmp_path / "new")]
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 2 and len(failed.stderr.splitlines()) == 1, failed.stderr
    assert "Traceback" not in failed.stderr and not (tmp_path / "new").exists()
    with pytest.raises(InputError, match="--dtype"):
        main(["to-orbax", str(CKPT), str(tmp_path / "x"), "--dtype", "int8"])


def test_the_benchmark_runs(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "conversion",
        "--smoke",
        "--workdir",
        str(tmp_path),
        "--out",
        str(tmp_path / "report.json"),
    ]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["within_limit"] and report["identical"]
    assert [row["step"] for row in report["rows"]] == ["cp", "to-orbax", "from-orbax"]
    assert all(row["peak_anonymous"] > 0 for row in report["rows"][1:])
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
