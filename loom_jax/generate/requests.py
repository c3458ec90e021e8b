"""What a user asks for, how it is to be made, and what comes back."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from PIL import Image as PILImage

from loom_jax.core import InputError
from loom_jax.generate.guidance import RenormType

Task = Literal["image", "edit", "understand"]
Item = str | PILImage.Image


@dataclasses.dataclass(frozen=True)
class Request:
    """Texts and pictures in order, and what to make of them.

    Attributes:
      items: the input.
      task: `image` (a picture from text), `edit` (a picture from pictures and text), `understand` (text).
      think: write a plan first, and read it before answering.
      size: (height, width) of the picture to make; by default that of the last input picture, or 1024 x 1024.
      seed: of all randomness of this request, below 2^32.

    Raises:
      InputError: the input does not fit the task, a text is empty, or the seed is out of range.
    """

    items: tuple[Item, ...]
    task: Task = "image"
    think: bool = False
    size: tuple[int, int] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        texts = [item for item in self.items if isinstance(item, str)]
        if not texts:
            raise InputError("the request has no prompt: give a text that says what to make or to answer")
        if not all(text.strip() for text in texts):
            raise InputError("the prompt is empty: give a text that says what to make or to answer")
        has_pictures = len(texts) < len(self.items)
        if self.task == "image" and has_pictures:
            raise InputError("task 'image' makes a picture from text alone, but pictures were given: use task 'edit'")
        if self.task == "edit" and not has_pictures:
            raise InputError("task 'edit' needs at least one picture: give one, or use task 'image'")
        if not 0 <= self.seed < 2**32:  # beyond, seeds would silently stand for smaller ones
            raise InputError(f"seed={self.seed}: must be at least 0 and below 2^32 = {2**32}")


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """How a picture is denoised; names and meaning as in the original (spec section 11).

    `num_timesteps` points make `num_timesteps - 1` evaluations. Guidance acts while interval[0] < t <= interval[1], t
    being the shifted time; a text scale of at most 1 turns all guidance off. `taylorseer` predicts most evaluations
    from earlier ones (loom_jax.generate.taylor): of 49, 19 run the layers; the picture differs a little.
    """

    num_timesteps: int = 50
    timestep_shift: float = 3.0
    cfg_text_scale: float = 4.0
    cfg_img_scale: float = 1.0
    cfg_interval: tuple[float, float] = (0.4, 1.0)
    cfg_renorm_min: float = 0.0
    cfg_renorm_type: RenormType = "global"
    taylorseer: bool = False

    def __post_init__(self) -> None:
        if self.num_timesteps < 2:
            raise InputError(f"num_timesteps={self.num_timesteps}: at least 2 points are needed to take one step")
        if self.timestep_shift <= 0:
            raise InputError(f"timestep_shift={self.timestep_shift}: must be above 0 (1 leaves the schedule as it is)")
        if self.cfg_interval[0] > self.cfg_interval[1]:
            raise InputError(f"cfg_interval={self.cfg_interval}: the first bound must not exceed the second")
        if self.cfg_renorm_type not in ("global", "channel", "text_channel"):
            raise InputError(f"cfg_renorm_type={self.cfg_renorm_type!r}: must be one of global, channel, text_channel")


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """How text is decoded: temperature 0 is greedy; top_p 1 draws from all tokens."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens={self.max_new_tokens}: must be at least 1")
        if self.temperature < 0:
            raise InputError(f"temperature={self.temperature}: must be at least 0 (0 is greedy)")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p}: must be above 0 and at most 1")


TASK_SETTINGS: dict[Task, ImageSettings] = {
    "image": ImageSettings(),
    "edit": ImageSettings(cfg_img_scale=2.0, cfg_interval=(0.0, 1.0), cfg_renorm_type="text_channel"),
    "understand": ImageSettings(),
}
"""The original's defaults for each task (spec section 11: demo settings)."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a request.

    Attributes:
      image: the picture, for `image` and `edit`.
      latents: its packed latents, float32 [G, C].
      text: the answer, for `understand`.
      thought: the plan that was written first, if asked for.
      finished: False where a text was cut off at max_new_tokens.
    """

    request: Request
    image: PILImage.Image | None = None
    latents: np.ndarray | None = None
    text: str | None = None
    thought: str | None = None
    finished: bool = True
