"""What each of Loom's ideas is worth on the tutorial world: one small base, fine-tuned without one of them at a time.

Command: python -m benchmarks ablation --vae runs/world_autoencoder --runs runs/ablation --out out/ablation
  which trains the base, every variant with two seeds, and scores all of them on the same held-out requests. One alone:
  loom train --config configs/world_ablation.py:base --workdir runs/base --config.vae_from=runs/world_autoencoder
  loom convert from-run runs/base runs/base_model
  loom train --config configs/world_ablation.py:no_planning --workdir DIR --config.init_from=runs/base_model
Data: the tutorial world, drawn as it is needed. The base, which is to Loom what the published one is, learns pictures
of instructions, single edits, and as text which steps an instruction means; no time token, entity token or history.
The variants learn tutorials and compositions.
Hardware: any CPU. On two cores, with two devices as configs/world_tiny.py says, a step took 0.8 s and the scores of a
variant a minute: some 35 minutes for the base, 10 for a variant.
Expect: the table that the command writes into out/ablation.
"""

import ml_collections

from loom_jax.configs import world_tiny

IDEAS = {
    "whole": {},
    "no_planning": {"method": {"planning": False}},
    "no_time_tokens": {"method": {"time_tokens": False}},
    "no_entity_tokens": {"method": {"entity_tokens": False}},
    "history_none": {"history": "none"},
    "history_last_1": {"history": "last(1)"},
    "history_uniform_2": {"history": "uniform(2)"},
    "history_all": {"history": "all"},
}
"""Variant -> what is other than in `whole`, which shows up to three random frames in training and generates with
uniform(2). The others generate with the history that they were trained with."""
VARIANTS = ("base", *IDEAS)

BASE_WEIGHTS = {"t2i": 3.0, "edit": 5.0, "tutorial_plan": 6.0}
WEIGHTS = {"tutorial": 3.0, "tutorial_frames": 3.0, "tutorial_plan": 2.0, "composition": 3.0}
"""Recipe -> relative share of the rows. Without planning there are no documents that are only a plan."""


def get_config(variant: str = "whole") -> ml_collections.ConfigDict:
    """Returns the recipe for one of VARIANTS; the keys are those of loom_jax.train.TrainConfig."""
    config = world_tiny.get_config("second")
    config.model.decoder.update(
        {"hidden_size": 128, "intermediate_size": 384, "num_layers": 6, "num_heads": 4, "num_kv_heads": 2}
    )
    config.model.vit.update({"hidden_size": 64, "intermediate_size": 160, "num_layers": 2, "num_heads": 2})
    config.save = {"every": 250, "keep_last": 1}
    config.watch = {"log_every": 25}
    config.held_out = None
    if variant == "base":
        config.needs = ("vae_from",)
        config.total_steps = 2500
        config.data.mixture = world_tiny.mixture(BASE_WEIGHTS)
        return config
    config.needs = ("init_from",)
    config.total_steps = 600
    config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 50})
    config.data.update(IDEAS[variant])
    planned = variant != "no_planning"
    weights = {name: weight for name, weight in WEIGHTS.items() if planned or name != "tutorial_plan"}
    config.data.mixture = world_tiny.mixture(weights)
    return config
