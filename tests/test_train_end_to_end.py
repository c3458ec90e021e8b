"""What a user does with a run, by commands: pictures while it trains, a disk that fills up, adapters to export."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loom_jax.checkpoint import read_folder, read_params, saved_steps, step_path, stored_params
from loom_jax.cli import main as loom

ROOT = Path(__file__).resolve().parents[1]

RECIPE = """
import ml_collections
from tests.training import RECIPE

def get_config():
    config = ml_collections.ConfigDict(RECIPE)
    config.data.rows = 2
    config.held_out = config.data.to_dict() | {"seed": 7}
    return config
"""

WATCHED = ("watch.held_out_every=2", "watch.sample_every=2", "watch.sample_prompts=('a red circle', 'a blue bar')")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "small.py"
    path.write_text(RECIPE)
    return path


def train(recipe, workdir, *overrides):
    arguments = ["train", "--config", str(recipe), "--workdir", str(workdir)]
    return [*arguments, *(f"--config.{override}" for override in overrides)]


@pytest.fixture(scope="module")
def watched(recipe, tmp_path_factory):
    """A run of two steps that was looked at, with a checkpoint of the second."""
    workdir = tmp_path_factory.mktemp("runs") / "watched"
    assert loom(train(recipe, workdir, "total_steps=2", *WATCHED)) == 0
    return workdir


def test_pictures_and_the_held_out_loss_come_as_often_as_asked(watched):
    samples = sorted(path.relative_to(watched / "samples") for path in (watched / "samples").rglob("*.png"))
    assert samples == [Path("2/0.png"), Path("2/1.png")]
    pictures = [np.asarray(Image.open(watched / "samples" / path)) for path in samples]
    assert pictures[0].ndim == 3 and pictures[0].std() > 0 and (pictures[0] != pictures[1]).any()
    lines = [json.loads(line) for line in (watched / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(line["loss"] > 0 for line in lines)
    events = [json.loads(line) for line in (watched / "events.ndjson").read_text().splitlines()]
    assert [(event["event"], event["step"]) for event in events] == [("held_out", 2), ("goodput", 2)]
    assert events[0]["held_out/ce"] > 0 and events[0]["held_out/mse"] > 0


LIMITED = """
import resource, sys
from loom_jax.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, resource.RLIM_INFINITY))
sys.exit(main(sys.argv[1:]))
"""


def test_the_run_and_its_export_say_by_what_they_were_trained(recipe, watched, tmp_path):
    assert loom(["convert", "from-run", str(watched), str(tmp_path / "model"), "--step", "2"]) == 0
    trained = read_folder(tmp_path / "model").provenance["trained"]
    assert trained["recipe"] == ["small.py", "total_steps=2", *WATCHED]
    assert (trained["seed"], trained["data_seed"], trained["step"], trained["total_steps"]) == (42, 42, 2, 2)
    assert trained["tool"].startswith("loom_jax ") and trained["devices"] == "1 cpu"
    assert json.loads((watched / "run.json").read_text())["origin"]["recipe"][0] == str(recipe)
    assert str(recipe.parent) not in (tmp_path / "model" / "loom.json").read_text()


def test_a_disk_that_is_full_ends_a_run_in_one_line_and_it_goes_on_later(recipe, watched):
    arguments = train(recipe, watched, "total_steps=4")
    # The limit would also cut off what is compiled anew, and warn of it.
    full = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "false"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert full.returncode == 1, full.stderr[-3000:]
    assert "Traceback" not in full.stderr
    (said,) = [line for line in full.stderr.splitlines() if line.startswith("loom")]  # libraries may warn
    assert said.startswith("loom train: the checkpoint of step 4 could not be written to ")
    assert said.endswith("; step 2 is the last good one: make room or mend the place, and start again")
    assert saved_steps(watched) == [2]
    assert [path.name for path in (watched / "checkpoints").iterdir()] == ["2"]  # what it took is given back
    assert loom(arguments) == 0
    assert saved_steps(watched) == [2, 4]
    lines = [json.loads(line)["step"] for line in (watched / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4]


def test_adapters_are_trained_and_merged_into_an_export(recipe, tmp_path, capsys):
    run, folder = tmp_path / "run", tmp_path / "merged"
    adapters = ("lora.rank=2", "lora.alpha=8.0", "lora.targets=('q_proj',)", "total_steps=2")
    assert loom(train(recipe, run, *adapters)) == 0
    assert loom(["convert", "from-run", str(run), str(folder)]) == 2 and not folder.exists()
    assert "trained 4 low-rank adapters" in capsys.readouterr().err
    assert loom(["convert", "from-run", str(run), str(folder), "--merge-lora", "--weights", "params"]) == 0
    at = step_path(run, None)
    state, merged = read_params(at, stored_params(at)), read_params(folder / "model", stored_params(folder / "model"))
    assert {name.rsplit("/", 1)[1] for name in state if name.startswith("trainable/")} == {"lora_a", "lora_b"}
    assert len(merged) == sum(name.startswith("frozen/") for name in state)
    for name, found in merged.items():
        expected = state[f"frozen/{name}"]
        if name.endswith("q_proj/kernel") and name.startswith("decoder/"):
            a, b = (state[f"trainable/{name.removesuffix('kernel')}{part}"] for part in ("lora_a", "lora_b"))
            assert np.abs(b).max() > 0
            expected = expected + 4 * (a @ b.reshape(len(b), -1)).reshape(expected.shape)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7, err_msg=name)
