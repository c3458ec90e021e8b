"""Training an autoencoder by a recipe of its own, and a model on top of it."""

import json
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from loom_jax.checkpoint import autoencoder_origin, restore_params
from loom_jax.cli import main
from loom_jax.core import STOPPED, AutoencoderConfig, CheckpointError, ConfigError, InputError
from loom_jax.data import MixtureEntry, Pictures, PicturesConfig
from loom_jax.models import Autoencoder
from loom_jax.train import restore_autoencoder

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SMALL = ["vae.ch=4", "vae.ch_mult=(1,2)", "vae.num_groups=2", "vae.z_channels=3", "pictures.batch=3"]
SMALL += ["save.every=2", "log_every=1", "optimizer.warmup_steps=1"]


def train(workdir: Path, *overrides: str, variant: str = "") -> int:
    given = [f"--config.{override}" for override in (*SMALL, *overrides)]
    config = f"{CONFIGS / 'world_autoencoder.py'}{variant}"
    return main(["train", "--config", config, "--workdir", str(workdir), *given])


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run of six steps."""
    workdir = tmp_path_factory.mktemp("autoencoder") / "run"
    assert train(workdir, "total_steps=6") == 0
    return workdir


def entry(recipe: str, weight: float = 1.0) -> MixtureEntry:
    return MixtureEntry(name=recipe, source="world", recipe=recipe, weight=weight)


class TestPictures:
    def test_a_batch_is_the_same_whoever_asks_when(self):
        config = PicturesConfig((entry("style"), entry("tutorial", 3.0)), batch=3, side=64)
        one, other = Pictures(config), Pictures(config)
        in_turn = [one[k] for k in (5, 6, 7)]
        assert all(picture.shape == (3, 64, 64, 3) and picture.dtype == np.uint8 for picture in in_turn)
        assert np.array_equal(other[7], in_turn[2]) and np.array_equal(other[5], in_turn[0])
        assert not np.array_equal(in_turn[0], in_turn[1])
        one.close(), other.close()

    def test_pictures_of_another_size_are_scaled(self):
        pictures = Pictures(PicturesConfig((entry("tutorial"),), batch=2, side=24))
        assert pictures[1].shape == (2, 24, 24, 3)
        pictures.close()

    def test_an_empty_mixture_is_refused(self):
        with pytest.raises(ConfigError, match="mixture of 0"):
            PicturesConfig((), batch=2, side=24)


class TestTraining:
    def test_the_loss_falls_and_every_line_has_it(self, finished):
        losses = [line["loss"] for line in lines(finished)]
        assert [line["step"] for line in lines(finished)] == [1, 2, 3, 4, 5, 6]
        assert losses[-1] < losses[0]

    def test_a_run_that_went_on_ends_as_one_that_did_not_stop(self, finished, tmp_path):
        # The schedule depends on the number of steps, so the first part is cut off by removing what came later.
        assert train(tmp_path / "run", "total_steps=6") == 0
        for step in ("4", "6"):
            for path in sorted((tmp_path / "run" / "checkpoints" / step).rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
            (tmp_path / "run" / "checkpoints" / step).rmdir()
        assert train(tmp_path / "run", "total_steps=6") == 0

        def losses(workdir: Path) -> list[float]:
            return [line["loss"] for line in lines(workdir)]

        assert losses(tmp_path / "run") == losses(finished)

    def test_a_ctrl_c_saves_and_the_run_goes_on(self, finished, tmp_path, monkeypatch, capfd):
        class Interrupting(Pictures):
            def __getitem__(self, number):
                if number == 3:
                    os.kill(os.getpid(), signal.SIGINT)
                return super().__getitem__(number)

        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
        with monkeypatch.context() as patch:
            patch.setattr("loom_jax.train.autoencoder.Pictures", Interrupting)
            assert train(tmp_path / "run", "total_steps=6") == STOPPED
        signal.signal(signal.SIGINT, before)
        said = capfd.readouterr()
        assert "stopped after step 3 of 6, with a checkpoint" in said.out and "saves after this step" in said.err
        assert train(tmp_path / "run", "total_steps=6") == 0
        assert [line["loss"] for line in lines(tmp_path / "run")] == [line["loss"] for line in lines(finished)]

    def test_a_folder_of_another_autoencoder_is_refused(self, finished, capsys):
        assert train(finished, "total_steps=6", "vae.z_channels=5") == 2
        assert "another autoencoder" in capsys.readouterr().err

    def test_sides_that_it_cannot_halve_are_refused(self, tmp_path, capsys):
        assert train(tmp_path / "run", "total_steps=6", "pictures.side=63") == 2
        assert "pictures.side=63" in capsys.readouterr().err

    def test_the_decoder_alone_goes_on_from_a_finished_run(self, finished, tmp_path):
        run = tmp_path / "run"
        assert train(run, "total_steps=2", f"init_from={finished}", variant=":decoder") == 0
        config = AutoencoderConfig(4, (1, 2), 1, 3, 1.0, 0.0, num_groups=2)
        abstract = nnx.split(nnx.eval_shape(lambda: Autoencoder(config, rngs=nnx.Rngs(0))), nnx.Param)[1]
        before, after = (restore_autoencoder(folder, config, abstract) for folder in (finished, run))
        moved = {
            name: max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), before[name], after[name])))
            for name in ("encoder", "decoder")
        }
        assert moved["encoder"] == 0 and 0 < moved["decoder"] < 0.01  # two steps away from where the other ended
        told = autoencoder_origin(run)
        assert told["recipe"][0].endswith("world_autoencoder.py:decoder") and "total_steps=2" in told["recipe"]
        assert told["keep_encoder"] and told["total_steps"] == 2 and told["devices"] == "1 cpu"
        assert told["init_from"]["folder"] == finished.name and told["init_from"]["total_steps"] == 6
        assert "went_on" not in told
        assert train(run, "total_steps=3", f"init_from={finished}", variant=":decoder") == 0
        told = autoencoder_origin(run)
        assert "total_steps=2" in told["recipe"] and told["total_steps"] == 3
        (later,) = told["went_on"]
        assert later["after_step"] == 2 and "total_steps=3" in later["recipe"] and later["devices"] == "1 cpu"

    def test_an_encoder_that_is_not_there_cannot_be_kept(self, tmp_path, capsys):
        assert train(tmp_path / "run", "total_steps=2", "keep_encoder=True") == 2
        assert "keep_encoder=True without init_from" in capsys.readouterr().err
        assert train(tmp_path / "run", "total_steps=2", f"init_from={tmp_path}") == 2
        assert "no finished autoencoder" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


class TestModelOnTop:
    def test_a_model_begins_with_the_trained_autoencoder(self, finished, tmp_path):
        from loom_jax.commands.train import read_config, read_recipe
        from loom_jax.train import build_job

        job = build_job(self.config(finished, read_config, read_recipe))
        stored = restore_params(finished / "vae", job.vae_params)
        found, expected = (tree["encoder"]["conv_in"]["kernel"][...] for tree in (job.vae_params, stored))
        assert np.array_equal(found, expected)
        assert job.encoder.tokenizer.encode("draw a small red circle") == job.encoder.tokenizer.encode(
            "draw a small red circle"
        )
        assert len(job.encoder.tokenizer.encode("draw a small red circle")) == 5  # one token a word

    def test_another_autoencoder_is_refused(self, finished):
        from loom_jax.commands.train import read_config, read_recipe
        from loom_jax.train import build_job

        config = self.config(finished, read_config, read_recipe, "model.vae.z_channels=5")
        with pytest.raises(InputError, match=r"model\.vae is"):
            build_job(config)

    def test_a_run_goes_on_with_the_autoencoder_that_it_was_begun_with(self, finished, tmp_path):
        from loom_jax.commands.train import read_config, read_recipe
        from loom_jax.train import train as train_model

        short = ["total_steps=1", "data.rows=1", "held_out=None", "watch.held_out_every=0"]
        config = self.config(finished, read_config, read_recipe, *short)
        train_model(config, tmp_path / "run")
        other = self.config(shutil.copytree(finished, tmp_path / "other"), read_config, read_recipe, *short)
        with pytest.raises(CheckpointError, match="was begun with vae_from"):
            train_model(other, tmp_path / "run")

    def test_an_unfinished_run_is_refused(self, tmp_path):
        from loom_jax.commands.train import read_config, read_recipe
        from loom_jax.train import build_job

        with pytest.raises(InputError, match="no finished autoencoder"):
            build_job(self.config(tmp_path, read_config, read_recipe))

    @staticmethod
    def config(vae_from: Path, read_config, read_recipe, *overrides: str):
        small = [f"model.{override}" for override in SMALL[:4]]
        sizes = ["model.decoder.hidden_size=24", "model.decoder.num_layers=1", "model.max_latent_size=16"]
        given = [*small, *sizes, f"vae_from={vae_from}", *overrides]
        return read_config(read_recipe(CONFIGS / "world_tiny.py"), given)
