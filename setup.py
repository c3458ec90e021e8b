"""Builds the package `loom_jax`. Tool settings stand in pyproject.toml, exact pins in requirements/."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
# The top level has four roots; three of them have generic names, so they are installed inside the package.
ROOTS = {
    "loom_jax": "loom_jax",
    "loom_jax.converters": "converters",
    "loom_jax.launch": "launch",
    "loom_jax.configs": "configs",
}
# Files beside the modules that travel in the wheel, at any depth below a root.
DATA = ["sh", "sbatch", "yaml", "yml", "toml", "json", "jsonl", "txt", "md", "html", "css", "js", "j2", "tmpl"]
DATA += ["csv", "png", "jpg", "npz", "typed"]
# The weights that come along: Orbax names its files without endings.
WEIGHTS = ["weights/**/*"]


def version() -> str:
    """Returns the version that loom_jax/__init__.py states, without importing it."""
    text = (HERE / "loom_jax" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)[1]


def packages() -> list[str]:
    """Returns every package of the four roots under the name it is imported by."""
    return [
        name
        for root, folder in ROOTS.items()
        for name in (root, *(f"{root}.{sub}" for sub in find_packages(str(HERE / folder))))
    ]


setup(
    name="loom_jax",
    version=version(),
    description="Interleaved text-image generation with one diffusion transformer, in JAX",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=packages(),
    package_dir=ROOTS,
    package_data={"": [f"**/*.{ending}" for ending in DATA], "loom_jax": WEIGHTS},
    entry_points={"console_scripts": ["loom = loom_jax.cli:main"]},
    install_requires=[
        "absl-py",
        "array_record",
        "chex",
        "einops",
        "flatbuffers",  # jax.export serialises with it and does not declare it
        "flax>=0.12.8",
        "grain>=0.2.18",
        "importlib-resources",  # tensorflow-datasets imports it and does not declare it
        "jax>=0.10.2",
        "Jinja2",
        "matplotlib",
        "ml-collections>=1.1",
        "ml_dtypes",
        "numpy>=2",
        "optax",
        "orbax-checkpoint>=0.12.8",
        "pillow",
        "pyarrow",
        "rich",
        "safetensors",
        "tensorboard",
        "tensorflow-datasets",
        "tokenizers",
    ],
    extras_require={
        "cuda": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        "dev": [
            "build",
            "hypothesis",
            "ipykernel",
            "jsonschema",
            "mkdocs-material",
            "mkdocstrings[python]",
            "mypy",
            "nbclient",
            "pytest",
            "pytest-xdist",
            "ruff",
            "setuptools>=77",
            "wheel",
        ],
    },
)
