"""The PyTorch original's side of cpu_step.py, run by an interpreter that has torch and transformers.

Reads lines from standard input, `train` or `sample`; answers each with one line of JSON: wall and processor seconds
and the result. The checkout is imported as it is. What a CPU lacks is put in its place from outside: flash attention
becomes PyTorch's own attention of each sequence, its selection of a GPU kernel is left to PyTorch, and casts to
bfloat16 become casts to float32. accelerator_peer.py uses the same parts on a GPU.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import json
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F


class Float32Torch:
    """The module torch with float32 in the place of bfloat16."""

    bfloat16 = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
) -> torch.Tensor:
    """Attention of packed sequences [S, H, A], each by itself; causal ones begin at the end of their keys."""
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs = []
    for i in range(len(q_ends) - 1):
        qs = q[q_ends[i] : q_ends[i + 1]].transpose(0, 1)[None]
        ks, vs = (x[k_ends[i] : k_ends[i + 1]].transpose(0, 1)[None] for x in (k, v))
        groups = qs.shape[1] // ks.shape[1]
        if groups > 1:
            ks, vs = ks.repeat_interleave(groups, 1), vs.repeat_interleave(groups, 1)
        mask = None
        if causal:
            mask = torch.ones(qs.shape[2], ks.shape[2], dtype=torch.bool).tril(ks.shape[2] - qs.shape[2])
        outs.append(F.scaled_dot_product_attention(qs, ks, vs, attn_mask=mask)[0].transpose(0, 1))
    return torch.cat(outs)


def default_frequencies(config: Any, device: Any = None, **_: Any) -> tuple[torch.Tensor, float]:
    """Plain rotary frequencies, which the original looks up in transformers and version 5 no longer lists."""
    width = config.hidden_size // config.num_attention_heads
    powers = torch.arange(0, width, 2, dtype=torch.int64, device=device).float() / width
    return 1.0 / config.rope_theta**powers, 1.0


def import_original(
    checkout: Path, attention: Callable[..., torch.Tensor] = flash_attn_varlen_func
) -> types.SimpleNamespace:
    """Imports the modules of a checkout, with `attention` for the flash attention of sequences."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    ROPE_INIT_FUNCTIONS.setdefault("default", default_frequencies)
    stub = types.ModuleType("flash_attn")
    stub.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    stub.flash_attn_varlen_func = attention
    sys.modules["flash_attn"] = stub
    # The folder's own __init__ files import training and data code that is not needed.
    for name in ("data", "modeling", "modeling.cache_utils"):
        package = types.ModuleType(name)
        package.__path__ = [str(checkout / name.replace(".", "/"))]
        sys.modules[name] = package
    sys.path.insert(0, str(checkout))
    from data import data_utils
    from modeling.bagel import bagel, qwen2_navit, siglip_navit

    bagel.tqdm = lambda items, **_: items
    return types.SimpleNamespace(bagel=bagel, qwen=qwen2_navit, siglip=siglip_navit, data=data_utils)


def leave_kernels_to_torch(modules: types.SimpleNamespace) -> None:
    """Lets PyTorch choose the kernel of an attention with a mask: the one asked for runs on a GPU only."""
    modules.qwen.sdpa_kernel = lambda **_: contextlib.nullcontext()


def assemble(modules: types.SimpleNamespace, llm: Any, vit: Any, z_channels: int, downsample: int, **sizes: int) -> Any:
    """Returns the original's model of some configurations, as its scripts build it."""
    llm.layer_module, llm.qk_norm, llm.tie_word_embeddings, llm.freeze_und = "Qwen2MoTDecoderLayer", True, False, False
    llm.pad_token_id = getattr(llm, "pad_token_id", None)  # version 5 of transformers has no default
    # Its attention classes are chosen by this name alone.
    llm._attn_implementation = "eager"
    vit.rope = False
    vae = types.SimpleNamespace(z_channels=z_channels, downsample=downsample)
    config = modules.bagel.BagelConfig(llm_config=llm, vit_config=vit, vae_config=vae, **sizes)
    language, vision = modules.qwen.Qwen2ForCausalLM(llm), modules.siglip.SiglipVisionModel(vit)
    model = modules.bagel.Bagel(language, vision, config)
    model.vit_model.vision_model.embeddings.convert_conv2d_to_linear(vit)
    return model


