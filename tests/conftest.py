"""Shared fixtures: a tiny random model, a corpus, and datasets built from them once.

Nothing here imports torch before a test asks for a model: some tests run where there is none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import dask
import pytest
from hypothesis import HealthCheck, settings

import actcache as ac
from actcache.cache.local_store import LocalStore

pytest_plugins = ["tests.s3.fixtures"]

settings.register_profile("default", max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("nightly", max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

BLOCK = 160


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hashes are remembered, and builds are logged, in folders of this run's own."""
    names = ("XDG_CACHE_HOME", "XDG_STATE_HOME")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ |= {name: str(tmp_path_factory.mktemp(name)) for name in names}
    yield
    for name, value in before.items():
        del os.environ[name]
        if value is not None:
            os.environ[name] = value


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 in float32: 3 layers × 32, context 32."""
    from tests.models import save_gpt2

    return save_gpt2(tmp_path_factory.mktemp("model") / "random-gpt2")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve text files, one of them empty, as a glob."""
    from tests.models import write_corpus

    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def spec(model: Path, corpus: str) -> ac.Spec:
    """A spec that crosses blocks, with every output."""
    return ac.Spec(model=str(model), corpus=(corpus,), block_tokens=BLOCK, batch_size=4, outputs=("loss",), sites="all")


@pytest.fixture(scope="session")
def built(spec: ac.Spec, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sealed float32 dataset. Tests must not change it."""
    url = str(tmp_path_factory.mktemp("built") / "float32.zarr")
    ac.build(spec, url)
    return url


@pytest.fixture(scope="session")
def built_by_dtype(spec: ac.Spec, built: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A sealed dataset of each stored dtype. Tests must not change them."""
    urls = {"float32": built}
    for dtype in ("float16", "bfloat16"):
        urls[dtype] = str(tmp_path_factory.mktemp("built") / f"{dtype}.zarr")
        ac.build(spec.model_copy(update={"dtype": dtype}), urls[dtype])
    return urls


@pytest.fixture
def no_compute() -> Iterator[None]:
    """Fails on any compute."""

    def refuse(*args, **kwargs):
        raise AssertionError("something was computed")

    with dask.config.set(scheduler=refuse):
        yield


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Key and length of everything that is read of local stores from here on."""
    found: list[tuple[str, int]] = []

    def counted(method):
        def read(store, key, *args):
            data = method(store, key, *args)
            found.append((key, len(data)))
            return data

        return read

    for name in ("get", "get_range", "get_end"):
        monkeypatch.setattr(LocalStore, name, counted(getattr(LocalStore, name)))
    return found
