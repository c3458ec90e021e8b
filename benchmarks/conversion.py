"""Memory and speed of the checkpoint conversion, both ways, on a random release of a chosen size.

    python -m benchmarks conversion --gib 8 --out conversion.json

Makes the release (widths of the real one, fewer layers), copies its files with cp, converts them to Orbax and back,
each in a process of its own, and checks the peak of anonymous memory against the promise: 1.5 GiB + the largest tensor.
Needs about 3 times the size on the disk of --workdir; removes everything at the end.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import GIB, parser_of, report
from loom_jax.converters.synthetic import write_synthetic_release
from loom_jax.converters.tables import model_entries
from loom_jax.core import AutoencoderConfig, DecoderConfig, LoomConfig, SiglipConfig

PROMISE = 1.5 * GIB
ASSETS = Path(__file__).resolve().parents[1] / "tests" / "assets" / "bagel_tiny"


def config_of(gib: float, smoke: bool) -> LoomConfig:
    """Returns the widths of the 7 B model with as many layers as make up `gib` in bf16; tiny ones for a smoke run."""
    if smoke:
        decoder = DecoderConfig(8192, 512, 2048, 1, 8, 2, 64)
        return LoomConfig(
            decoder, SiglipConfig(96, 192, 2, 4, 14, 100), AutoencoderConfig(32, (1, 2), 1, 16, 1.0, 0.0), 16, 10
        )

    def layers(count: int) -> LoomConfig:
        decoder = DecoderConfig(152064, 3584, 18944, count, 28, 4, 128)
        vit, vae = (
            SiglipConfig(1152, 4304, 26, 16, 14, 4900),
            AutoencoderConfig(128, (1, 2, 4, 4), 2, 16, 0.3611, 0.1159),
        )
        return LoomConfig(decoder, vit, vae, max_latent_size=64, vit_max_num_patch_per_side=70)

    fixed, one = size_of(layers(0)), size_of(layers(1))
    return layers(max(1, round((gib * GIB - fixed) / (one - fixed))))


def size_of(config: LoomConfig) -> int:
    """Bytes of the transformer in bfloat16."""
    return 2 * sum(entry.size for entry in model_entries(config))


def measure(command: list[str]) -> dict[str, float]:
    """Runs a command; returns its seconds and the peaks of its anonymous and of its whole resident memory, in bytes."""
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    anonymous = resident = 0
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:  # it ended in between
            break
        status = dict(line.split(":", 1) for line in lines)
        anonymous = max(anonymous, _kib(status.get("RssAnon")))
        resident = max(resident, _kib(status.get("VmHWM")))
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    if process.wait():
        raise SystemExit(f"{' '.join(command)} failed with exit status {process.returncode}")
    return {"seconds": seconds, "peak_anonymous": anonymous, "peak_resident": resident}


def _kib(text: str | None) -> int:
    return int(text.split()[0]) * 1024 if text else 0


def run(gib: float, smoke: bool, workdir: Path) -> dict[str, Any]:
    """Makes the release, measures, and returns the report."""
    config = config_of(gib, smoke)
    release, copy, orbax, back = (workdir / name for name in ("release", "copy", "orbax", "back"))
    write_synthetic_release(release, config, tokenizer=ASSETS)
    size = sum(file.stat().st_size for file in release.iterdir())
    largest = 2 * max(entry.size for entry in model_entries(config))
    convert = [sys.executable, "-m", "loom_jax.converters.bagel"]
    steps = {"cp": measure(["cp", "-r", str(release), str(copy)])}
    shutil.rmtree(copy)
    steps["to-orbax"] = measure([*convert, "to-orbax", str(release), str(orbax)])
    steps["from-orbax"] = measure([*convert, "from-orbax", str(orbax), str(back)])
    same = all(subprocess.run(["cmp", "-s", file, back / file.name]).returncode == 0 for file in release.iterdir())
    for step in steps.values():
        step["peak_anonymous_gib"] = step["peak_anonymous"] / GIB
        step["gib_per_second"] = size / GIB / step["seconds"]
        step["throughput_over_cp"] = steps["cp"]["seconds"] / step["seconds"]
    limit = PROMISE + largest
    kept = all(step["peak_anonymous"] <= limit for step in steps.values())
    return {
        "bytes": size,
        "largest_tensor": largest,
        "limit": limit,
        "steps": steps,
        "within_limit": kept,
        "identical": same,
    }


def main(argv: list[str]) -> int:
    """Runs the benchmark; returns 1 where memory or bits are not as promised."""
    parser = parser_of("conversion", __doc__)
    add = parser.add_argument
    add("--gib", type=float, default=8.0, help="size of the release, at least 4 [8]; with --smoke some 50 MiB")
    add("--workdir", type=Path, help="where to put the files; the system's temporary folder by default")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="conversion_", dir=args.workdir) as workdir:
        found = run(args.gib, args.smoke, Path(workdir))
    rows = [{"step": name, **step} for name, step in found.pop("steps").items()]
    kept = "kept" if found["within_limit"] else "BROKEN"
    same = "identical" if found["identical"] else "DIFFERENT"
    sizes = f"{found['bytes'] / GIB:.2f} GiB; promised peak {found['limit'] / GIB:.2f} GiB: {kept}"
    columns = ["step", "seconds", "gib_per_second", "throughput_over_cp", "peak_anonymous_gib"]
    report(args.out, f"{sizes}; files {same} after both", rows, columns, **found)
    return 0 if found["within_limit"] and found["identical"] else 1
