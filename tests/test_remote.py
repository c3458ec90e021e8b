"""Converted folders in buckets: read through tensorstore's own S3 and Google drivers from a server on this machine."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import jax
import numpy as np
import pytest
from flax import nnx

from loom_jax.checkpoint import (
    address_of,
    read_folder,
    read_params,
    read_run,
    restore_component,
    start_run,
    stored_params,
)
from loom_jax.converters import from_orbax, inspect, to_orbax
from loom_jax.converters.synthetic import write_synthetic_release
from loom_jax.core import CheckpointError
from loom_jax.models import LoomModel
from loom_jax.parallel import flatten_params
from tests.reference import CKPT
from tests.test_converters import SMALL, mixed

GOOGLE = "/storage/v1/b/weights/o/"


class Bucket(BaseHTTPRequestHandler):
    """Answers reads of whole objects and of byte ranges, in the form of S3 and of Google's JSON API."""

    root: Path
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        file = self.root / (path.removeprefix(GOOGLE) if path.startswith(GOOGLE) else path.removeprefix("/weights/"))
        if not file.is_file():
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        content = file.read_bytes()
        asked = self.headers.get("Range")
        if asked is None:
            self.answer(200, content)
            return
        first, last = asked.removeprefix("bytes=").split("-")
        begin = int(first) if first else len(content) - int(last)
        end = int(last) + 1 if first and last else len(content)
        piece = content[begin:end]
        self.answer(206, piece, {"Content-Range": f"bytes {begin}-{begin + len(piece) - 1}/{len(content)}"})

    do_HEAD = do_GET  # noqa: N815

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        fixed = {"ETag": '"1"', "x-goog-generation": "1", "x-amz-bucket-region": "us-east-1"}
        for name, value in {**fixed, **(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bucket")
    write_synthetic_release(root / "release", SMALL, dtype=mixed, tokenizer=CKPT)
    to_orbax(root / "release", root / "models/small")
    return root / "models/small"


@pytest.fixture(params=["s3", "gs"])
def address(
    local: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory
) -> Iterator[str]:
    """Address of `local` in a bucket."""
    empty = tmp_path_factory.mktemp("aws") / "config"
    empty.touch()
    handler = type("Served", (Bucket,), {"root": local.parent.parent})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    url = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_CONFIG_FILE": str(empty),
        "AWS_SHARED_CREDENTIALS_FILE": str(empty),
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
    }.items():
        monkeypatch.setenv(name, value)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"{request.param}://weights/models/small"
    server.shutdown()
    server.server_close()


def test_a_folder_in_a_bucket_is_what_it_is_on_disk(local: Path, address: str, tmp_path: Path, capsys) -> None:
    here, there = read_folder(local), read_folder(Path(address))  # a Path turns the two slashes into one
    assert there.address == address and there.config == here.config and there.provenance == here.provenance
    assert {path.name for path in there.path.iterdir()} == set(here.files)
    for component in ("model", "vae"):
        stored = stored_params(local / component)
        assert stored_params(there.component(component)) == stored
        expected, found = read_params(local / component, stored), read_params(there.component(component), stored)
        assert all(expected[name].tobytes() == found[name].tobytes() for name in stored)
    from_orbax(Path(address), tmp_path / "back")
    for name in ("ema.safetensors", "ae.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (local.parent.parent / "release" / name).read_bytes()
    inspect(Path(address))
    assert "converted model" in capsys.readouterr().out


@pytest.mark.parametrize("preset", ["single", "hsdp"])
def test_weights_go_from_a_bucket_onto_a_mesh(local: Path, address: str, preset: str) -> None:
    abstract = nnx.state(nnx.eval_shape(lambda: LoomModel(SMALL, rngs=nnx.Rngs(0))), nnx.Param)
    loaded = [
        flatten_params(restore_component(read_folder(path), "model", abstract, preset=preset, dtype="float32"))[0]
        for path in (local, address)
    ]
    assert loaded[0].keys() == loaded[1].keys()
    for name, leaf in loaded[0].items():
        assert leaf.sharding == loaded[1][name].sharding and loaded[1][name].dtype == np.float32
        np.testing.assert_array_equal(jax.device_get(leaf), jax.device_get(loaded[1][name]))


def test_what_is_not_in_the_bucket_is_said(address: str) -> None:
    with pytest.raises(CheckpointError, match=f"{address}x is not a converted model: it holds no loom.json"):
        read_folder(f"{address}x")
    with pytest.raises(CheckpointError, match=f"{address}/nothing holds no readable Orbax checkpoint"):
        stored_params(f"{address}/nothing")


@pytest.mark.parametrize("path", ["gs://bucket/runs/a", Path("s3://bucket/runs/a")])
def test_what_cannot_be_in_a_bucket_is_refused(local: Path, path: Path | str, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"a new folder cannot be in a bucket \(..://bucket/runs/a\)"):
        to_orbax(local.parent.parent / "release", Path(path))
    with pytest.raises(CheckpointError, match="a release cannot be in a bucket"):
        to_orbax(Path(path), tmp_path / "out")
    with pytest.raises(CheckpointError, match="the folder of a run cannot be in a bucket"):
        read_run(Path(path))
    with pytest.raises(CheckpointError, match="the folder of a run cannot be in a bucket"):
        start_run(Path(path), SMALL, {}, tmp_path, (), {}, "test")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["runs/a", "/gs/a", "gs", "sgs://bucket/a", "ftp://bucket/a"])
def test_other_paths_are_of_this_machine(path: str) -> None:
    assert address_of(path) is None
