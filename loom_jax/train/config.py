"""What a training job is, as frozen dataclasses: built once from a recipe, strict about unknown keys."""

from __future__ import annotations

import dataclasses
from typing import Literal

from loom_jax.core import ConfigError, LoomConfig
from loom_jax.data.config import DataConfig

Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its schedule; defaults are the original's (spec section 9), but for the fine-tuning rate.

    Attributes:
      name: `adamw`, or `adafactor` as the lean choice, or `muon`, which takes fewer steps from nothing: matrices
        of layers are orthogonalised (momentum 0.95), the rest goes by Adam, both with Nesterov's momentum; rates are as
        for AdamW.
      schedule: `constant` or `cosine`, both after a linear warm-up whose first step has rate 0.
      min_learning_rate: where cosine ends.
      decay_steps: at which step cosine ends; `total_steps` by default. More of them stop a run before its rate has
        fallen, for another to go on from its weights.
      weight_decay: of matrices alone; norms, biases and position tables never decay.
      clip_norm: largest global norm of the gradient; 0 turns clipping off.
      moment_dtype: in which AdamW keeps its moments between steps; Muon its first ones.
    """

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    learning_rate: float = 2e-5
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 2000
    min_learning_rate: float = 1e-7
    decay_steps: int | None = None
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-15
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    moment_dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ConfigError(f"optimizer.learning_rate={self.learning_rate}: must be positive")
        if self.clip_norm < 0 or self.warmup_steps < 0:
            raise ConfigError(
                f"optimizer.clip_norm={self.clip_norm}, optimizer.warmup_steps={self.warmup_steps}: must be at least 0"
            )
        if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            raise ConfigError(
                f"optimizer.decay_steps={self.decay_steps}: must be after optimizer.warmup_steps={self.warmup_steps}"
            )


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    """The moving average of the trained parameters; a decay of 0 turns it off. In bfloat16 it rounds stochastically."""

    decay: float = 0.9999
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ConfigError(f"ema.decay={self.decay}: must be at least 0 (off) and less than 1")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on projections; a rank of 0 turns them off. With them nothing else is trained.

    `targets` are names of projections, such as q_proj, or patterns of their whole path.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the losses (spec section 8). `reweight` weighs labels by the length of their text (data.weighting)."""

    ce_weight: float = 1.0
    mse_weight: float = 1.0
    reweight: bool = False
    vocab_chunk: int = 16384
    """Most columns of logits that exist at once."""

    def __post_init__(self) -> None:
        if self.vocab_chunk < 1:
            raise ConfigError(f"loss.vocab_chunk={self.vocab_chunk}: must be at least 1")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the job lies on its devices: a preset of loom_jax.parallel, and axis sizes where its own do not fit.

    Attributes:
      axes: mesh axis names in order, beside `sizes`; empty for those of the preset.
    """

    preset: str = "single"
    axes: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class SaveConfig:
    """When checkpoints are written, and which are kept: the newest `keep_last`, and every `keep_every`-th for good."""

    every: int = 2000
    keep_last: int = 3
    keep_every: int = 0


@dataclasses.dataclass(frozen=True)
class WatchConfig:
    """What is looked at while training.

    Attributes:
      log_every: steps between lines of the log.
      held_out_every: steps between measurements of the loss on held-out rows; 0 for never.
      held_out_batches: batches of such a measurement; the rows, timesteps and noise are the same every time.
      sample_every: steps between sample pictures; 0 for never.
      sample_prompts: what the pictures are to show.
      profile_start, profile_steps: window of steps that is profiled; 0 steps for none.
      drift_every: steps between comparisons of the copies of the state on all devices; 0 for never.
      max_bad_steps: consecutive steps with a loss or gradient that is not finite before the run stops.
    """

    log_every: int = 10
    held_out_every: int = 0
    held_out_batches: int = 2
    sample_every: int = 0
    sample_prompts: tuple[str, ...] = ()
    profile_start: int = 10
    profile_steps: int = 0
    drift_every: int = 500
    max_bad_steps: int = 5

    def __post_init__(self) -> None:
        for name in ("log_every", "held_out_batches", "max_bad_steps", "profile_start"):
            if getattr(self, name) < 1:
                raise ConfigError(f"watch.{name}={getattr(self, name)}: must be at least 1")
        if self.sample_every and not self.sample_prompts:
            raise ConfigError(f"watch.sample_every={self.sample_every}, but watch.sample_prompts is empty")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training job.

    Attributes:
      model: sizes of the networks; must equal those of `init_from`.
      held_out: rows that are never trained on, for watch.held_out_every.
      init_from: converted folder to start from; without one all weights are drawn from `seed`.
      vae_from: folder of a finished run of an autoencoder (loom_jax.train.AutoencoderTrainConfig). Without one it is
        that of `init_from`; a job that starts from nothing draws it, and what the model learns to draw means nothing.
      needs: which of these two must be given, in a recipe that makes no sense from random weights.
      tokenizer: of a job that starts from nothing: one token for each byte, or for each word of the tutorial world.
      frozen: patterns of parameter paths that are not trained (`vit/*`).
      freeze_und: the original's flag: gradients of und activations are cut.
      attention: key of loom_jax.nn.ATTENTION_BACKENDS.
      remat: key of loom_jax.nn.REMAT_POLICIES.
      compute_dtype: of the forward and backward pass; `auto` is bfloat16 on accelerators and float32 on CPU.
      param_dtype: of the master parameters; bfloat16 ones are updated with stochastic rounding.
      microbatches: parts that a batch is worked through in, with gradients added up.
    """

    model: LoomConfig
    data: DataConfig
    held_out: DataConfig | None = None
    init_from: str | None = None
    vae_from: str | None = None
    needs: tuple[Literal["init_from", "vae_from"], ...] = ()
    tokenizer: Literal["bytes", "world"] = "bytes"
    total_steps: int = 500_000
    seed: int = 42
    microbatches: int = 1
    frozen: tuple[str, ...] = ("vit/*",)
    freeze_und: bool = False
    attention: str = "auto"
    remat: str = "full"
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    param_dtype: Dtype = "float32"
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EmaConfig = EmaConfig()
    lora: LoraConfig = LoraConfig()
    loss: LossConfig = LossConfig()
    mesh: MeshConfig = MeshConfig()
    save: SaveConfig = SaveConfig()
    watch: WatchConfig = WatchConfig()

    def __post_init__(self) -> None:
        if self.microbatches < 1 or self.total_steps < 1:
            raise ConfigError(f"microbatches={self.microbatches}, total_steps={self.total_steps}: must be at least 1")
        if len(self.mesh.axes) != len(self.mesh.sizes):
            raise ConfigError(f"mesh.axes={self.mesh.axes} and mesh.sizes={self.mesh.sizes}: must be equally many")
        if self.watch.held_out_every and self.held_out is None:
            raise ConfigError(f"watch.held_out_every={self.watch.held_out_every}, but no held_out data is given")
        if self.lora.rank < 0:
            raise ConfigError(f"lora.rank={self.lora.rank}: must be at least 0 (0 trains whole parameters)")
