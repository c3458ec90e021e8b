"""The manual: it builds without a warning, its commands have the flags they show, and its walks are walked."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image as PILImage

from tests.flags import xla_flags
from tests.test_demo import FRAMES, right_of

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = ("", "bash", "sh")


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of every fenced block of a page, in order."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def commands(page: Path) -> list[list[str]]:
    """Words of every command that a page shows for `loom` or a module of it."""
    lines = [
        line.split("#")[0].split(" -- ")[0].split()
        for language, text in blocks(page)
        if language in SHELL
        for line in text.replace("\\\n", " ").splitlines()
    ]
    return [words for words in lines if words and (words[0] == "loom" or words[:2] == ["python", "-m"])]


def script(text: str) -> str:
    """What a reader would type who takes a page from top to bottom."""
    typed = {"bash": "{}", "": "{}", "python": "python - <<'END'\n{}END\n"}
    parts = [typed[language].format(code) for language, code in BLOCK.findall(text) if language in typed]
    return "\n".join(["set -eux", *parts])


def follow(text: str, checkout: Path, minutes: float) -> str:
    """Runs the blocks of a page in a checkout; returns what was said."""
    # What this run of make was given, such as ARGS=, is not for those of the page.
    environ = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKEOVERRIDES", "ARGS")}
    environ |= {"PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "cpu"}
    command = ["bash", "-c", script(text)]
    done = subprocess.run(
        command,
        cwd=checkout,
        env=environ | {"XLA_FLAGS": xla_flags()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60 * minutes,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


@pytest.fixture
def clone(tmp_path):
    """A clean clone of what is committed."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tmp_path / "clone")], check=True)
    return tmp_path / "clone"


def test_the_manual_builds_without_warnings(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environ = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    for page, shown in (
        ("api", "load"),
        ("launch", "JobDescription"),
        ("converters", "to_orbax"),
        ("nn", "attention_weights"),
    ):
        html = (tmp_path / "site" / "reference" / page / "index.html").read_text(encoding="utf-8")
        assert re.search(rf'id="[a-z_.]+\.{shown}"', html), f"reference/{page} does not show {shown}"


def test_commands_in_the_manual_have_the_flags_they_show():
    shown: dict[tuple[str, ...], set[str]] = {}
    for page in PAGES:
        for words in commands(page):
            length = {"loom": 2, "python": 3}[words[0]]
            length += words[1] in ("convert", "data") or words[1:3] == ["-m", "benchmarks"]
            if words[1].startswith("-") and words[0] == "loom":
                continue
            flags = {word.split("=")[0] for word in words[length:] if word.startswith("--")}
            shown.setdefault(tuple(words[:length]), set()).update(flags)
    assert len(shown) > 12
    for command, flags in shown.items():
        module = command[2:] if command[0] == "python" else ("loom_jax.cli", *command[1:])
        start = [sys.executable, "-m", *module]
        done = subprocess.run([*start, "--help"], capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)} --help: {done.stderr}"
        known = set(re.findall(r"--[a-z][a-z-]*", done.stdout))
        unknown = {flag for flag in flags if flag not in known and not flag.startswith("--config.")}
        assert not unknown, f"{' '.join(command)} has no {', '.join(sorted(unknown))}"


@pytest.mark.slow
def test_the_way_of_a_newcomer(clone):
    """A clean clone, `make demo` and every block of the quickstart, and `make test`, of one file: CI runs it whole.

    The weights that come along draw what the demonstration asks, but for little.
    """
    quickstart = (clone / "docs" / "quickstart.md").read_text(encoding="utf-8")
    assert "make demo" in script(quickstart)
    found = right_of(follow(quickstart, clone, minutes=60))
    assert {task: frames for task, (_, frames) in found.items()} == FRAMES
    assert all(right for right, _ in found.values()), found
    assert sum(right for right, _ in found.values()) >= 0.7 * sum(FRAMES.values()), found
    for made in ("out/demo/generated/gallery.html", "out/star/gallery.html", "out/star/python_1.png"):
        assert (clone / made).is_file(), made
    assert (clone / "out" / "demo" / "training" / "checkpoints" / "20").is_dir()
    assert (clone / "runs" / "tiny" / "checkpoints" / "6").is_dir()
    assert len(list((clone / "out" / "tutorial").rglob("turn_*.png"))) == 2
    assert " passed" in follow("```\nmake test ARGS=tests/test_flow.py\n```\n", clone, minutes=20)


@pytest.mark.slow
def test_fine_tuning_on_own_data(tmp_path, monkeypatch):
    """Every block of the page on fine-tuning, in a folder with nothing but the recipes."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    follow((ROOT / "docs" / "finetune.md").read_text(encoding="utf-8"), tmp_path, minutes=60)
    assert (tmp_path / "rows.html").stat().st_size > 10_000
    assert (tmp_path / "runs" / "mine" / "checkpoints" / "4").is_dir()
    assert len(list((tmp_path / "out" / "mine").rglob("turn_*.png"))) == 2
    assert (tmp_path / "out" / "mine" / "gallery.html").is_file()


@pytest.mark.slow
def test_converting_and_generating_as_the_readme_does(tmp_path, monkeypatch):
    """With the tiny release in place of the published one, under its name."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    shutil.copytree(ROOT / "tests" / "assets" / "bagel_tiny", tmp_path / "BAGEL-7B-MoT")
    PILImage.new("RGB", (96, 64), "teal").save(tmp_path / "cat.png")
    sections = re.split(r"^## ", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    chosen = [section for section in sections if section.startswith(("Convert a checkpoint\n", "Generate\n"))]
    assert len(chosen) == 2
    follow("".join(chosen), tmp_path, minutes=60)
    assert (tmp_path / "BAGEL-again" / "ema.safetensors").is_file()
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")}
    dogs = {f"out/dog/image_{number}.png" for number in range(4)}
    assert made >= dogs | {"out/boat/image_0.png", "boat_3.png"}
    assert (tmp_path / "out" / "what" / "text_0.txt").is_file()
