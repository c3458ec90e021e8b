"""`loom train` as it is typed: variants of recipes, and one clear line for whatever cannot be used."""

import dataclasses
from types import SimpleNamespace

import pytest

from loom_jax.checkpoint import start_run
from loom_jax.commands.train import main, read_config, read_recipe
from loom_jax.core import STOPPED, InputError, run_command
from loom_jax.document import Tokenizer
from tests import training

TINY = "configs/tiny.py"


def run(tmp_path, capsys, *argv, config=TINY):
    """Exit status and the lines on stderr."""
    status = run_command("loom train", main, ["--config", str(config), "--workdir", str(tmp_path / "run"), *argv])
    return status, capsys.readouterr().err.splitlines()


RECIPE = """
import ml_collections
from tests.training import RECIPE

MESHES = {"one": {}, "two": {}}

def get_config(variant="one"):
    MESHES[variant]
    config = ml_collections.ConfigDict(RECIPE)
    config.seed = list(MESHES).index(variant)
    return config
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--config.optimizer.lr=1e-4"], "unknown key 'optimizer.lr': OptimizerConfig knows name, learning_rate"),
        (["--config.total_steps=many"], "total_steps='many' is a str, expected int"),
        (["--config.ema.dtype=float16"], "ema.dtype='float16' is not one of 'float32', 'bfloat16'"),
        (["--config.remat=all"], "remat='all' is not one of none, full"),
        (["--config.attention=sparse"], "attention='sparse' is not one of "),
        (["--config.mesh.preset=ring"], "sharding preset 'ring' is not one of single, fsdp"),
        (["--config.frozen=('vti/*',)"], "frozen pattern 'vti/*' fits no parameter"),
        (["--config.lora.rank=2", "--config.lora.targets=('query',)"], "lora target 'query' names no projection"),
        (["--config.data.rows=3", "--config.mesh.preset=fsdp"], "data.rows=3 on a mesh of {'fsdp': 8}"),
        (["--config.microbatches=3"], "make it a multiple of 3"),
        (["--config.model.decoder.vocab_size=100"], "the embedding table 100 rows"),
        (["--config.watch.held_out_every=5"], "no held_out data is given"),
        (["--config.init_from=absent"], "absent"),
        (["--config.data.mixture.0.recipe=t3i"], "t3i"),
        (["--replay-step", "3"], "is not a training run"),
        (["--workdirs", "x"], "unrecognized arguments: --workdirs x"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path, capsys, argv, says):
    status, lines = run(tmp_path, capsys, *argv)
    assert status == 2 and len(lines) == 1, lines
    assert lines[0].startswith("loom train: ") and says in lines[0]
    assert not (tmp_path / "run").exists()  # and nothing is left behind


def test_a_recipe_that_is_none(tmp_path, capsys):
    missing = run(tmp_path, capsys, config=tmp_path / "absent.py")
    (tmp_path / "broken.py").write_text("def get_config(:")
    broken = run(tmp_path, capsys, config=tmp_path / "broken.py")
    (tmp_path / "other.py").write_text("x = 1")
    other = run(tmp_path, capsys, config=tmp_path / "other.py")
    model_only = run(tmp_path, capsys, config="configs/bagel_7b.py")
    for (status, lines), says in zip(
        (missing, broken, other, model_only),
        ("there is no such recipe", "cannot be run (SyntaxError", "no function get_config", "a model without data"),
        strict=True,
    ):
        assert status == 2 and len(lines) == 1 and says in lines[0]


def test_a_variant_of_a_recipe_is_named_after_a_colon(small, tmp_path, capsys):
    assert read_config(read_recipe(small), []).seed == 0
    assert read_config(read_recipe(small.with_name("small.py:two")), ["total_steps=9"]).seed == 1
    with pytest.raises(InputError, match="has no variant 'three'; it knows one, two"):
        read_recipe(small.with_name("small.py:three"))
    status, lines = run(tmp_path, capsys, config=f"{TINY}:large")
    assert status == 2 and "has no variant 'large'" in lines[0]


def test_a_workdir_of_another_model_is_refused(small, tmp_path, capsys):
    given = training.config()
    files = tmp_path / "files"
    files.mkdir()
    Tokenizer.of_bytes().save(files)
    other = dataclasses.replace(given.model, max_latent_size=8)
    start_run(tmp_path / "run", other, {}, files, tuple(p.name for p in files.iterdir()), training.vae_params(), "test")
    status, lines = run(tmp_path, capsys, config=small)
    assert status == 2 and len(lines) == 1
    assert "is a run of another model" in lines[0] and "max_latent_size" in lines[0]


@pytest.mark.parametrize(("step", "status"), [(5, STOPPED), (6, 0)])
def test_a_run_that_was_stopped_says_so_by_its_status(step, status, small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("loom_jax.train.train", lambda *_: SimpleNamespace(step=step))
    assert run(tmp_path, capsys, "--config.total_steps=6", config=small)[0] == status == (75 if step < 6 else 0)


def test_help_shows_a_command_that_reads(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert "loom train --config configs/tiny.py --workdir runs/tiny" in text and "--replay-step" in text
