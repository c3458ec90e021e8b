"""Several processes convert one release together: the same weights as one process, each its share, all or nothing."""

import sys
from pathlib import Path

import pytest

from loom_jax.checkpoint import read_folder, read_params, stored_params
from loom_jax.converters import to_orbax
from loom_jax.converters.synthetic import write_synthetic_release
from loom_jax.core import ConfigError, LoomError
from loom_jax.launch import JobDescription, LocalJob, Patience
from tests.reference import CKPT
from tests.test_converters import SMALL, mixed

# What each process runs: the command as the launcher starts it, with pieces so small that large tensors are cut.
PROCESS = """
import os, signal, sys
from loom_jax.checkpoint import arrays
from loom_jax.launch import entry
from loom_jax.core import run_command

def fail(*_):
    if "KILLED" in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError("No space left on device")

arrays.PIECE_BYTES, arrays.CHUNK_BYTES = 8_000, 3_000
if os.environ.get("FAILS") == os.environ["JAX_PROCESS_ID"]:
    arrays._fill = fail
sys.exit(run_command("convert", entry.main, sys.argv[1:]))
"""


class Processes(LocalJob):
    """A job whose processes are the script above."""

    def commands(self, port: int = 0) -> list[tuple[dict[str, str], list[str]]]:
        found = super().commands(port)
        return [(given, [sys.executable, "-c", PROCESS, *words[3:]]) for given, words in found]


def convert(source: Path, destination: Path, said: list[str] | None = None, **env: str) -> tuple[int, list[str]]:
    """Converts in two processes; returns the exit status and what they said, without warnings of others."""
    lines = [] if said is None else said
    words = ("to-orbax", str(source), str(destination))
    job = JobDescription(command="convert", accelerator="cpu", arguments=words, env=env)
    status = Processes(job, 2, Patience(kill=2), say=lines.append).run()
    noise = ("Gloo", "WARNING:absl", "[launch]")
    return status, [line for line in lines if not any(word in line for word in noise)]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("release") / "small"
    write_synthetic_release(path, SMALL, dtype=mixed, tokenizer=CKPT, leave_out=("latent_pos_embed.pos_embed",))
    return path


@pytest.mark.slow
def test_two_processes_convert_what_one_does_and_each_its_share(release: Path, tmp_path: Path) -> None:
    to_orbax(release, tmp_path / "one")
    status, said = convert(release, tmp_path / "two")
    assert (status, said) == (0, [f"[0] {tmp_path / 'two'}"])
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}
    one, two = read_folder(tmp_path / "one"), read_folder(tmp_path / "two")
    assert two.config == one.config and two.files == one.files
    assert dict(two.provenance) | {"created": None} == dict(one.provenance) | {"created": None}
    assert all((one.path / name).read_bytes() == (two.path / name).read_bytes() for name in one.files)
    for component in ("model", "vae"):
        stored = stored_params(one.path / component)
        assert stored_params(two.path / component) == stored
        expected, found = (read_params(folder.path / component, stored) for folder in (one, two))
        assert all(expected[name].tobytes() == found[name].tobytes() for name in stored)
        for share in ("d", "ocdbt.process_1/d"):  # what process 0 wrote, and process 1
            size = sum(path.stat().st_size for path in (two.path / component / "state" / share).iterdir())
            assert size > 0.4 * sum(leaf.nbytes for leaf in stored.values())


@pytest.mark.slow
def test_a_process_that_fails_ends_all_with_one_line_and_no_folder(release: Path, tmp_path: Path) -> None:
    status, said = convert(release, tmp_path / "two", FAILS="1")
    assert status == 2 and len(said) == 1 and not list(tmp_path.iterdir())
    assert said[0].startswith("[1] loom convert: ") and "No space left on device" in said[0]


@pytest.mark.slow
def test_a_process_that_is_killed_ends_all_and_there_is_no_folder(release: Path, tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(LoomError, match="process 1 was killed by SIGKILL$"):
        convert(release, tmp_path / "two", said=said, FAILS="1", KILLED="yes")
    assert not (tmp_path / "two").exists()
    assert not any("Traceback" in line for line in said)


@pytest.mark.slow
def test_bad_input_is_said_once(release: Path, tmp_path: Path) -> None:
    status, said = convert(tmp_path / "nothing", tmp_path / "two")
    assert status == 2 and said == [
        f"[0] loom convert: {tmp_path / 'nothing'} is not a folder: give the release folder that holds "
        "ema.safetensors and ae.safetensors"
    ]


@pytest.mark.parametrize("arguments", [("from-orbax", "a", "b"), ("inspect", "a"), ()])
def test_other_conversions_are_one_process(arguments: tuple[str, ...]) -> None:
    job = JobDescription(command="convert", accelerator="cpu", arguments=arguments)
    with pytest.raises(ConfigError, match="processes=2: `loom convert` is one process; .* `loom convert to-orbax`"):
        LocalJob(job, 2)
    with pytest.raises(ConfigError, match="`loom convert` is one process .*, not 4: give one node and one task"):
        JobDescription(command="convert", arguments=arguments, nodes=4)
    assert JobDescription(command="convert", arguments=("to-orbax", "a", "b"), nodes=4).processes == 4
