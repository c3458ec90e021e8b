"""The folder of a converted model: configuration, tokenizer and provenance beside two Orbax checkpoints.

loom.json                     schema version, configuration, provenance
tokenizer.json, config.json   ...and the other files of the release, as they were
model/  vae/                  Orbax, one leaf per layer
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from loom_jax.checkpoint.arrays import restore_params
from loom_jax.checkpoint.remote import address_of, fetch_files, read_file, refuse_address
from loom_jax.core import CheckpointError, LoomConfig, from_mapping, to_mapping
from loom_jax.parallel import gather, make_mesh, shardings_for, together

RECORD = "loom.json"
"""Name of the file that makes a folder a converted model."""

COMPONENTS = ("model", "vae")
"""The two checkpoints of a folder: the transformer (LoomModel) and the autoencoder (Autoencoder)."""

SCHEMA_VERSION = 1
"""Version of the folder's form that this code writes."""

SHIPPED = Path(__file__).resolve().parents[1] / "weights" / "world"
"""The trained weights that come with the package: a small model of the drawn world, made by configs/world_tiny.py."""

MIGRATIONS: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""Version of a record -> function that returns it in the form of the next version."""


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A converted model on disk.

    Attributes:
      path: the folder; the tokenizer's files lie in it under their own names.
      config: of the networks.
      provenance: where the weights came from: source files with sizes and hashes, dtypes, tool version, date.
      files: names of the files taken over from the release.
      address: of a folder in a bucket; `path` then holds copies of `files`, and nothing else.
    """

    path: Path
    config: LoomConfig
    provenance: Mapping[str, Any]
    files: tuple[str, ...]
    address: str | None = None

    def component(self, name: str) -> Path | str:
        """Returns where the checkpoint of `model` or `vae` is: its path, or its address in a bucket."""
        return self.path / name if self.address is None else f"{self.address}/{name}"


def write_record(folder: Path, config: LoomConfig, provenance: Mapping[str, Any], files: tuple[str, ...]) -> None:
    """Writes loom.json."""
    record = {
        "schema_version": SCHEMA_VERSION,
        "config": to_mapping(config),
        "provenance": dict(provenance),
        "files": list(files),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_folder(path: Path | str) -> ModelFolder:
    """Reads loom.json of a converted folder.

    Args:
      path: of the folder; or `gs://BUCKET/FOLDER`, `s3://BUCKET/FOLDER`, of which the small files are copied here.

    Raises:
      CheckpointError: it is not there, not readable, or of a version that cannot be used.
      ConfigError: its configuration has unknown or missing keys.
    """
    address = address_of(path)
    path = Path(path)
    file: Path | str = path / RECORD if address is None else f"{address}/{RECORD}"
    try:
        text = _record_text(path, address)
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): convert it again") from error
    if text is None:
        raise CheckpointError(
            f"{address or path} is not a converted model: it holds no {RECORD}; make one with `loom convert`, of a "
            "training run (`from-run RUN FOLDER`) or of a release (`to-orbax RELEASE FOLDER`)"
        )
    try:
        record = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{file} cannot be read ({error}): convert it again") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{file} holds a {type(record).__name__}, expected an object: convert it again")
    record = migrate(record, file)
    lacking = [key for key in ("config", "provenance", "files") if key not in record]
    if lacking:
        raise CheckpointError(f"{file} lacks key {lacking[0]!r}: convert it again")
    config = from_mapping(LoomConfig, record["config"], "config.")
    files = tuple(record["files"])
    return ModelFolder(
        path if address is None else fetch_files(address, files), config, record["provenance"], files, address
    )


def shipped_folder() -> Path:
    """Returns the converted folder of the trained weights that come with the package.

    Raises:
      CheckpointError: they are not there.
    """
    if not (SHIPPED / RECORD).is_file():
        raise CheckpointError(
            f"{SHIPPED} holds no {RECORD}: the weights that come with loom_jax are missing; install it again, or train "
            "them as configs/world_tiny.py says, and put them there with "
            f"`loom convert from-run runs/world_tiny {SHIPPED} --dtype bfloat16`"
        )
    return SHIPPED


def _record_text(path: Path, address: str | None) -> str | None:
    """The text of loom.json; None where there is none."""
    if address is None:
        return (path / RECORD).read_text(encoding="utf-8") if (path / RECORD).is_file() else None
    content = read_file(address, RECORD)
    return None if content is None else content.decode()


