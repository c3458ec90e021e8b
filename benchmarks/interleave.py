"""Cost of a frame by its turn: with a history of bounded size it stays the same, with all frames as history it grows.

    python benchmarks/interleave.py --out interleave.json

Makes sequences of 4, 16 and 64 turns with the policies uniform(2) and all on a small random model, each once to compile
and once to be measured, all in one process. Read the ratios: seconds and bytes belong to the machine.
Memory is that of all arrays on the device while the frame is made, without the weights, and the process's own.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from rich.console import Console
from rich.table import Table

from loom_jax.core import AutoencoderConfig, DecoderConfig, LoomConfig, SiglipConfig
from loom_jax.document import LOOM_TOKENS, Encoder, HistoryPolicy, ImageTransform, Tokenizer, time_token
from loom_jax.generate import Engine, FrameMade, Generator, ImageSettings, InterleavedRequest, interleave
from loom_jax.models import Autoencoder, LoomModel

TOKENIZER = Path(__file__).resolve().parents[1] / "tests" / "assets" / "bagel_tiny"
LONGEST = 64
SIDE = 64
CONFIG = LoomConfig(
    decoder=DecoderConfig(640, 128, 256, 4, 8, 2, 16),
    vit=SiglipConfig(64, 128, 2, 4, 16, 64),
    vae=AutoencoderConfig(32, (1, 2), 1, 4, 1.0, 0.0),
    max_latent_size=8,
    vit_max_num_patch_per_side=8,
    latent_patch_size=8,
)
"""Frames of 64 x 64: 16 latent tokens and 16 patches, so that attention over many frames, not one, is what costs."""
POLICIES = ("uniform(2)", "all")


def build() -> Generator:
    """Returns a generator with random weights and time tokens for 64 turns."""
    tokens = [*LOOM_TOKENS, *map(time_token, range(1, LONGEST + 1))]
    tokenizer = Tokenizer.from_folder(TOKENIZER).with_tokens(tokens)
    transform = ImageTransform(SIDE, SIDE, 16)
    encoder = Encoder(tokenizer, CONFIG.latent_stride, CONFIG.vit.patch_size, transform, transform)
    model, vae = LoomModel(CONFIG, rngs=nnx.Rngs(0)), Autoencoder(CONFIG.vae, rngs=nnx.Rngs(1))
    return Generator(CONFIG, Engine(model, vae, tokenizer.special, len(tokenizer)), encoder)


def device_bytes() -> int:
    """Bytes of all arrays that live on the device."""
    return sum(array.nbytes for array in jax.live_arrays())


def process_bytes() -> int:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * 4096


def measure(generator: Generator, policy: str, turns: int, settings: ImageSettings) -> dict[str, Any]:
    """Makes one sequence twice; returns what each turn of the second one took."""
    history = HistoryPolicy.parse(policy)
    request = InterleavedRequest("go on", plan=("one more",) * turns, size=(SIDE, SIDE), history=history)
    weights = device_bytes()
    seconds, held, resident = [], [], []
    for _ in range(2):
        seconds, held, resident = [], [], []
        for event in interleave(generator, [request], settings):
            if isinstance(event, FrameMade):
                seconds.append(event.seconds)
                held.append(device_bytes() - weights)
                resident.append(process_bytes())
    compiled = generator.engine.compilations()
    return {
        "policy": policy,
        "turns": turns,
        "seconds": seconds,
        "device_bytes": held,
        "process_bytes": resident,
        # Turn 3 is the first with a full history of two.
        "last_over_third": statistics.median(seconds[-3:]) / statistics.median(seconds[2:5]),
        "device_last_over_third": held[-1] / held[2],
        "compilations": compiled,
    }


def show(runs: list[dict[str, Any]]) -> Table:
    """Returns the table of all runs."""
    table = Table(title="seconds per frame and memory by turn")
    for column in (
        "policy",
        "turns",
        "turn 3",
        "last turn",
        "ratio",
        "device, turn 3",
        "device, last",
        "ratio",
        "process",
    ):
        table.add_column(column, justify="left" if column == "policy" else "right")
    mib = 2**20
    for run in runs:
        held, resident = run["device_bytes"], run["process_bytes"]
        table.add_row(
            run["policy"],
            str(run["turns"]),
            f"{statistics.median(run['seconds'][2:5]):.3f} s",
            f"{statistics.median(run['seconds'][-3:]):.3f} s",
            f"{run['last_over_third']:.2f}",
            f"{held[2] / mib:.2f} MiB",
            f"{held[-1] / mib:.2f} MiB",
            f"{run['device_last_over_third']:.2f}",
            f"{(resident[-1] - resident[2]) / mib:+.1f} MiB",
        )
    return table


def main() -> None:
    """Runs all measurements, prints the table, and writes them as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, nargs="+", default=[4, 16, LONGEST], metavar="N")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="points of the schedule [8]")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the figures as JSON")
    parser.add_argument("--smoke", action="store_true", help="few turns and steps, to see that it runs")
    args = parser.parse_args()
    turns, steps = ([3, 6], 3) if args.smoke else (args.turns, args.steps)
    if min(turns) < 3 or max(turns) > LONGEST:
        parser.error(f"--turns must lie between 3 and {LONGEST}")
    settings = ImageSettings(num_timesteps=steps, cfg_img_scale=2.0, cfg_interval=(0.0, 1.0))
    generator = build()
    runs = [measure(generator, policy, count, settings) for policy in POLICIES for count in turns]
    Console(width=140).print(show(runs))
    if args.out:
        args.out.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
