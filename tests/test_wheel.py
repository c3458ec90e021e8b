"""The wheel: it holds every file of the package folders, and works where there is no checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.sources import ROOT, tracked

ASSET = ROOT / "tests" / "assets" / "bagel_tiny"
INSIDE = {"loom_jax": "loom_jax", "converters": "loom_jax/converters", "launch": "loom_jax/launch"}
INSIDE["configs"] = "loom_jax/configs"


def run(*command, cwd):
    """Runs a command away from the checkout and returns what it printed; fails with its stderr."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} exited with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Builds the wheel from a copy of the tracked files, so that leftovers of other builds cannot get into it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in tracked(*INSIDE, "setup.py", "pyproject.toml", "LICENSE", "README.md"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-index"]
    run(*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Installs the wheel into a new environment, which borrows the dependencies of this one; returns its bin folder."""
    venv = tmp_path_factory.mktemp("venv") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv.parent)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", venv / "bin" / "python", "install"]
    run(*pip, "--quiet", "--no-index", "--no-deps", wheel, cwd=venv.parent)
    (site,) = venv.glob("lib/python*/site-packages")
    # A path in a .pth file comes last and brings no .pth files of its own: the editable install stays behind.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return venv / "bin"


def test_wheel_holds_every_tracked_file_and_nothing_beside_the_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    expected = [INSIDE[name.split("/")[0]] + "/" + name.split("/", 1)[1] for name in tracked(*INSIDE)]
    missing = sorted(set(expected) - set(names))
    assert not missing, f"not in the wheel: {missing} (needs __init__.py in its folder, or its ending in setup.py)"
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"loom_jax"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_commands_run_from_the_installed_wheel(installed, tmp_path):
    code = "import loom_jax, loom_jax.converters as c; print(loom_jax.__file__); print(c.__file__)"
    for line in run(installed / "python", "-c", code, cwd=tmp_path).split():
        assert Path(line).is_relative_to(installed.parent)
    assert "generate" in run(installed / "loom", "--help", cwd=tmp_path)
    report = run(installed / "python", "-m", "loom_jax.converters.bagel", "inspect", ASSET, cwd=tmp_path)
    assert report.strip()
