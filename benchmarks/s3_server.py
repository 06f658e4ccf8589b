"""The benchmarks' own S3 server, the one of the tests: Ceph RADOS Gateway on loopback."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import s3fs
from zarr.core.sync import sync
from zarr.storage import FsspecStore

from tests.s3 import server


@contextmanager
def s3_url() -> Iterator[str | None]:
    """The URL of an empty folder of a server that lives as long as the `with` block; None, and a line that says why, without one."""
    if (reason := server.available()) is not None:
        print(f"  S3: skipped, {reason}")
        yield None
        return
    home = Path(tempfile.mkdtemp(prefix="actcache-benchmarks-s3-"))
    before = dict(os.environ)
    try:
        try:
            running = server.start(home, server.free_port())
        except server.ServerError as error:
            print(f"  S3: skipped, {str(error).splitlines()[0]}")
            yield None
            return
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            del os.environ[name]
        os.environ |= {
            "AWS_ACCESS_KEY_ID": running.access_key,
            "AWS_SECRET_ACCESS_KEY": running.secret_key,
            "AWS_ENDPOINT_URL": running.endpoint,
            "AWS_REGION": running.region,
            "AWS_DEFAULT_REGION": running.region,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": server.HOST,
            "no_proxy": server.HOST,
        }
        yield f"s3://{running.bucket}/{uuid.uuid4().hex}"
    finally:
        os.environ.clear()
        os.environ |= before
        server.stop(home)
        shutil.rmtree(home, ignore_errors=True)


@contextmanager
def fsspec_store(url: str) -> Iterator[FsspecStore]:
    """A folder of the server as zarr-python reads it through s3fs, for the length of a `with` block."""
    system = s3fs.S3FileSystem(asynchronous=True, use_listings_cache=False, skip_instance_cache=True)
    try:
        yield FsspecStore(system, path=url.removeprefix("s3://"), read_only=True)
    finally:
        sync(_close(system))


async def _close(system: Any) -> None:
    session = await system.set_session()
    await session.close()