def build(modules: types.SimpleNamespace, release: Path) -> Any:
    """Returns the original's model with the weights of a release."""
    from safetensors.torch import load_file

    llm = modules.qwen.Qwen2Config.from_json_file(release / "llm_config.json")
    vit = modules.siglip.SiglipVisionConfig.from_json_file(release / "vit_config.json")
    weights = load_file(release / "ema.safetensors")
    vit.num_hidden_layers = len({k.split(".")[4] for k in weights if k.startswith("vit_model.vision_model.encoder.")})
    settings = json.loads((release / "config.json").read_text())
    sizes = {k: settings[k] for k in ("latent_patch_size", "max_latent_size", "vit_max_num_patch_per_side")}
    model = assemble(modules, llm, vit, **settings["vae_config"], **sizes)
    found = model.load_state_dict(weights, strict=False)
    assert not found.missing_keys and not found.unexpected_keys, found
    return model.float()


def moved(inputs: dict[str, Any], device: str | torch.device) -> dict[str, Any]:
    """Returns arguments with their tensors, and those of their lists, on a device."""

    def move(value: Any) -> Any:
        if isinstance(value, list):
            return [move(one) for one in value]
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return {name: move(value) for name, value in inputs.items()}


class Training:
    """The training step of the original's script: clipping, AdamW, moving average."""

    def __init__(
        self,
        modules: types.SimpleNamespace,
        model: Any,
        d: Any,
        device: str | torch.device = "cpu",
        decay: float = 1e-4,
    ):
        inputs, noise = training_inputs(modules, d)
        self._model, self.inputs, self._noise, self._decay = model, moved(inputs, device), noise.to(device), decay
        parameters = [p for p in model.parameters() if p.requires_grad]
        self._parameters = parameters
        self._optimizer = torch.optim.AdamW(
            parameters, lr=1e-5, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.0, fused=True
        )
        self._average = [p.detach().clone() for p in parameters] if decay else []

    def __call__(self) -> float:
        drawn, torch.randn_like = torch.randn_like, lambda _: self._noise
        try:
            losses = self._model(**self.inputs)
        finally:
            torch.randn_like = drawn
        loss = losses["ce"].mean() + losses["mse"].mean()
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0, foreach=True)
        self._optimizer.step()
        if self._average:
            with torch.no_grad():
                torch._foreach_lerp_(self._average, self._parameters, self._decay)
        return loss.item()


def training_inputs(modules: types.SimpleNamespace, d: Any) -> tuple[dict[str, Any], torch.Tensor]:
    """Returns the arguments of the model's forward pass for documents that cpu_step.py wrote, and the flow's noise."""
    none, ids, is_gen = int(d["no_token"]), d["token_ids"], d["is_gen"]
    is_text = ids != none
    is_vit = ~is_text & ~is_gen
    modes = [("causal", "full", "noise")[mode] for mode in d["split_modes"]]
    lengths, starts = d["split_lengths"].tolist(), np.concatenate([[0], np.cumsum(d["splits"])]).tolist()
    masks = [
        modules.data.prepare_attention_mask_per_sample(lengths[a:b], modes[a:b])
        for a, b in zip(starts, starts[1:], strict=False)
    ]
    # Draws come stream by stream, which is the order of the documents too.
    images = int(is_gen.sum()) // int(d["cell"].max() + 1)
    side = round((is_gen.sum() / images) ** 0.5)
    patch, channels = 2, d["clean"].shape[1] // 4
    clean = torch.from_numpy(d["clean"]).reshape(images, side, side, patch, patch, channels)
    latents = torch.einsum("nhwpqc->nchpwq", clean).reshape(images, channels, side * patch, side * patch)
    grid = modules.data.get_flattened_position_ids_extrapolate(side * 16, side * 16, 16, side)
    pixels = torch.from_numpy(d["pixels"]).permute(0, 3, 1, 2)
    vit_patch = pixels.shape[-1] // side
    times = torch.from_numpy(d["timesteps"])
    noisy = np.zeros(len(ids), bool)
    noisy[is_gen] = d["timesteps"] > 0

    def index(mask: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.flatnonzero(mask))

    inputs = {
        "sequence_length": len(ids),
        "packed_text_ids": torch.from_numpy(ids[is_text]).long(),
        "packed_text_indexes": index(is_text),
        "sample_lens": d["document_lengths"].tolist(),
        "packed_position_ids": torch.from_numpy(d["position"]).long(),
        "nested_attention_masks": masks,
        "ce_loss_indexes": index(d["labels"] != none),
        "packed_label_ids": torch.from_numpy(d["labels"][d["labels"] != none]).long(),
        "packed_vit_tokens": torch.cat([modules.data.patchify(image, vit_patch) for image in pixels]),
        "packed_vit_token_indexes": index(is_vit),
        "packed_vit_position_ids": grid.repeat(len(pixels)),
        "vit_token_seqlens": torch.full((len(pixels),), side * side, dtype=torch.int32),
        "padded_latent": latents,
        "patchified_vae_latent_shapes": [(side, side)] * images,
        "packed_latent_position_ids": grid.repeat(images),
        "packed_vae_token_indexes": index(is_gen),
        "packed_timesteps": torch.logit(times),
        "mse_loss_indexes": index(noisy),
    }
    return inputs, torch.from_numpy(d["noise"])


