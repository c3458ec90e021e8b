"""What the sources must look like as a whole: who imports whom, what is exported, and what never appears in them."""

import ast
import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sources import ROOT, tracked

# From top to bottom: a module imports from its own folder and from those below. The table of the design, section 3.
ORDER = [
    ["loom_jax.launch"],
    ["loom_jax.cli", "loom_jax.commands"],
    ["loom_jax.api"],
    ["loom_jax.converters"],
    ["loom_jax.evaluate"],
    ["loom_jax.generate"],
    ["loom_jax.train"],
    ["loom_jax.models"],
    ["loom_jax.nn"],
    ["loom_jax.checkpoint"],
    ["loom_jax.parallel"],
    ["loom_jax.data"],
    ["loom_jax.document"],
    ["loom_jax.core"],
    ["loom_jax.configs"],
]
LEVEL = {folder: level for level, folders in enumerate(ORDER) for folder in folders}
MESHLESS = {"loom_jax.models", "loom_jax.nn"}
JAXLESS = {"loom_jax.document", "loom_jax.data", "loom_jax.core"}
JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}
ROOTS = ("loom_jax", "converters", "launch", "configs")
LINES = 80


FILES = [ROOT / name for name in tracked()]
ALL_MODULES = [path for path in FILES if path.suffix == ".py"]
MODULES = [path for path in ALL_MODULES if path.relative_to(ROOT).parts[0] in ROOTS]


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_name(path: Path) -> str:
    """Returns the name that a source file is imported by: the roots with generic names live inside loom_jax."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts if parts[0] == "loom_jax" else ["loom_jax", *parts])


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> set[str]:
    """Returns every module that a file imports, wherever in it; `from a import b` counts as a.b."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{label(path)}:{node.lineno} imports relatively: write the whole name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def folder(name: str) -> str | None:
    """Returns the entry of ORDER that a module belongs to; None for the package itself and for others."""
    first_two = ".".join(name.split(".")[:2])
    return first_two if first_two in LEVEL else None


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_imports_point_downwards(path):
    own = folder(module_name(path))
    others = {folder(name) for name in imports(path)} - {own, None}
    if own is None:
        assert module_name(path) == "loom_jax", f"{label(path)} is in no folder of the design"
        assert not others, "loom_jax/__init__.py is imported by every module, so it imports none"
        return
    upwards = {other for other in others if LEVEL[other] <= LEVEL[own]}
    assert not upwards, f"{label(path)} imports {sorted(upwards)}, which the design puts above {own}, or beside it"
    if own in MESHLESS:
        assert "loom_jax.parallel" not in others, f"{label(path)}: models and layers know no mesh"


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_limits_on_what_comes_from_outside(path):
    own = folder(module_name(path))
    outside = {name.split(".")[0] for name in imports(path)}
    if own in JAXLESS:
        assert not outside & JAX, f"{label(path)} imports {sorted(outside & JAX)}: {own} is free of jax"
    if own == "loom_jax.configs":
        foreign = {name for name in imports(path) if folder(name) != own and not name.startswith("__future__")}
        assert {name.split(".")[0] for name in foreign} <= {"ml_collections"}, (
            f"{label(path)} imports {sorted(foreign)}"
        )


@pytest.mark.parametrize("path", ALL_MODULES, ids=label)
def test_generic_names_are_imported_inside_the_package(path):
    bare = {name for name in imports(path) if name.split(".")[0] in ROOTS[1:]}
    assert not bare, f"{label(path)} imports {sorted(bare)}: write loom_jax.{min(bare, default='')}"


@pytest.mark.parametrize("path", ALL_MODULES, ids=label)
def test_no_module_is_a_drawer(path):
    drawers = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert not drawers & set(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", ALL_MODULES, ids=label)
def test_no_error_is_swallowed(path):
    """A handler for every exception is allowed only where it raises again."""
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        broad = any(kind is None or getattr(kind, "id", "") in ("Exception", "BaseException") for kind in caught)
        raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
        assert raises or not broad, f"{label(path)}:{node.lineno} catches everything: name the errors"


@pytest.mark.parametrize("path", [p for p in ALL_MODULES if not label(p).startswith("tests/")], ids=label)
def test_functions_fit_on_a_screen(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= LINES, f"{label(path)}:{node.lineno} {node.name} has {length} lines, allowed {LINES}"


@pytest.mark.parametrize("path", [p for p in MODULES if p.name == "__init__.py"], ids=label)
def test_exports_exist(path):
    module = importlib.import_module(module_name(path))
    assert hasattr(module, "__all__"), f"{label(path)} names no exports: add __all__"
    missing = [name for name in module.__all__ if not hasattr(module, name)]
    assert not missing, f"{label(path)} exports {missing}, which it does not have"


@pytest.mark.parametrize("path", [p for p in MODULES if p.name == "__init__.py"], ids=label)
def test_what_is_imported_from_a_folder_is_exported_by_it(path):
    """`from loom_jax.nn import x` anywhere needs x in the `__all__` of nn, unless x is a module of it."""
    name = module_name(path)
    module = importlib.import_module(name)
    for other in ALL_MODULES:
        for node in ast.walk(tree(other)):
            if isinstance(node, ast.ImportFrom) and node.module == name:
                for alias in node.names:
                    inside = path.parent / alias.name
                    known = alias.name in module.__all__ or inside.is_dir() or inside.with_suffix(".py").exists()
                    known = known or (name == "loom_jax" and f"loom_jax.{alias.name}" in LEVEL)
                    assert known, f"{label(other)}:{node.lineno} imports {alias.name}, which {name} does not export"


def test_core_and_document_run_without_jax():
    code = f"import sys, loom_jax.core, loom_jax.document; sys.exit(str({JAX!r} & set(sys.modules) or ''))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == ""


def test_no_path_of_a_machine_and_no_package_host():
    # Spelled in pieces, so that this file does not hold what it looks for.
    folders = "|".join(["work", "tmp", "root", "home/[a-z]+"])
    hosts = "|".join(["pypi" + r"\.org", "pythonhosted" + r"\.org", "conda" + r"\.anaconda"])
    pattern = re.compile(rf"(?<![\w.}}\])])/({folders})/|{hosts}")
    found = []
    for path in FILES:
        content = path.read_bytes()
        if b"\0" in content[:4096]:
            continue
        for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{label(path)}:{number}")
    assert not found, f"machine paths or package hosts in {found}"
