"""Cost of a frame by its turn: with a history of bounded size it stays the same, with all frames as history it grows.

    python -m benchmarks interleave --out interleave.json

Makes the last frames of sequences of 4, 16 and 64 turns with the policies uniform(2) and all on a small random model,
each once to compile and then to be measured, and after that one whole sequence, all in one process. Read the ratios:
seconds and bytes belong to the machine. Memory is that of all arrays on the device when the frame is there, without the
weights. A longer sequence has a longer plan, which every frame sees: that is what still grows with uniform(2).
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from PIL import Image

from benchmarks.report import MIB, parser_of, report
from loom_jax.core import AutoencoderConfig, DecoderConfig, LoomConfig, SiglipConfig
from loom_jax.document import LOOM_TOKENS, Encoder, HistoryPolicy, ImageTransform, Tokenizer, time_token
from loom_jax.generate import Done, Engine, FrameMade, Generator, ImageSettings, InterleavedRequest, interleave
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


def make(generator: Generator, policy: str, turns: int, made: int, settings: ImageSettings) -> list[dict[str, float]]:
    """Makes a sequence of `turns` from turn `made` + 1 on, and returns what each turn took."""
    history, plan = HistoryPolicy.parse(policy), ("one more",) * turns
    request = InterleavedRequest("go on", plan=plan, size=(SIDE, SIDE), history=history)
    frame = Image.effect_noise((SIDE, SIDE), 60).convert("RGB")
    before, out = device_bytes(), []
    for event in interleave(generator, [request], settings, done={0: Done(plan, (frame,) * made)}):
        if isinstance(event, FrameMade):
            held = {"device_bytes": device_bytes() - before, "process_bytes": process_bytes()}
            out.append({"turn": event.turn, "seconds": event.seconds, **held})
    return out


def measure(generator: Generator, policy: str, turns: int, settings: ImageSettings, repeats: int) -> dict[str, Any]:
    """Returns the cost of the last frame of a sequence; the one before it also reads the prologue."""
    runs = [make(generator, policy, turns, turns - 2, settings)[-1] for _ in range(repeats + 1)]
    seconds = statistics.median(run["seconds"] for run in runs[1:])  # the first one compiles
    return {"policy": policy, "turns": turns, "seconds": seconds, "device_bytes": runs[-1]["device_bytes"]}


def compared(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns all runs, each compared with the shortest sequence of its policy."""
    out = []
    for run in runs:
        first = next(r for r in runs if r["policy"] == run["policy"])
        ratios = {f"{key}_over_shortest": run[key] / first[key] for key in ("seconds", "device_bytes")}
        out.append({**run, "device_mib": run["device_bytes"] / MIB, **ratios})
    return out


def main(argv: list[str]) -> int:
    """Runs all measurements."""
    parser = parser_of("interleave", __doc__)
    add = parser.add_argument
    add("--turns", type=int, nargs="+", default=[4, 16, LONGEST], metavar="N")
    add("--policies", nargs="+", default=list(POLICIES), metavar="POLICY", help="[uniform(2) all]")
    add("--steps", type=int, default=8, metavar="N", help="points of the schedule [8]")
    add("--repeats", type=int, default=3, metavar="N", help="measurements, of which the median counts [3]")
    args = parser.parse_args(argv)
    turns, steps, repeats = ([4, 7], 3, 1) if args.smoke else (sorted(args.turns), args.steps, args.repeats)
    if turns[0] < 3 or turns[-1] > LONGEST:
        parser.error(f"--turns must lie between 3 and {LONGEST}")
    settings = ImageSettings(num_timesteps=steps, cfg_img_scale=2.0, cfg_interval=(0.0, 1.0))
    generator = build()
    rows = compared([measure(generator, p, count, settings, repeats) for p in args.policies for count in turns])
    whole = make(generator, args.policies[0], turns[-1], 0, settings)
    columns = ["policy", "turns", "seconds", "seconds_over_shortest", "device_mib", "device_bytes_over_shortest"]
    facts = {"whole_sequence": whole, "compilations": generator.engine.compilations()}
    report(args.out, "the last frame of a sequence", rows, columns, **facts)
    held = [turn["device_bytes"] / MIB for turn in whole[2:]]
    resident = [turn["process_bytes"] / MIB for turn in whole[2:]]
    seconds = [turn["seconds"] for turn in whole[2:]]
    print(
        f"{turns[-1]} turns, {args.policies[0]}: from turn 3 on {min(held):.2f} to {max(held):.2f} MiB on the device, "
        f"process {resident[0]:.0f} to {max(resident):.0f} MiB, {min(seconds):.3f} to {max(seconds):.3f} s a frame"
    )
    return 0
