"""Converted folders in a bucket, gs:// or s3://: read in place by tensorstore, with its own drivers and credentials.

AWS_ENDPOINT_URL in the environment names another server than Amazon's for s3://.
"""

from __future__ import annotations

import functools
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import tensorstore

from loom_jax.core import CheckpointError

CACHE_BYTES = 2**28
"""Of what was read last is kept: devices that hold the same part of a leaf ask for it one after another."""

_ADDRESS = re.compile(r"(gs|s3):/+([^/]+)/*(.*)")


def address_of(path: Path | str) -> str | None:
    """Returns `gs://BUCKET/FOLDER` or `s3://BUCKET/FOLDER`; None for a path on this machine.

    A pathlib.Path of an address has one slash where the address has two: it counts as well.
    """
    match = _ADDRESS.fullmatch(str(path))
    return f"{match[1]}://{match[2]}/{match[3]}".rstrip("/") if match else None


def refuse_address(path: Path | str, what: str) -> None:
    """Checks that a path is one of this machine.

    Raises:
      CheckpointError: it is in a bucket; `what` names the thing that cannot be there.
    """
    if (address := address_of(path)) is not None:
        raise CheckpointError(
            f"{what} cannot be in a bucket ({address}): give a folder, for instance of the bucket as mounted by "
            "gcsfuse or mount-s3; what is read directly from a bucket are converted folders"
        )


def storage(address: str) -> dict[str, Any]:
    """Returns where tensorstore finds what lies below an address."""
    match = _ADDRESS.fullmatch(address)
    assert match is not None
    scheme, bucket, folder = match.groups()
    spec = {"driver": {"gs": "gcs", "s3": "s3"}[scheme], "bucket": bucket, "path": f"{folder}/" if folder else ""}
    if scheme == "s3" and "AWS_ENDPOINT_URL" in os.environ:
        region = os.environ.get("AWS_REGION", "us-east-1")
        spec |= {"endpoint": os.environ["AWS_ENDPOINT_URL"], "aws_region": region}
    return spec


@functools.cache
def reading() -> tensorstore.Context:
    """Options for reading from buckets: one object, so that credentials are asked for once, and parts read once."""
    return tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})


def read_file(address: str, name: str) -> bytes | None:
    """Returns the content of a file below an address; None where there is none.

    Raises:
      CheckpointError: the bucket cannot be read.
    """
    try:
        found = tensorstore.KvStore.open(storage(address), context=reading()).result().read(name).result()
    except (OSError, ValueError, RuntimeError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"{address} cannot be read ({said}): check the address and the credentials") from error
    return found.value if found.state == "value" else None


def fetch_files(address: str, names: tuple[str, ...]) -> Path:
    """Copies files into a folder of this machine, which vanishes with the process.

    Raises:
      CheckpointError: one is not there, or the bucket cannot be read.
    """
    folder = Path(_scratch(address).name)
    for name in names:
        content = read_file(address, name)
        if content is None:
            raise CheckpointError(f"{address} lacks {name}, which its record lists: copy the whole folder again")
        (folder / Path(name).name).write_bytes(content)
    return folder


@functools.cache
def _scratch(address: str) -> tempfile.TemporaryDirectory[str]:
    """A folder that is kept until the process ends."""
    return tempfile.TemporaryDirectory(prefix="loom_bucket_")
