"""accelerator.py's picture and training step, done by the PyTorch original in bfloat16.

    python -m benchmarks.accelerator_peer --checkout BAGEL_CHECKOUT --out accelerator_peer.json

Needs torch and transformers; the training step also what loom_jax needs, for its documents. The checkout is imported as
it is, under bfloat16 autocast as in its own scripts. Flash attention of a sequence is PyTorch's own. The picture is
its evaluation script's: everything on the device, the prompt read before. There the original makes a list of equal
times, a number for each token, at every evaluation: `time_lists_seconds` says what that alone takes. Training: masks
by document, or --flex; each layer checkpointed, or --remat none; moments are bfloat16, for the parameters are.
--smoke takes a small model and runs anywhere. What is done is written even if a part fails or the run is cut off.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from benchmarks.cpu_step_peer import Sampling, Training, assemble, import_original, leave_kernels_to_torch

PROMPT, POINTS, SHIFT, GUIDANCE, INTERVAL = 60, 50, 3.0, 4.0, (0.4, 1.0)
SIZES: dict[bool, tuple[dict[str, Any], dict[str, int], dict[str, int]]] = {
    False: (
        {
            "vocab_size": 152_064,
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rope_theta": 1e6,
        },
        {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 26,
            "num_attention_heads": 16,
            "patch_size": 14,
            "image_size": 980,
        },
        {"max_latent_size": 64, "vit_max_num_patch_per_side": 70},
    ),
    True: (
        {
            "vocab_size": 2048,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "rope_theta": 1e6,
        },
        {
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "patch_size": 14,
            "image_size": 224,
        },
        {"max_latent_size": 16, "vit_max_num_patch_per_side": 16},
    ),
}
"""Decoder, ViT and position tables of the release, and of the smoke run's model (cpu_step.smaller)."""
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, ImportError, OSError)
"""What a part that does not suit the device or its libraries raises."""
STARTED = time.perf_counter()


def say(message: str) -> None:
    """Prints a line with the seconds since the start."""
    print(f"{time.perf_counter() - STARTED:7.1f} s  {message}", flush=True)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
) -> torch.Tensor:
    """Attention of packed sequences [S, H, A] by PyTorch's kernel; the heads of keys are shared, not repeated."""
    one = len(cu_seqlens_q) == 2  # whose ends need no reading, which would wait for the device
    q_ends, k_ends = ([0, len(q)], [0, len(k)]) if one else (cu_seqlens_q.tolist(), cu_seqlens_k.tolist())
    outs = []
    for i in range(len(q_ends) - 1):
        qs = q[q_ends[i] : q_ends[i + 1]].transpose(0, 1)[None]
        ks, vs = (x[k_ends[i] : k_ends[i + 1]].transpose(0, 1)[None] for x in (k, v))
        assert not causal or qs.shape[2] == ks.shape[2]
        found = F.scaled_dot_product_attention(qs, ks, vs, is_causal=causal, enable_gqa=qs.shape[1] != ks.shape[1])
        outs.append(found[0].transpose(0, 1))
    return outs[0] if one else torch.cat(outs)


