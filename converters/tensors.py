"""safetensors files, one tensor at a time: memory-mapped reading and sequential writing. numpy only.

The format: 8 bytes with the length of a JSON header (little endian), the header, the values. The header gives dtype,
shape and byte range of each tensor; the ranges fill the rest of the file without a gap. The library `safetensors` reads
whole tensors into memory and writes whole files from memory; a conversion needs neither.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ml_dtypes
import numpy as np

from loom_jax.core import CheckpointError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Name in the file -> dtype. Weights are floats: other types are refused."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100 * 2**20
_BLOCK = 16 * 2**20
_TILE = 256


class TensorFile:
    """A safetensors file, mapped into memory. Tensors are views: nothing is read before it is used.

    Attributes:
      path: of the file.
      shapes, dtypes: of its tensors, by key.

    Raises:
      CheckpointError: the file is truncated or corrupt, or holds a tensor that is not a float.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                header, start = _read_header(path, file.read(8), size, file)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
        header.pop("__metadata__", None)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self._starts: dict[str, int] = {}
        end = 0
        for key, entry in sorted(header.items(), key=lambda item: _begin(path, *item)):
            shape, dtype, begin, stop = _entry(path, key, entry)
            if begin != end:
                raise CheckpointError(f"{path} is corrupt: tensor {key} begins at byte {begin}, expected {end}")
            self.shapes[key], self.dtypes[key], self._starts[key], end = shape, dtype, start + begin, stop
        if start + end != size:
            raise CheckpointError(
                f"{path} is truncated or corrupt: it has {size} bytes, its header promises {start + end}"
            )

    def __getitem__(self, key: str) -> np.ndarray:
        """Returns a tensor as a read-only view of the file."""
        shape, dtype = self.shapes[key], self.dtypes[key]
        flat = np.frombuffer(self._map, dtype, math.prod(shape), self._starts[key])
        return (flat if flat.flags.aligned else flat.copy()).reshape(shape)

    def forget(self) -> None:
        """Gives the pages that were read back to the system; views stay valid, and read them again if needed."""
        self._map.madvise(mmap.MADV_DONTNEED)


