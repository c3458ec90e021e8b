"""Rows in array_record files, written and read through tensorflow-datasets (without TensorFlow).

A stored row is a JSON text in which `{"blob": i}` stands for the i-th of a list of byte strings: any row of plain
values can be stored. Beside the files lies `loom_rows.json` with counts and checksums.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loom_jax.core import InputError, LoomError
from loom_jax.data.bad_rows import BadRow

RECORD = "loom_rows.json"
SCHEMA_VERSION = 1


class StoredRows:
    """Rows of folders that `write_rows` made.

    Raises:
      InputError: a folder was not written by `loom data build`, or its row count is not what its record says.
    """

    blocks: Sequence[int] = ()
    bad_files: Sequence[BadRow] = ()

    def __init__(self, paths: Sequence[str]):
        self._folders = [_find(Path(name)) for name in paths]
        self._ends = np.cumsum([read_record(folder)["rows"] for folder in self._folders], dtype=np.int64)
        self._open: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        offset = index - (int(self._ends[number - 1]) if number else 0)
        try:
            stored = self._records(number)[offset]
        except (OSError, ValueError, IndexError, RuntimeError) as error:
            raise BadRow("corrupt file", f"{self._folders[number]} row {offset}: {error}") from error
        return decode_row(stored)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def _records(self, number: int) -> Any:
        with self._lock:
            if number not in self._open:
                import tensorflow_datasets as tfds

                builder = tfds.builder_from_directory(self._folders[number])
                self._open[number] = builder.as_data_source(split="train")
            return self._open[number]


def encode_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row as it is stored: a JSON text and the byte strings it refers to."""
    blobs: list[bytes] = []

    def plain(value: Any) -> Any:
        if isinstance(value, bytes):
            blobs.append(value)
            return {"blob": len(blobs) - 1}
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return {"row": json.dumps(plain(row), ensure_ascii=False), "blobs": blobs}


def decode_row(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Undoes `encode_row`."""

    def full(value: Any) -> Any:
        if isinstance(value, dict):
            is_blob = value.keys() == {"blob"}
            return bytes(stored["blobs"][value["blob"]]) if is_blob else {k: full(v) for k, v in value.items()}
        return [full(item) for item in value] if isinstance(value, list) else value

    text = stored["row"]
    return full(json.loads(text if isinstance(text, str) else bytes(text).decode("utf-8")))


def write_rows(
    rows: Iterable[Mapping[str, Any]], folder: Path, description: str, facts: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """Writes rows in order into a new folder, and a record with counts and checksums last; returns the record.

    Args:
      rows: rows of plain values.
      folder: is made; must not exist or be empty.
      description: where the rows come from.
      facts: more entries of the record. They are taken when all rows are written, so they may hold counts.

    Raises:
      InputError: the folder holds something already.
      LoomError: the disk is full, or there is no row.
    """
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty: name a folder that does not exist yet")
    # TensorFlow Datasets is slow to import and needed only where such data is used.
    from loom_jax.data.stored_builder import build

    encoded = map(encode_row, rows)
    first = next(encoded, None)
    if first is None:
        raise LoomError(f"{folder} is not written: there is not one row that could be used")
    done = False
    try:
        count = build(itertools.chain([first], encoded), folder, description)
        files = {p.name: _file_facts(p) for p in sorted(folder.rglob("*array_record*")) if p.is_file()}
        done = True
    except OSError as error:
        raise LoomError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        if not done:
            shutil.rmtree(folder, ignore_errors=True)
    record = {"schema": SCHEMA_VERSION, "description": description, "rows": count, "files": files, **facts}
    path = _data_folder(folder) / RECORD
    path.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return record


def read_record(folder: Path) -> dict[str, Any]:
    """Returns the record of a folder of stored rows, once the files it names are there in full size.

    Raises:
      InputError: there is no record, it is of a newer version, or a file is missing or cut short.
    """
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    if record["schema"] > SCHEMA_VERSION:
        raise InputError(f"{folder} has schema version {record['schema']}, this version reads {SCHEMA_VERSION}: update")
    for name, facts in record["files"].items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if size != facts["bytes"]:
            raise InputError(
                f"{folder / name} has {size} bytes, its record says {facts['bytes']}: build or copy it anew"
            )
    return record


def damaged_files(folder: Path) -> list[str]:
    """Returns the names of files whose checksum is not that of the record."""
    folder = _find(folder)
    record = read_record(folder)
    return [name for name, facts in record["files"].items() if _file_facts(folder / name) != facts]


def _find(folder: Path) -> Path:
    """Returns the folder that holds the record: the given one or one below it."""
    found = sorted(folder.rglob(RECORD)) if folder.is_dir() else []
    if len(found) != 1:
        raise InputError(f"{folder} holds {len(found)} {RECORD}, expected 1: write it with `loom data build`")
    return found[0].parent


def _data_folder(folder: Path) -> Path:
    return next(folder.rglob("features.json")).parent


def _file_facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
