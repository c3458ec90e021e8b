"""Fine-tuning of the published BAGEL 7B model as the original's recipe does it: 14.6 B parameters but the frozen ViT.

Command: loom train --config configs/bagel_7b_finetune.py:h100-8 --workdir runs/bagel --config.init_from=CHECKPOINT
  where CHECKPOINT comes from loom convert to-orbax RELEASE CHECKPOINT. After the colon stands a key of MESHES.
Data: text to image (parquet: image, captions), edits (parquet: image_list, instruction_list) and conversations (jsonl
  with images), equally often, from data/t2i, data/edit and data/vlm: --config.data.mixture.0.paths="('FILES',)" says
  where else. Conditions are dropped for guidance as published: texts 0.1, clean images 0.3, ViT images 0.3.
Hardware: 16 bytes a parameter (float32 parameters, average and two moments: 234 GB over all devices), 4 more while a
  gradient lives, and some 10 GiB a device for a row with every layer recomputed; see MESHES. With less memory:
  --config.optimizer.moment_dtype=bfloat16, --config.ema.dtype=bfloat16, or --config.optimizer.name=adafactor.
Expect: the original's losses from its checkpoint on; no run at this size is behind these numbers yet.

As published: rate 2e-5 after 2000 steps of warm-up, AdamW (0.9, 0.95), eps 1e-15, no decay, clipping at 1, average
0.9999, samples of up to 10,240 tokens, ViT and autoencoder frozen, transforms of each data set. Unpublished, so ours:
the number of steps, equal weights, and rows of 5,632 + 8,192 tokens a device in place of up to 11,520 in one stream (a
row must hold the largest conversation and the largest edit). The batch grows with the number of devices; the rate does
not.
"""

import ml_collections

from loom_jax.configs import bagel_7b

MESHES = {
    # v5p counts cores, two a chip: 32 chips of 95 GiB.
    "v5p-64": {"mesh": {"preset": "fsdp"}, "rows": 32},
    # 64 chips of 32 GiB: twice 32, for 3584 over 64 ends within a tile; 8.2 GiB of state and gradient each.
    "v6e-64": {"mesh": {"preset": "hsdp", "axes": ("data", "fsdp"), "sizes": (2, 32)}, "rows": 64},
    # One node of 8 x 80 GB: 37 GB of state and gradient each. Also for 8 H200.
    "h100-8": {"mesh": {"preset": "fsdp"}, "rows": 8},
    "h200-8": {"mesh": {"preset": "fsdp"}, "rows": 16},
    # 8 nodes: cut over all 64, so that a row has room beside 4.6 GB of state; copies per node leave less traffic.
    "h100-64": {"mesh": {"preset": "fsdp"}, "rows": 64},
    "h200-64": {"mesh": {"preset": "hsdp", "axes": ("data", "fsdp"), "sizes": (8, 8)}, "rows": 64},
}
"""Variant -> how the job lies on its devices, and rows of a batch."""


def get_config(variant: str = "h100-8") -> ml_collections.ConfigDict:
    """Returns the recipe for a key of MESHES; the keys are those of loom_jax.train.TrainConfig."""
    config = bagel_7b.get_config()
    config.needs = ("init_from",)
    config.total_steps = 20_000
    config.frozen = ("vit/*",)
    config.mesh = MESHES[variant]["mesh"]
    config.optimizer = {"learning_rate": 2e-5, "warmup_steps": 2000, "eps": 1e-15, "clip_norm": 1.0}
    config.ema = {"decay": 0.9999}
    config.save = {"every": 2000, "keep_last": 3, "keep_every": 10_000}
    config.watch = {"log_every": 10}
    rows = MESHES[variant]["rows"]
    config.data = {
        "mixture": [
            {"name": "t2i", "source": "parquet", "recipe": "t2i", "paths": ("data/t2i/*.parquet",)},
            {
                "name": "edit",
                "source": "parquet",
                "recipe": "edit",
                "paths": ("data/edit/*.parquet",),
                "vit_transform": {"max_size": 518, "min_size": 224, "stride": 14},
            },
            {
                "name": "vlm",
                "source": "jsonl",
                "recipe": "vlm",
                "paths": ("data/vlm/*.jsonl",),
                "images": "data/vlm/images",
                "vit_transform": {"max_size": 980, "min_size": 378, "stride": 14, "max_pixels": 2_007_040},
            },
        ],
        "rows": rows,
        "shards": rows,  # so that any number of processes that divides it makes the same batches
        "budget": {"und": 5632, "gen": 8192, "vit": 5120},
        "canvases": [
            {"height": 1024, "width": 1024, "count": 2},
            {"height": 768, "width": 1024, "count": 2},
            {"height": 1024, "width": 768, "count": 2},
            {"height": 512, "width": 704, "count": 4},
        ],
        "look_ahead": 4.0,
        "workers": 8,
    }
    return config
