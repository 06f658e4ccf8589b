"""What a build says is its limit: the store where that is slow, the model where that is, and nothing before anything ran."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn

import actcache as ac
from actcache.cache.local_store import LocalStore
from actcache.jobs.progress import Progress, Silent

SLEEP = 0.05


class Watcher(Silent):
    """Keeps what a build tells of its blocks."""

    def __init__(self) -> None:
        self.states: list[Progress] = []

    def progress(self, state: Progress) -> None:
        if state.stage == "blocks":
            self.states.append(state)


class Slow(nn.Module):
    """A linear layer that takes its time."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 64)
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return self.layer(x)


def spec(seconds: float) -> ac.Spec:
    items = torch.arange(64 * 64 * 4, dtype=torch.float32).reshape(-1, 64).sin()
    model = ac.Capturable(name="slow", module=Slow(seconds), inputs=items, sites={"out": "layer"})
    return ac.Spec(model=model, sites="all", block_tokens=32, batch_size=8)


def built(spec: ac.Spec, url: Path) -> list[Progress]:
    watcher = Watcher()
    ac.build(spec, url, reporter=watcher)
    return watcher.states


def test_a_slow_store_is_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One that takes 0.2 s for an object and 20 MB a second, as one far away does."""
    put_new = LocalStore.put_new

    def slowly(store: LocalStore, key: str, data: bytes) -> bool:
        if "/c/" in key:  # the records should wait too, but a test should end
            time.sleep(0.2 + len(data) / 20e6)
        return put_new(store, key, data)

    monkeypatch.setattr(LocalStore, "put_new", slowly)
    states = built(spec(0.0), tmp_path / "ds")
    assert states[0].usage.limit is None, "nothing ran yet"
    assert states[-1].usage.limit == "upload"
    assert states[-1].usage.shares["upload"] > 0.8
    assert states[-1].usage.shares["forward"] < 0.3


def test_a_slow_model_is_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.fsync", lambda _: None)  # whatever this machine's disk does, the store is fast
    states = built(spec(SLEEP), tmp_path / "ds")
    assert states[-1].usage.limit == "forward"
    assert states[-1].usage.shares["forward"] > 0.6
    asleep = SLEEP * 8 * 4  # of 8 blocks of 4 batches
    assert states[-1].usage.busy["forward"] >= 0.99 * asleep
    assert states[-1].usage.seconds >= asleep


def test_the_store_works_while_the_model_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Both take as long: were they to wait for each other, each would be busy for half of the time."""
    put_new = LocalStore.put_new

    def slowly(store: LocalStore, key: str, data: bytes) -> bool:
        if key.startswith("out/c/"):
            time.sleep(SLEEP * 4)
        return put_new(store, key, data)

    monkeypatch.setattr(LocalStore, "put_new", slowly)
    monkeypatch.setattr("os.fsync", lambda _: None)
    shares = built(spec(SLEEP), tmp_path / "ds")[-1].usage.shares
    assert shares["forward"] + shares["upload"] > 1.2


def test_nothing_is_said_of_a_build_that_finds_its_blocks_stored(tmp_path: Path):
    built(spec(0.0), tmp_path / "ds")
    (tmp_path / "ds/zarr.json").unlink()
    states = built(spec(0.0), tmp_path / "ds")
    assert states[-1].usage.limit is None
    assert (states[-1].blocks, states[-1].bytes_written) == (states[-1].blocks_total, 0)
