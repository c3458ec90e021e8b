"""`loom demo`: converts the tiny checkpoint that comes with the sources and makes a picture and a text with it."""

from __future__ import annotations

import time
from pathlib import Path

from loom_jax.core import ArgumentParser, InputError

NAME = "loom demo"
RELEASE = Path("tests/assets/bagel_tiny")


def main(argv: list[str]) -> int:
    """Runs the demonstration and prints where its results are.

    Raises:
      InputError: bad usage, or the checkout that the demonstration needs is not there.
    """
    parser = ArgumentParser(
        prog=NAME,
        description="Convert the tiny checkpoint of the sources, edit a real photograph with it and describe it.\n"
        "Its weights are random: this shows that all parts work, not what a trained model draws.",
        epilog="example:\n  loom demo --out out/demo",
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR", help="[out/demo]")
    parser.add_argument("--release", type=Path, default=RELEASE, metavar="DIR", help=f"release folder [{RELEASE}]")
    args = parser.parse_args(argv)
    if not args.release.is_dir():
        raise InputError(
            f"{args.release} is not there: run `loom demo` in a checkout of the sources, or give --release"
        )
    started = time.perf_counter()
    model, photograph = args.out / "model", args.out / "photograph.png"
    from loom_jax import api
    from loom_jax.commands import generate

    args.out.mkdir(parents=True, exist_ok=True)
    api.convert(args.release, model, overwrite=model.exists())
    print(f"converted   {model}")
    _save_photograph(photograph)
    print(f"photograph  {photograph}")
    shared = ["--checkpoint", str(model), "--image", str(photograph)]
    edit = ["--prompt", "Make it a watercolor.", "--steps", "20", "--out", str(args.out / "edit")]
    generate.main([*shared, *edit])
    question = ["--task", "understand", "--prompt", "What is in this picture?", "--max-new-tokens", "24"]
    generate.main([*shared, *question, "--out", str(args.out / "understand")])
    print(f"done in {time.perf_counter() - started:.0f} s")
    return 0


def _save_photograph(path: Path) -> None:
    """Saves a real photograph of scikit-image's data."""
    try:
        from skimage import data
    except ImportError as error:
        raise InputError("scikit-image is not installed: `pip install scikit-image` brings the photograph") from error
    from PIL import Image

    Image.fromarray(data.astronaut()).save(path)