def build(modules: Any, args: argparse.Namespace, layers: int) -> Any:
    """Returns the original's model with bfloat16 weights, drawn on the device."""
    llm, vit, tables = SIZES[args.smoke]
    kind = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(args.device):
            model = assemble(
                modules,
                modules.qwen.Qwen2Config(num_hidden_layers=layers, rms_norm_eps=1e-6, **llm),
                modules.siglip.SiglipVisionConfig(**vit),
                z_channels=16,
                downsample=8,
                latent_patch_size=2,
                **tables,
            )
    finally:
        torch.set_default_dtype(kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # llm2vae too, which the original sets to zero: a picture of zeros would not be the same work.
            if parameter.ndim > 1 and "pos_embed" not in name:
                parameter.normal_(0, 0.02)
            assert parameter.dtype == torch.bfloat16 and parameter.device.type == args.device, name
    say(f"drew {sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion weights, {layers} layers")
    return model


def measure(work: str, call: Callable[[], Any], args: argparse.Namespace) -> dict[str, Any]:
    """Returns the seconds of a call, one to warm up not counted."""
    gpu, seconds = args.device == "cuda", []
    wait: Callable[[], Any] = torch.cuda.synchronize if gpu else lambda: None
    for turn in range(args.repeats + 1):
        wait()
        begin = time.perf_counter()
        result = call()
        wait()
        seconds.append(time.perf_counter() - begin)
        say(f"{work}, {f'repeat {turn}' if turn else 'warm-up'}: {seconds[-1]:.4f} s")
    assert bool(torch.isfinite(torch.as_tensor(result)).all())
    return {
        "work": work,
        "seconds": min(seconds[1:]),
        "seconds_median": statistics.median(seconds[1:]),
        "seconds_all": seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
    }


def sample(modules: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Measures the denoising of one guided picture."""
    model = build(modules, args, args.layers)
    cells = (args.side // model.latent_downsample) ** 2
    d = {
        "prompt": np.arange(1, PROMPT + 1),
        "marks": np.array([PROMPT + 1, PROMPT + 2]),
        "noise": np.random.default_rng(0).standard_normal((cells, 64)).astype(np.float32),
        "cfg_text_scale": GUIDANCE,
        "num_timesteps": args.points,
        "timestep_shift": SHIFT,
    }
    with torch.inference_mode(), torch.autocast(args.device, torch.bfloat16):
        work = Sampling(modules, model, d, args.device, cfg_interval=INTERVAL, cfg_img_scale=1.0)
        found = measure(f"picture of {args.side} x {args.side}, {args.points} points", work, args)
        time_of_one = torch.ones((), device=args.device)
        begin = time.perf_counter()
        for _ in range(5):
            torch.tensor([time_of_one] * cells, device=args.device)
        lists = (time.perf_counter() - begin) / 5 * (args.points - 1)
    say(f"of which lists of times: {lists:.3f} s")
    return found | {"time_lists_seconds": lists}


def training_row(args: argparse.Namespace) -> Any:
    """Returns the documents that accelerator.py trains on, in the arrays that the original's side reads."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # the memory of the device is taken
    from benchmarks.cpu_step import documents, smaller, write_documents
    from loom_jax.configs import bagel_7b
    from loom_jax.core import LoomConfig, from_mapping
    from loom_jax.document import Tokenizer, make_encoder

    config = smaller() if args.smoke else from_mapping(LoomConfig, bagel_7b.get_config().model.to_dict())
    row = documents(config, make_encoder(config, Tokenizer.of_bytes()).special, args.side)
    layouts = [document.layout for document in row]
    modes = np.concatenate([np.repeat(layout.split_modes, layout.split_lengths) for layout in layouts])
    noisy = (modes == 2)[np.concatenate([layout.is_gen for layout in layouts])]
    rng = np.random.default_rng(1)
    clean, noise = (rng.standard_normal((len(noisy), config.latent_dim)).astype(np.float32) for _ in range(2))
    draws = {"clean": clean, "noise": noise, "timesteps": np.where(noisy, 0.5, 0.0).astype(np.float32)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "train.npz"
        write_documents(file, row, draws)
        return dict(np.load(file))


def train(modules: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Measures a training step of some layers, all but the ViT trained."""
    d = training_row(args)
    say(f"{len(d['token_ids'])} tokens in documents of {d['document_lengths'].tolist()}")
    model = build(modules, args, args.train_layers).train()
    model.vit_model.requires_grad_(False).eval()
    if args.remat == "full":
        from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrapping

        kinds = (modules.qwen.Qwen2MoTDecoderLayer, modules.siglip.SiglipEncoderLayer, modules.bagel.MLPconnector)
        wrapping.apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, kinds))
    step = Training(modules, model, d, args.device, decay=0.0)
    if args.flex:
        none = {"nested_attention_masks": None, "split_lens": d["split_lengths"].tolist()}
        step.inputs |= none | {"attn_modes": [("causal", "full", "noise")[mode] for mode in d["split_modes"]]}

    def run() -> float:
        with torch.autocast(args.device, torch.bfloat16):
            return step()

    work = f"training step, {args.train_layers} layers, {len(d['token_ids'])} tokens, remat {args.remat}"
    return measure(work + (", flex" if args.flex else ""), run, args)


def main() -> int:
    """Runs the benchmark; returns 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkout", type=Path, required=True, metavar="FOLDER", help="of ByteDance-Seed/Bagel")
    add("--out", type=Path, metavar="FILE", help="where to write the figures as JSON")
    add("--side", type=int, default=1024, metavar="PIXELS", help="of the pictures [1024]")
    add("--layers", type=int, default=28, metavar="N", help="layers that sample; 0: none [28]")
    add("--points", type=int, default=POINTS, metavar="N", help=f"time points of the picture [{POINTS}]")
    add("--train-layers", type=int, default=0, metavar="N", help="layers that are trained; 0: none [0]")
    add("--remat", choices=("full", "none"), default="full", help="checkpoint every layer, or none [full]")
    add("--flex", action="store_true", help="train with the original's compiled flex attention")
    add("--repeats", type=int, default=3, metavar="N", help="measurements after one to warm up [3]")
    add("--device", default="cuda", help="cuda, or cpu for the smoke run [cuda]")
    add("--smoke", action="store_true", help="a small model, to see that it runs")
    args = parser.parse_args()
    if args.smoke:
        args.side, args.repeats, args.points = 64, 1, 8
        args.layers, args.train_layers = min(args.layers, 2), min(args.train_layers, 1)
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = args.device == "cuda"
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rows": [],
        "failed": {},
    }
    say(f"{figures['device']}, torch {torch.__version__}, transformers {transformers.__version__}")
    modules = import_original(args.checkout.resolve(), attention)
    if not gpu:
        leave_kernels_to_torch(modules)
    for part, wanted in ((sample, args.layers), (train, args.train_layers)):
        if not wanted:
            continue
        try:
            figures["rows"].append(part(modules, args))
        except FAILURES as error:  # the other part is still of use
            traceback.print_exc()
            figures["failed"][part.__name__] = repr(error)[:500]
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1), flush=True)
    return 1 if figures["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
