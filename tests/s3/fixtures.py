"""Pytest fixtures for a real S3 server: import both in a conftest.py.

`s3_server` is one server for the whole run, shared by the workers of pytest-xdist. With ACTCACHE_TEST_S3 (the JSON that
`python tests/s3/server.py start` prints) it is that one, with ACTCACHE_TEST_S3_INSTALL=1 missing packages are installed.
Without a server the tests are skipped; in CI (CI=true) they fail.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import server
from .server import Server


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running S3 server."""
    if given := os.environ.get("ACTCACHE_TEST_S3"):
        yield Server.from_json(given)
        return
    base = tmp_path_factory.getbasetemp()
    with contextlib.ExitStack() as stack:
        try:
            found = stack.enter_context(_shared(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base))
        except server.ServerError as error:
            if os.environ.get("CI") == "true":
                pytest.fail(f"no S3 server: {error}")
            pytest.skip(f"no S3 server: {error}")
        yield found


@contextlib.contextmanager
def _shared(folder: Path) -> Iterator[Server]:
    """The server of this folder: the first process that wants it starts it, the last that had it stops it.

    Each holds a shared lock on "s3.users" as long as it uses the server (so one that dies lets go of it too);
    who gets that lock alone is the only one. "s3.lock" guards the changes.
    """
    state = folder / "s3.json"
    with (folder / "s3.users").open("a") as users:
        with _locked(folder):
            if _alone(users.fileno()):
                # whatever the state says, nobody looks after that server
                _end(state)
                _begin(state)
            found = Server.from_json(state.read_text())
            fcntl.flock(users, fcntl.LOCK_SH)
        try:
            yield found
        finally:
            with _locked(folder):
                if _alone(users.fileno()):
                    _end(state)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "s3.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _alone(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _begin(state: Path) -> None:
    if os.environ.get("ACTCACHE_TEST_S3_INSTALL") == "1":
        server.install()
    home = Path(tempfile.mkdtemp(prefix="ac-s3-"))
    try:
        state.write_text(server.start(home, server.free_port()).to_json())
    except BaseException:
        shutil.rmtree(home, ignore_errors=True)
        raise


def _end(state: Path) -> None:
    if state.exists():
        home = Server.from_json(state.read_text()).home
        server.stop(home)
        shutil.rmtree(home, ignore_errors=True)
        state.unlink()


@pytest.fixture
def s3(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty folder in the server's bucket, with the environment set for its writer, and for it alone."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name, value in {
        "AWS_ACCESS_KEY_ID": s3_server.access_key,
        "AWS_SECRET_ACCESS_KEY": s3_server.secret_key,
        "AWS_ENDPOINT_URL": s3_server.endpoint,
        "AWS_REGION": s3_server.region,
        "AWS_DEFAULT_REGION": s3_server.region,
        "AWS_ALLOW_HTTP": "true",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, server.HOST, prepend=",")
    return f"s3://{s3_server.bucket}/{uuid.uuid4()}/"