class Sampling:
    """The original's guided sampler after a prompt that was read beforehand."""

    def __init__(
        self,
        modules: types.SimpleNamespace,
        model: Any,
        d: Any,
        device: str | torch.device = "cpu",
        **options: Any,
    ):
        self._model, layers = model.eval(), model.config.llm_config.num_hidden_layers
        prompt, cells = torch.from_numpy(d["prompt"]).long(), len(d["noise"])
        length, side = len(prompt), round(cells**0.5)
        start = torch.arange(length)
        read = {
            "packed_text_ids": prompt,
            "packed_text_position_ids": start,
            "text_token_lens": torch.tensor([length], dtype=torch.int),
            "packed_text_indexes": start,
            "packed_key_value_indexes": torch.zeros(0, dtype=torch.long),
            "key_values_lens": torch.tensor([0], dtype=torch.int),
        }
        cache = model.forward_cache_update_text(modules.qwen.NaiveCache(layers), **moved(read, device))
        marks = dict(zip(("start_of_image", "end_of_image"), d["marks"].tolist(), strict=True))
        size = [(side * model.latent_downsample, side * model.latent_downsample)]
        inputs = model.prepare_vae_latent([length], [length], size, marks)
        inputs["packed_init_noises"] = torch.from_numpy(d["noise"])
        no_text = model.prepare_vae_latent_cfg([0], [0], size)
        self._inputs = {
            **moved(inputs, device),
            **moved({key.replace("cfg_", "cfg_text_", 1): value for key, value in no_text.items()}, device),
            "past_key_values": cache,
            "cfg_text_past_key_values": modules.qwen.NaiveCache(layers),
            "cfg_text_scale": float(d["cfg_text_scale"]),
            "num_timesteps": int(d["num_timesteps"]),
            "timestep_shift": float(d["timestep_shift"]),
            **options,
        }

    def __call__(self) -> torch.Tensor:
        return self._model.generate_image(**self._inputs)[0]


def main() -> None:
    checkout, release, exchange = (Path(argument) for argument in sys.argv[1:])
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(os.cpu_count() or 1)
    modules = import_original(checkout)
    modules.qwen.torch = modules.siglip.torch = Float32Torch()
    leave_kernels_to_torch(modules)
    makers: dict[str, tuple[Callable[..., Any], str]] = {
        "train": (Training, "train.npz"),
        "sample": (Sampling, "sample.npz"),
    }
    works: dict[str, Any] = {}
    for line in sys.stdin:
        what = line.strip()
        if what not in works:
            make, file = makers[what]
            works[what] = make(modules, build(modules, release).train(what == "train"), np.load(exchange / file))
        wall, cpu = time.perf_counter(), time.process_time()
        result = works[what]()
        result = result.tolist() if isinstance(result, torch.Tensor) else result
        taken = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps({**taken, "result": result}), file=answers, flush=True)


if __name__ == "__main__":
    main()
