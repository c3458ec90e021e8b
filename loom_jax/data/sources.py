"""Rows at random access, as grain wants them: `len(source)`, `source[index]`, and they can be sent to worker processes.

A row is a plain dict; pictures in it stay encoded bytes. A row that cannot be read raises BadRow; a file that cannot be
opened is left out and listed in `bad_files`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from loom_jax.core import InputError
from loom_jax.data.bad_rows import BadRow

Row = dict[str, Any]


class Source(Protocol):
    """Rows of one data set.

    Attributes:
      blocks: row counts of runs that are read together, in order: shuffling keeps them together. Empty where every
        row is as cheap as any other.
      bad_files: files that are left out, each with its fault.
    """

    @property
    def blocks(self) -> Sequence[int]: ...

    @property
    def bad_files(self) -> Sequence[BadRow]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


def open_source(kind: str, paths: Sequence[str] = (), images: str | None = None, recipe: str = "t2i") -> Source:
    """Opens a data set.

    Args:
      kind: `parquet`, `jsonl`, `folders`, `array_record`, `synthetic` or `world`.
      paths: files, folders or patterns; for `folders`, folders that hold one folder for each tutorial; for `world`, the
        split, or none for `train`.
      images: the folder that file names in a jsonl are relative to.
      recipe: what kind of rows a synthetic source or the world draws.

    Raises:
      InputError: nothing is found there, or no row in it can be read.
    """
    if kind == "synthetic":
        from loom_jax.data.synthetic import SyntheticRows

        return SyntheticRows(recipe)
    if kind == "world":
        from loom_jax.data.world import open_world

        return open_world(recipe, paths)
    if not paths:
        raise InputError(f"a source of kind {kind} needs paths: name files, folders or patterns")
    source: Source
    if kind == "parquet":
        from loom_jax.data.parquet import ParquetRows

        source = ParquetRows(find_files(paths, ".parquet"))
    elif kind == "jsonl":
        source = JsonRows(find_files(paths, ".jsonl"), images)
    elif kind == "folders":
        source = TutorialFolders(paths)
    elif kind == "array_record":
        from loom_jax.data.stored import StoredRows

        source = StoredRows(paths)
    else:
        raise InputError(
            f"unknown kind of source {kind!r}: use parquet, jsonl, folders, array_record, synthetic, world"
        )
    if not len(source):
        faults = "; ".join(map(str, source.bad_files[:3]))
        raise InputError(f"no row can be read from {', '.join(paths)}" + (f" ({faults})" if faults else ""))
    return source


def find_files(paths: Sequence[str], ending: str) -> list[Path]:
    """Returns the files that paths name, sorted: a file, all files in a folder, a pattern, or a JSON list of files.

    A JSON file is the published index of row groups: its keys are paths relative to the folder it is in.

    Raises:
      InputError: a path names nothing.
    """
    found: list[Path] = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            matches = sorted(path.rglob(f"*{ending}"))
        elif path.suffix == ".json" and path.is_file():
            matches = sorted(path.parent / key for key in json.loads(path.read_text(encoding="utf-8")))
        elif path.is_file():
            matches = [path]
        else:
            base = Path(path.anchor)
            matches = sorted(base.glob(str(path.relative_to(base))))
        if not matches:
            raise InputError(f"{name}: no {ending} file: name a file, a folder or a pattern such as data/*{ending}")
        found += matches
    return found


class JsonRows:
    """Rows of jsonl files; the pictures they name (`image`, one or a list) are read into `images`.

    Keeps the places of the lines, not the lines.
    """

    blocks: Sequence[int] = ()
    bad_files: Sequence[BadRow] = ()

    def __init__(self, files: Sequence[Path], images: str | None):
        self._files = list(files)
        self._images = Path(images) if images else None
        places = [_line_starts(path) for path in self._files]
        self._file = np.repeat(np.arange(len(places)), [len(p) for p in places])
        self._start = np.concatenate(places)

    def __len__(self) -> int:
        return len(self._start)

    def __getitem__(self, index: int) -> Row:
        path = self._files[self._file[index]]
        with path.open("rb") as file:
            file.seek(int(self._start[index]))
            line = file.readline()
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BadRow("line is no JSON", f"{path} row {index}: {error}") from error
        if not isinstance(row, dict):
            raise BadRow("line is no JSON object", f"{path} row {index}")
        named = row.pop("image", None)
        names = [] if named is None else [named] if isinstance(named, str) else named
        if names:
            row["images"] = [self._read(name) for name in names]
        return row

    def _read(self, name: str) -> bytes:
        path = self._images / name if self._images else self._files[0].parent / name
        return read_file(path)


class TutorialFolders:
    """Raw tutorials, one folder each: image_0.jpg ... image_N.jpg, detail.txt (the plan), info.json (the prompt).

    The prompt is the first of the keys `prompt`, `title`, `name` that info.json has.
    """

    blocks: Sequence[int] = ()
    bad_files: Sequence[BadRow] = ()

    def __init__(self, paths: Sequence[str]):
        roots = [Path(name) for name in paths]
        missing = [str(root) for root in roots if not root.is_dir()]
        if missing:
            raise InputError(f"{missing[0]} is no folder: name folders that hold one folder for each tutorial")
        self._folders = sorted(p.parent for root in roots for p in root.rglob("detail.txt"))

    def __len__(self) -> int:
        return len(self._folders)

    def __getitem__(self, index: int) -> Row:
        folder = self._folders[index]
        try:
            info = json.loads(read_file(folder / "info.json"))
            plan = read_file(folder / "detail.txt").decode("utf-8").strip()
        except ValueError as error:
            raise BadRow("unreadable info.json or detail.txt", f"{folder}: {error}") from error
        known = info if isinstance(info, dict) else {}
        prompt = next((known[key] for key in ("prompt", "title", "name") if key in known), None)
        if not isinstance(prompt, str):
            raise BadRow("info.json without prompt", f"{folder}: expected one of the keys prompt, title, name")
        return {"image_list": [read_file(path) for path in _numbered(folder)], "instruction_list": [prompt, plan]}


def _numbered(folder: Path) -> list[Path]:
    """Returns the pictures image_0, image_1, ... of a folder in the order of their numbers."""
    numbers = {int(m[1]): path for path in folder.iterdir() if (m := re.fullmatch(r"image_(\d+)", path.stem))}
    if sorted(numbers) not in (list(range(len(numbers))), list(range(1, len(numbers) + 1))):
        raise BadRow("images are not numbered in a row", f"{folder}: found {sorted(numbers)}")
    return [numbers[number] for number in sorted(numbers)]


def read_file(path: Path) -> bytes:
    """Returns the bytes of a file that a row refers to; BadRow where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadRow("missing file", f"{path}: {error.strerror}") from error


def _line_starts(path: Path) -> np.ndarray:
    """Returns where each line that is not blank begins, int64."""
    starts, place = [], 0
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                starts.append(place)
            place += len(line)
    return np.asarray(starts, np.int64)