def _read_header(path: Path, prefix: bytes, size: int, file: Any) -> tuple[dict[str, Any], int]:
    """Returns the header and the position of the first value."""
    length = int.from_bytes(prefix, "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file: it has {size} bytes, its header alone would have {length}"
        )
    try:
        header = json.loads(file.read(length), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is corrupt: its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is corrupt: its header is a {type(header).__name__}, expected an object")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys must differ."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _begin(path: Path, key: str, entry: Any) -> int:
    """Where a tensor begins, checked for form."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(isinstance(offset, int) for offset in offsets)):
        raise CheckpointError(f"{path} is corrupt: tensor {key} has no byte range in the header")
    return offsets[0]


def _entry(path: Path, key: str, entry: dict[str, Any]) -> tuple[tuple[int, ...], np.dtype, int, int]:
    """Shape, dtype and byte range of one tensor."""
    shape, (begin, stop) = entry.get("shape"), entry["data_offsets"]
    if not (isinstance(shape, list) and all(isinstance(size, int) and size >= 0 for size in shape)):
        raise CheckpointError(f"{path} is corrupt: tensor {key} has shape {shape!r}")
    if entry.get("dtype") not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor {key} has dtype {entry.get('dtype')}, expected one of {', '.join(DTYPES)}: "
            "convert it to a float type first"
        )
    dtype = DTYPES[entry["dtype"]]
    size = math.prod(shape) * dtype.itemsize
    if stop - begin != size:
        raise CheckpointError(f"{path} is corrupt: tensor {key} {shape} has {stop - begin} bytes, expected {size}")
    return tuple(shape), dtype, begin, stop


class TensorFileWriter:
    """Writes a safetensors file whose tensors come one by one, in any order.

    Args:
      path: of the new file.
      tensors: key -> (shape, dtype) of everything that will be written.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> None:
        self.path = path
        self._tensors = dict(tensors)
        self._left = set(tensors)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        # Widest dtype first: every tensor then begins at a multiple of its item size, which torch's reader needs.
        for key, (shape, dtype) in sorted(tensors.items(), key=lambda item: -item[1][1].itemsize):
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._starts = {key: 8 + len(text) + header[key]["data_offsets"][0] for key in tensors}
        self._prefix = len(text).to_bytes(8, "little") + text
        self._size = len(self._prefix) + end

    def __enter__(self) -> Self:
        self._file = self.path.open("wb")
        self._file.truncate(self._size)
        self._file.write(self._prefix)
        return self

    def write(self, key: str, array: np.ndarray) -> None:
        """Writes one tensor, a few rows at a time; `array` need not be contiguous."""
        if array.shape != self._tensors[key][0]:
            raise ValueError(f"{key}: got shape {array.shape}, announced {self._tensors[key][0]}")
        self.write_blocks(key, _blocks(array))

    def write_blocks(self, key: str, blocks: Iterable[np.ndarray]) -> None:
        """Writes one tensor that comes in blocks along its first axis."""
        shape, dtype = self._tensors[key]
        self._left.remove(key)
        self._file.seek(self._starts[key])
        written = 0
        for block in blocks:
            if block.dtype != dtype or block.shape[1:] != shape[1:]:
                raise ValueError(f"{key}: got {block.dtype} {block.shape}, announced {dtype} {shape}")
            written += self._file.write(_contiguous(block).reshape(-1).view(np.uint8).data)
        if written != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{key}: got {written} bytes, announced {dtype} {shape}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self._left:
            raise ValueError(f"{self.path}: {len(self._left)} tensors were never written, {min(self._left)} for one")


def _blocks(array: np.ndarray) -> Iterable[np.ndarray]:
    """Cuts an array along its first axis into blocks of some MiB."""
    if array.ndim == 0 or array.nbytes <= _BLOCK:
        return [array]
    rows = max(1, _BLOCK * array.shape[0] // array.nbytes)
    return (array[begin : begin + rows] for begin in range(0, array.shape[0], rows))


def _contiguous(block: np.ndarray) -> np.ndarray:
    """The block in row-major order; a transposed one is copied in tiles that fit a cache: 2.5 times as fast."""
    if block.ndim != 2 or block.flags.c_contiguous:
        return np.ascontiguousarray(block)
    copy = np.empty(block.shape, block.dtype)
    for row in range(0, block.shape[0], _TILE):
        for column in range(0, block.shape[1], _TILE):
            tile = np.s_[row : row + _TILE, column : column + _TILE]
            copy[tile] = block[tile]
    return copy


class TensorSource:
    """The tensors of one or several safetensors files, by key.

    Raises:
      CheckpointError: a file is bad, or a key stands in two of them.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.files = [TensorFile(path) for path in paths]
        self._file: dict[str, TensorFile] = {}
        for file in self.files:
            for key in file.shapes:
                if key in self._file:
                    raise CheckpointError(
                        f"tensor {key} stands in {self._file[key].path} and in {file.path}: remove one"
                    )
                self._file[key] = file

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by key."""
        return {key: file.shapes[key] for key, file in self._file.items()}

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """Dtype by key."""
        return {key: file.dtypes[key] for key, file in self._file.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return sum(math.prod(file.shapes[key]) * file.dtypes[key].itemsize for key, file in self._file.items())

    def file_of(self, key: str) -> Path:
        """Which file holds a tensor."""
        return self._file[key].path

    def __getitem__(self, key: str) -> np.ndarray:
        """Returns a tensor as a read-only view of its file."""
        return self._file[key][key]

    def forget(self) -> None:
        """Gives the pages that were read back to the system; views stay valid, and read them again if needed."""
        for file in self.files:
            file.forget()
