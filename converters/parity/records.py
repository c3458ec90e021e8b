"""A set of recorded outputs, and what a check says of the file it is for."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from loom_jax.core import InputError


class Records:
    """A folder with ckpt/, golden/, rows/ and set_config.json.

    Raises:
      InputError: the folder or one of its parts is not there.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        for part in ("ckpt", "golden", "set_config.json"):
            if not (folder / part).exists():
                raise InputError(
                    f"{folder}: no {part} in it: expected a set of records with ckpt/, golden/, set_config.json"
                )
        self.settings: dict[str, Any] = json.loads((folder / "set_config.json").read_text(encoding="utf-8"))

    def files(self) -> list[str]:
        """Returns the names of all recorded files."""
        return sorted(p.name for p in (self.folder / "golden").iterdir() if p.suffix in (".npz", ".json"))

    @functools.cache  # noqa: B019 - one set lives as long as the process
    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """Returns all arrays of golden/NAME.npz."""
        with np.load(self._file(f"{name}.npz")) as npz:
            return {key: npz[key] for key in npz.files}

    @functools.cache  # noqa: B019
    def json(self, name: str) -> dict[str, Any]:
        """Returns golden/NAME.json."""
        return json.loads(self._file(f"{name}.json").read_text(encoding="utf-8"))

    def picture(self, name: str, array: str) -> PILImage.Image:
        """Returns a recorded uint8 picture [H, W, 3]."""
        return PILImage.fromarray(self.arrays(name)[array])

    def names(self, file: str) -> list[str]:
        """Returns what a file holds: its arrays, or the top-level keys of a JSON file."""
        stem, _, kind = file.rpartition(".")
        return sorted(self.arrays(stem) if kind == "npz" else self.json(stem))

    def expected(self, file: str, array: str) -> Any:
        """Returns one recorded array or JSON value."""
        stem, _, kind = file.rpartition(".")
        return (self.arrays(stem) if kind == "npz" else self.json(stem))[array]

    def _file(self, name: str) -> Path:
        path = self.folder / "golden" / name
        if not path.exists():
            raise InputError(f"{path} is not there: the set of records is incomplete")
        return path


@dataclasses.dataclass
class Checked:
    """What a check of one file found.

    Attributes:
      computed: name -> what this framework makes of it.
      inputs: names of draws, source pictures, ids and settings that the check was fed.
      compared: name -> the part of the record to compare with, where it is not the whole value.
      masks: name -> bool array, True where the record can be compared at all.
      scales: name -> what differences are measured against, where it is not the rms of the record.
    """

    computed: dict[str, Any] = dataclasses.field(default_factory=dict)
    inputs: set[str] = dataclasses.field(default_factory=set)
    compared: dict[str, Any] = dataclasses.field(default_factory=dict)
    masks: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    scales: dict[str, float] = dataclasses.field(default_factory=dict)
