"""The ablation: every variant changes what it says, and the benchmark trains, scores and compares two of them."""

import json
import subprocess
import sys

import pytest

from benchmarks.ablation import main as ablation
from loom_jax.cli import main
from loom_jax.commands.train import read_config, read_recipe
from loom_jax.configs.world_ablation import IDEAS
from loom_jax.core import InputError
from tests.sources import ROOT

CONFIGS = ROOT / "configs"
VAE = ["vae.ch=4", "vae.ch_mult=(1,2)", "vae.num_groups=2", "vae.z_channels=3"]
SIZES = ["decoder.hidden_size=24", "decoder.num_layers=1", "vit.num_layers=1", "latent_patch_size=8"]


@pytest.mark.parametrize("variant", IDEAS)
def test_a_variant_differs_from_the_whole_in_one_thing(variant):
    whole, other = (read_config(read_recipe(f"{CONFIGS / 'world_ablation.py'}:{v}"), []) for v in ("whole", variant))
    changed = {
        name
        for name in ("planning", "time_tokens", "entity_tokens")
        if getattr(whole.data.method, name) != getattr(other.data.method, name)
    }
    changed |= {"history"} if whole.data.history != other.data.history else set()
    assert len(changed) == (variant != "whole")
    assert whole.model == other.model and whole.total_steps == other.total_steps


def test_the_base_knows_nothing_of_what_is_compared():
    base, whole = (read_config(read_recipe(f"{CONFIGS / 'world_ablation.py'}:{v}"), []) for v in ("base", "whole"))
    assert base.model == whole.model
    assert {entry.recipe for entry in base.data.mixture} == {"t2i", "edit", "tutorial_plan"}


def test_a_variant_that_is_not_there_is_named():
    with pytest.raises(InputError, match="it knows base, whole, no_planning"):
        read_recipe(CONFIGS / "world_ablation.py:no_model")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--variant", "magic"], "there are whole, no_planning"),
        (["--seeds", "0"], "0 is not at least 1"),
        (["--count", "0"], "0 is not at least 1"),
        (["--out", "FILE"], "cannot be used"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(tmp_path, monkeypatch, capsys, wrong, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    with pytest.raises(SystemExit) as left:
        ablation(["--vae", "absent", *wrong])
    assert left.value.code and said in f"{left.value.code}{capsys.readouterr().err}"
    assert not (tmp_path / "runs" / "ablation" / "base").exists()


@pytest.mark.slow
def test_two_variants_are_trained_scored_and_compared(tmp_path):
    vae = tmp_path / "autoencoder"
    small = [*VAE, "pictures.batch=3", "total_steps=2", "save.every=2", "optimizer.warmup_steps=1"]
    command = ["train", "--config", str(CONFIGS / "world_autoencoder.py"), "--workdir", str(vae)]
    assert main([*command, *(f"--config.{key}" for key in small)]) == 0

    changes = [*(f"model.{key}" for key in (*VAE, *SIZES)), "total_steps=2"]
    command = [sys.executable, "-m", "benchmarks", "ablation", "--vae", str(vae), "--count", "2"]
    command += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    command += ["--variant", "whole", "--variant", "no_planning", *(f"--set={change}" for change in changes)]
    command += ["--set-base=seed=3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["variant"]: row for row in json.loads((tmp_path / "out" / "table.json").read_text())}
    assert set(rows) == {"whole", "no_planning"}
    for row in rows.values():
        assert row["seeds"] == 2
        assert len(row["figures"]["tutorial step"]["means"]) == 2
    assert (
        len(rows["no_planning"]["seconds"]) == 2 and min(rows["no_planning"]["seconds"]) > 0
    )  # after two steps of training the other writes no plan, and so no frame
    assert rows["no_planning"]["figures"]["tutorial plan"]["means"] == []  # it writes none
    difference = rows["no_planning"]["figures"]["tutorial step"]["difference"]
    assert difference["requests"] == 2 and difference["count"] > 2  # seeds are no further requests
    assert json.loads((tmp_path / "runs" / "base" / "run.json").read_text())["train"]["seed"] == 3
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert again.returncode == 0 and "s/step" not in again.stdout + again.stderr  # what is scored is not made again
    assert "| no_planning | 2 |" in (tmp_path / "out" / "table.md").read_text()
    other = subprocess.run([*command, "--set=seed=4"], capture_output=True, text=True, cwd=ROOT)
    assert other.returncode and "holds what came of" in other.stderr and "give another folder" in other.stderr
