"""The tensorflow-datasets builder of stored rows. Imported only where rows are written."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds


class LoomRows(tfds.core.GeneratorBasedBuilder):
    """Rows of any data set, in the order they come in."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, rows: Iterable[dict[str, Any]] = (), description: str = "", **options: Any):
        self._rows, self._text = rows, description
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        blob = tfds.features.Tensor(shape=(), dtype=np.object_)
        features = tfds.features.FeaturesDict({"row": tfds.features.Text(), "blobs": tfds.features.Sequence(blob)})
        return tfds.core.DatasetInfo(builder=self, features=features, description=self._text, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(self._rows)


def build(rows: Iterable[dict[str, Any]], folder: Path, description: str) -> int:
    """Writes rows below `folder` and returns their number."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    tfds.disable_progress_bar()
    builder = LoomRows(rows=rows, description=description, data_dir=str(folder), file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):  # it announces downloads, and nothing is downloaded
        builder.download_and_prepare(download_dir=str(folder / "downloads"))
    shutil.rmtree(folder / "downloads", ignore_errors=True)
    return builder.info.splits["train"].num_examples
