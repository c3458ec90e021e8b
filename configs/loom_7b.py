"""Loom: the published BAGEL 7B model, fine-tuned to write a plan and then draw its steps, one after the other.

Command: loom train --config configs/loom_7b.py:h100-64 --workdir runs/loom --config.init_from=CHECKPOINT
  where CHECKPOINT comes from loom convert to-orbax RELEASE CHECKPOINT. After the colon stands a key of MESHES.
Data: tutorials (parquet: image_list, instruction_list = [prompt, "Step1: ..., Step2: ..."]; the paper has 50,000 of 4
  to 6 frames) from data/loom_tutorial, and compositions and styles (conditions, then the target; [text]) from
  data/loom_input: --config.data.mixture.N.paths="('FILES',)" says where else.
Hardware: 16 bytes a parameter over all devices as in bagel_7b_finetune, and some 25 GiB a device for rows of 18,176 +
  32,768 tokens with every layer recomputed; on smaller devices several share a row (`fsdp+context`). See MESHES.
  Images are encoded as they come; loom data encode stores their latents beforehand (--config.data.latents=moments).
Expect: samples of the watched prompts turn into frames in the style of the data within some thousand steps. No run at
  this size is behind these numbers yet.

Trained: both experts, embeddings (the time tokens <|turn_k|> and the entity tokens take unused rows), heads, connector.
Frozen: the ViT and the autoencoder, as in the paper's figure. Learned: the whole plan by cross-entropy, every frame by
flow matching; a document shows up to three earlier frames. Dropped for guidance: all text together with 0.1 (never a
plan that is learned; `tutorial_frames` has rows whose plan is given, so that it can be dropped) and all images together
with 0.1. Generation then takes text guidance 4, image guidance 2, interval [0, 1], shift 3, 50 timesteps. The prompts
are those of loom_jax.document, in our words; the published ones are for parity alone.

Unpublished, so ours: everything about the optimizer (Bagel's fine-tuning: 2e-5, 2000 steps of warm-up, average 0.9999),
the number of steps, the batch, the weights of the mixture, the probabilities of dropping, the budgets.
"""

import ml_collections

from loom_jax.configs import bagel_7b

_CONTEXT = {"preset": "fsdp+context", "axes": ("fsdp", "context")}

MESHES = {
    # v5p counts cores, two a chip: 32 chips of 95 GiB.
    "v5p-64": {"mesh": {"preset": "fsdp"}, "rows": 32},
    # 64 chips of 32 GiB: four share a row.
    "v6e-64": {"mesh": {**_CONTEXT, "sizes": (16, 4)}, "rows": 16},
    # One node: 37 GB of state and gradient a device leave room for half a row on 80 GB, for a whole one on 141 GB.
    "h100-8": {"mesh": {**_CONTEXT, "sizes": (4, 2)}, "rows": 4},
    "h200-8": {"mesh": {"preset": "fsdp"}, "rows": 8},
    "h100-64": {"mesh": {"preset": "fsdp"}, "rows": 64},
    "h200-64": {"mesh": {"preset": "hsdp", "axes": ("data", "fsdp"), "sizes": (8, 8)}, "rows": 64},
}
"""Variant -> how the job lies on its devices, and rows of a batch."""

TUTORIALS = ("data/loom_tutorial/*.parquet",)
INPUTS = ("data/loom_input/*.parquet",)
WEIGHTS = {
    "tutorial": (0.35, TUTORIALS),
    "tutorial_frames": (0.15, TUTORIALS),
    "image_tutorial": (0.2, TUTORIALS),
    "composition": (0.2, INPUTS),
    "style": (0.1, INPUTS),
}
"""Recipe -> its share of the rows, and the rows themselves."""


def get_config(variant: str = "h100-64") -> ml_collections.ConfigDict:
    """Returns the recipe for a key of MESHES; the keys are those of loom_jax.train.TrainConfig."""
    config = bagel_7b.get_config()
    config.needs = ("init_from",)
    config.total_steps = 10_000
    config.frozen = ("vit/*",)
    config.mesh = MESHES[variant]["mesh"]
    config.optimizer = {"learning_rate": 2e-5, "warmup_steps": 2000, "eps": 1e-15, "clip_norm": 1.0}
    config.ema = {"decay": 0.9999}
    config.save = {"every": 1000, "keep_last": 3, "keep_every": 5000}
    config.watch = {
        "log_every": 10,
        "sample_every": 1000,
        "sample_prompts": ("a watercolour of a fox, finished", "step one of baking bread: flour and water in a bowl"),
    }
    rows = MESHES[variant]["rows"]
    config.data = {
        "mixture": [
            {"name": recipe, "source": "parquet", "recipe": recipe, "weight": weight, "paths": paths}
            for recipe, (weight, paths) in WEIGHTS.items()
        ],
        "rows": rows,
        "shards": rows,  # so that any number of processes that divides it makes the same batches
        "budget": {"und": 18_176, "gen": 32_768, "vit": 19_136},
        "canvases": [
            {"height": height, "width": width, "count": count}
            for height, width, count in (
                (1024, 1024, 6),
                (768, 1024, 5),
                (1024, 768, 5),
                (512, 1024, 3),
                (1024, 512, 3),
                (512, 704, 8),
            )
        ],
        "look_ahead": 4.0,
        "workers": 8,
    }
    return config
