"""The command `loom`: what it answers, in which time, and with which exit status."""

import os
import resource
import subprocess
import sys
import types

import pytest

from loom_jax import __version__, cli
from loom_jax.core import ArgumentParser, ConfigError, LoomError, run_command

HEAVY = ("jax", "flax", "optax", "orbax", "grain", "tensorflow_datasets", "matplotlib")


@pytest.fixture
def command(monkeypatch):
    """Returns a function that makes `loom try` run the given main."""

    def install(main):
        module = types.ModuleType("loom_command_under_test")
        module.main = main
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(cli.COMMANDS, "try", cli.Command("for tests", f"{module.__name__}:main"))

    return install


def raising(error):
    """Returns a command that raises `error`."""

    def main(argv):
        raise error

    return main


def imported_by(*arguments):
    """Runs loom in a process of its own; returns its exit status, and which heavy packages it imported."""
    code = (
        "import sys; from loom_jax import cli\n"
        f"try: status = cli.main({list(arguments)!r})\n"
        "except SystemExit as error: status = error.code or 0\n"
        f"print('heavy:', [name for name in {HEAVY!r} if name in sys.modules]); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.returncode, done.stdout.rpartition("heavy: ")[2].strip() + done.stderr


def test_help_names_every_command_and_comes_at_once(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in cli.COMMANDS)
    assert imported_by("--help") == (0, "[]")
    # Processor time, which a busy machine does not stretch.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "loom_jax.cli", "--help"], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_each_command_shows_an_example_and_imports_nothing_heavy(name, capsys):
    assert imported_by(name, "--help") == (0, "[]")
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    assert "example" in capsys.readouterr().out


def test_no_arguments_print_the_help(capsys):
    assert cli.main([]) == 0
    assert "usage: loom" in capsys.readouterr().out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


def test_unknown_command_names_the_nearest(capsys):
    assert cli.main(["genrate", "--out", "x"]) == 2
    err = capsys.readouterr().err
    assert "'genrate'" in err and "'generate'" in err and err.count("\n") == 1


def test_arguments_and_status_pass_through(command):
    seen = []
    command(lambda argv: seen.extend(argv) or 7)
    assert cli.main(["try", "--steps", "3"]) == 7
    assert seen == ["--steps", "3"]


@pytest.mark.parametrize(
    ("error", "status"),
    [(ConfigError("vit.size=3\n is odd"), 2), (LoomError("the disk is full"), 1), (KeyboardInterrupt(), 130)],
)
def test_known_errors_become_one_line_and_a_status(command, capsys, monkeypatch, error, status):
    monkeypatch.delenv("LOOM_DEBUG", raising=False)
    command(raising(error))
    assert cli.main(["try"]) == status
    err = capsys.readouterr().err
    assert err.startswith("loom try: ") and err.count("\n") == 1
    assert " ".join(str(error).split()) in err


def test_debug_and_unknown_errors_keep_their_traceback(command, monkeypatch):
    command(raising(ZeroDivisionError("oops")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["try"])
    monkeypatch.setenv("LOOM_DEBUG", "1")
    command(raising(ConfigError("odd")))
    with pytest.raises(ConfigError):
        cli.main(["try"])


@pytest.mark.parametrize(
    ("argv", "named"), [(["--sede", "3"], "--sede"), (["--see", "3"], "--see"), (["--seed", "x"], "'x'")]
)
def test_bad_flags_become_one_line_and_status_2(capsys, argv, named):
    def main(argv):
        parser = ArgumentParser(prog="loom try", description="for tests", epilog="example:\n  loom try --seed 3")
        parser.add_argument("--seed", type=int)
        parser.parse_args(argv)
        return 0

    assert run_command("loom try", main, ["--seed", "3"]) == 0
    assert run_command("loom try", main, argv) == 2
    err = capsys.readouterr().err
    assert named in err and "loom try --help" in err and err.count("\n") == 1


def test_subparsers_complain_in_the_same_way(capsys):
    def main(argv):
        parser = ArgumentParser(prog="loom try")
        inner = parser.add_subparsers(required=True).add_parser("inspect", description="for tests")
        inner.add_argument("source")
        parser.parse_args(argv)
        return 0

    assert run_command("loom try", main, ["inspect", "here"]) == 0
    assert run_command("loom try", main, ["inspect"]) == 2
    err = capsys.readouterr().err
    assert "source" in err and "loom try inspect --help" in err and err.count("\n") == 1


def test_installed_script_runs():
    script = os.path.join(os.path.dirname(sys.executable), "loom")  # noqa: PTH118, PTH120 (a venv's bin, not its target)
    done = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, f"loom_jax {__version__}")