def migrate(
    record: dict[str, Any],
    file: Path | str,
    migrations: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = MIGRATIONS,
    version: int = SCHEMA_VERSION,
) -> dict[str, Any]:
    """Returns a record in the form of `version`, by one migration after another.

    Raises:
      CheckpointError: the record is newer than this code, or so old that no migration leads on.
    """
    found = record.get("schema_version")
    if not isinstance(found, int):
        raise CheckpointError(f"{file} has schema_version {found!r}, expected a number: make it anew")
    if found > version:
        raise CheckpointError(
            f"{file} has schema_version {found}, this loom_jax knows up to {version}: upgrade loom_jax"
        )
    while found < version:
        if found not in migrations:
            raise CheckpointError(f"{file} has schema_version {found}, which cannot be migrated: make it anew")
        record = migrations[found](record)
        found += 1
    return {**record, "schema_version": version}


def restore_component(
    folder: ModelFolder,
    component: str,
    abstract: Any,
    *,
    mesh: Mesh | None = None,
    preset: str = "single",
    dtype: Any = None,
) -> Any:
    """Restores `model` or `vae` onto a mesh.

    Args:
      abstract: shapes of its parameters, as nnx.State or nested dicts.
      mesh, preset: where they go; on the first device by default, on `make_mesh(preset)` where only a preset is given.
      dtype: of the parameters; as stored by default.

    Returns:
      A tree like `abstract` of jax arrays.

    Raises:
      CheckpointError: see `restore_params`.
      ConfigError: see `shardings_for`.
    """
    shardings = None
    if mesh is not None or preset != "single":
        shardings = shardings_for(abstract, make_mesh(preset) if mesh is None else mesh, preset)
    return restore_params(folder.component(component), abstract, shardings, dtype=dtype)


def load_module(
    folder: ModelFolder,
    component: str,
    build: Callable[[LoomConfig], nnx.Module],
    *,
    mesh: Mesh | None = None,
    preset: str = "single",
    dtype: Any = None,
) -> Any:
    """Returns `build(folder.config)` with the stored weights; `build` itself allocates nothing.

    Arguments and errors as in `restore_component`.
    """
    module = nnx.eval_shape(lambda: build(folder.config))
    graph, abstract = nnx.split(module, nnx.Param)
    return nnx.merge(graph, restore_component(folder, component, abstract, mesh=mesh, preset=preset, dtype=dtype))


@contextlib.contextmanager
def new_folder(path: Path, *, overwrite: bool = False, mark: str = RECORD) -> Iterator[Path]:
    """Yields a temporary folder beside `path` that becomes `path` at the end, or vanishes on any error.

    Args:
      overwrite: whether a folder at `path` may be replaced; only one that is empty or holds a file `mark`.

    Raises:
      CheckpointError: there is something at `path` that may not be replaced, or the folder cannot be made.
    """
    refuse_address(path, "a new folder")
    path = path.absolute()
    if path.exists() or path.is_symlink():
        if not overwrite:
            raise CheckpointError(f"{path} is already there: choose another name, or give --overwrite to replace it")
        if not path.is_dir() or (any(path.iterdir()) and not (path / mark).exists()):
            raise CheckpointError(f"{path} holds no {mark}, so it is not replaced: choose another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise CheckpointError(f"{path.parent} cannot be written to ({error.strerror}): choose another place") from error
    try:
        temporary.chmod(0o755)
        yield temporary
        _put_in_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def shared_folder(path: Path, *, overwrite: bool = False, mark: str = RECORD) -> Iterator[Path]:
    """`new_folder` for all processes of a job: yields the same folder in all; process 0 makes it and puts it in place.

    Raises:
      CheckpointError: as `new_folder`, or a process does not see the folder.
      ElsewhereError: in the other processes.
    """
    with contextlib.ExitStack() as stack:
        made = None
        with together():
            if jax.process_index() == 0:
                made = stack.enter_context(new_folder(path, overwrite=overwrite, mark=mark))
        folder = Path(gather(str(made))[0])
        with together():
            if not folder.is_dir():
                raise CheckpointError(
                    f"process {jax.process_index()} does not see {folder.parent}: choose a folder on a disk that all "
                    "machines of the job share"
                )
        yield folder
        with together():
            stack.close()


def _put_in_place(temporary: Path, path: Path) -> None:
    """Renames `temporary` to `path`; what stood there is moved aside first, so that there is never half of either."""
    if not path.exists():
        temporary.rename(path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    path.rename(aside / "old")
    temporary.rename(path)
    shutil.rmtree(aside, ignore_errors=True)
