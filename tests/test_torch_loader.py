"""The torch dataset: workers of every kind, states, tensors without copies."""

from __future__ import annotations

import json
import pickle
from traceback import clear_frames
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import actcache as ac
from actcache.clients.loader import Batches
from actcache.clients.token_index import Span, TokenIndex
from actcache.clients.torch_dataset import TorchBatches, distributed_rank, torch_batches
from tests.array_source import ArraySource, cut, numbered
from tests.test_loader import stored

torch = pytest.importorskip("torch")
from torch.utils.data import DataLoader, IterableDataset  # noqa: E402  # skipped where there is no torch

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # from Python 3.12 on

Kept = list[dict[str, Any]]


def make(n: int = 1000, index: TokenIndex | None = None, **arguments: Any) -> TorchBatches:
    arguments = {"size": 64, "shuffle": 0, "buffer": 200} | arguments
    return torch_batches(Batches({"x": numbered(n, 3, cut(n, 70))}, index or Span(0, n), **arguments))


def tokens(batches: Kept) -> list[int]:
    return [token for batch in batches for token in batch["token"].tolist()]


def same(one: Kept, other: Kept) -> bool:
    return len(one) == len(other) and all(
        list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(one, other, strict=True)
    )


def begun(batches: Any, count: int) -> tuple[Kept, Any]:
    """So many batches, and the state in which whatever gives them stands then."""
    running = iter(batches)
    return [next(running) for _ in range(count)], batches.state_dict()


def through(loader: DataLoader) -> Kept:
    """What a loader gives. When it fails, its workers end before anybody looks at the error, which would keep them waiting."""
    try:
        return list(loader)
    except Exception as error:
        clear_frames(error.__traceback__)
        raise


def test_tensors_are_what_numpy_has():
    dataset = make()
    assert isinstance(dataset, IterableDataset)
    for batch, array in zip(dataset, dataset.batches, strict=True):
        assert torch.equal(batch["x"], torch.from_numpy(array["x"]))
        assert (batch["x"].dtype, batch["token"].dtype) == (torch.float32, torch.int64)
    assert len(list(dataset)) == len(dataset) == 16


def test_stored_dtypes():
    values = np.random.default_rng(0).normal(size=(100, 4))
    for dtype, expected in ((ml_dtypes.bfloat16, torch.bfloat16), (np.float16, torch.float16)):
        source = ArraySource("x", values.astype(dtype), (100,))
        (batch,) = torch_batches(Batches({"x": source}, Span(0, 100), 100, dtype="stored"))
        assert batch["x"].dtype == expected
        assert np.array_equal(batch["x"].double().numpy(), source.values.astype(np.float64))


def test_tensors_that_are_kept_stay_what_they_are():
    kept = [batch["x"][3:] for number, batch in enumerate(make(3000)) if number % 2]
    for rows in kept:
        assert (rows[:, 1] - rows[:, 0] == 1).all()
        assert len(rows[:, 0].unique()) == len(rows)


@pytest.mark.parametrize("context", [None, "fork", "forkserver", "spawn"])
def test_workers_together_give_every_token_once(context: str | None):
    dataset = make(3000)
    assert list(dataset)  # threads of this process are of no use to a forked one
    running = iter(dataset)
    next(running)
    workers = 0 if context is None else 2
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context=context)
    found = list(loader)
    assert sorted(tokens(found)) == list(range(3000))
    assert len(found) == len(loader) == len(dataset)
    for batch in found:
        assert torch.equal(batch["x"][:, 0], 100.0 * batch["token"])
    assert [len(batch["token"]) for batch in found].count(64) == len(found) - 1, "one short batch in all"
    assert same(list(loader), found)


@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_workers_read_a_local_dataset(built_by_dtype: dict[str, str], context: str):
    (source,) = stored(built_by_dtype["bfloat16"], ["blocks.1.hook_resid_post"])
    whole = source.open().read()  # a forked worker must not use what is open here
    n = len(whole)
    dataset = torch_batches(Batches({"x": source}, Span(0, n), 100, shuffle=0, buffer=300, dtype="stored"))
    assert list(dataset)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=context)
    found = list(loader)
    assert sorted(tokens(found)) == list(range(n))
    for batch in found:
        assert np.array_equal(batch["x"].float().numpy(), whole[batch["token"].numpy()].astype(np.float32))


def test_workers_read_s3(s3: str, spec: ac.Spec):
    url = s3 + "loader"
    ac.build(spec.model_copy(update={"sites": "resid", "max_tokens": 400}), url)
    (source,) = stored(url, ["blocks.1.hook_resid_post"])
    dataset = torch_batches(Batches({"x": source}, Span(0, 400), 50, shuffle=0, buffer=100))
    here = list(dataset)
    assert sorted(tokens(here)) == list(range(400))
    found = list(DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="spawn"))
    rows = {token: row for batch in here for token, row in zip(batch["token"].tolist(), batch["x"], strict=True)}
    assert sorted(tokens(found)) == list(range(400))
    for batch in found:
        assert all(
            torch.equal(row, rows[token]) for token, row in zip(batch["token"].tolist(), batch["x"], strict=True)
        )
    with pytest.raises(ac.StoreError):
        through(DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="fork"))


def test_what_a_worker_raises_tells_what_it_is():
    dataset = make()
    source = dataset.batches.fields[0].source
    assert isinstance(source, ArraySource)
    source.failure, source.fails_at = ac.Corrupt("broken"), 500
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(ac.Corrupt, match="broken"):
        through(loader)


def test_it_travels():
    dataset = make()
    whole = list(dataset)
    data = pickle.dumps(dataset)
    assert len(data) < 100_000, "memory of batches does not travel"
    assert same(list(pickle.loads(data)), whole)
    _, state = begun(dataset, 1)
    again = make()
    again.load_state_dict(state)
    assert same(list(pickle.loads(pickle.dumps(again))), whole[1:])


def test_ranks_with_workers_and_dropped_batches():
    found: list[int] = []
    for rank in range(3):
        dataset = make(2000, rank=rank, world_size=3, drop_last=True)
        batches = list(DataLoader(dataset, batch_size=None, num_workers=2))
        assert [len(batch["token"]) for batch in batches] == [64] * (2000 // 3 // 64) == [64] * len(dataset)
        found += tokens(batches)
    assert len(set(found)) == len(found)


def test_a_state_goes_on_and_counts_what_was_given_alone():
    whole = list(make())
    for device in (None, "cpu"):
        for done in (0, 1, 7, 16):
            dataset = make()
            dataset.device = device
            before, state = begun(dataset, done)
            state = json.loads(json.dumps(state))
            assert state["batches"] == done
            again = make(epoch=3)
            again.device = device
            again.load_state_dict(state)
            assert same(before + list(again), whole)
            assert same(list(again), whole)


def test_a_state_of_one_process_is_none_of_workers():
    dataset = make()
    _, state = begun(dataset, 1)
    dataset.load_state_dict(state)
    with pytest.raises(ac.InvalidInput, match="of worker 0 of 1, and this is worker 0 of 2"):
        through(DataLoader(dataset, batch_size=None, num_workers=2))


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("workers", [0, 2])
def test_torchdata_resumes_it(workers: int):
    loaders = pytest.importorskip("torchdata.stateful_dataloader")

    def loader() -> Any:
        return loaders.StatefulDataLoader(make(3000), batch_size=None, num_workers=workers, snapshot_every_n_steps=1)

    whole = list(loader())
    assert sorted(tokens(whole)) == list(range(3000))
    for done in (1, 5, 31):
        before, state = begun(loader(), done)
        again = loader()
        again.load_state_dict(pickle.loads(pickle.dumps(state)))
        assert same(before + list(again), whole)
        assert same(list(again), whole)


def test_epochs():
    dataset = make()
    first = list(dataset)
    dataset.set_epoch(1)
    second = list(dataset)
    assert not same(first, second)
    assert sorted(tokens(first)) == sorted(tokens(second))
    assert dataset.state_dict()["epoch"] == 1
    assert "epoch 1" in repr(dataset)


@pytest.mark.parametrize("context", ["fork", "forkserver", "spawn"])
def test_workers_that_persist_hear_of_the_epoch(context: str):
    dataset = pickle.loads(pickle.dumps(make()))
    loader = DataLoader(
        dataset, batch_size=None, num_workers=2, persistent_workers=True, multiprocessing_context=context
    )
    for epoch in (0, 1, 1, 7, 0):
        dataset.set_epoch(epoch)
        anew = DataLoader(make(epoch=epoch), batch_size=None, num_workers=2, multiprocessing_context="fork")
        assert same(list(loader), list(anew)), epoch


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_workers_that_persist_keep_the_epoch_of_their_state():
    loaders = pytest.importorskip("torchdata.stateful_dataloader")

    def loader(dataset: TorchBatches) -> Any:
        return loaders.StatefulDataLoader(
            dataset, batch_size=None, num_workers=2, persistent_workers=True, snapshot_every_n_steps=1
        )

    epochs = [list(loader(make(epoch=epoch))) for epoch in range(5)]
    before, state = begun(loader(make(epoch=3)), 5)
    dataset = make()
    again = loader(dataset)
    again.load_state_dict(state)
    assert same(before + list(again), epochs[3])
    dataset.set_epoch(4)
    assert same(list(again), epochs[4])


def test_copies_of_a_dataset_have_epochs_of_their_own():
    dataset = make()
    other = pickle.loads(pickle.dumps(dataset))
    dataset.set_epoch(2)
    with_workers = DataLoader(other, batch_size=None, num_workers=2)
    assert same(list(other), list(make()))
    assert sorted(tokens(list(with_workers))) == list(range(1000))
    assert (other.state_dict()["epoch"], dataset.state_dict()["epoch"]) == (0, 2)


def test_pinned_memory_and_devices():
    moved = make()
    moved.device = "cpu"
    assert same(list(moved), list(make()))
    if not torch.cuda.is_available():
        with pytest.raises(ac.InvalidInput, match="CUDA"):
            torch_batches(make().batches, pin_memory=True)
    with pytest.raises(ac.InvalidInput, match="worker"):
        through(DataLoader(moved, batch_size=None, num_workers=1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_gets_what_numpy_has():
    whole = list(make(20_000, size=512, buffer=4000))
    pinned = torch_batches(make(20_000, size=512, buffer=4000).batches, pin_memory=True)
    for batch, expected in zip(pinned, whole, strict=True):
        assert batch["x"].is_pinned()
        assert torch.equal(batch["x"], expected["x"])
    moved = torch_batches(make(20_000, size=512, buffer=4000).batches, device="cuda")
    kept = [{name: tensor.clone() for name, tensor in batch.items()} for batch in moved]
    assert {tensor.device.type for batch in kept for tensor in batch.values()} == {"cuda"}
    assert same([{name: tensor.cpu() for name, tensor in batch.items()} for batch in kept], whole)


def test_ranks_come_from_torch_distributed(tmp_path: Any):
    import torch.distributed as dist

    assert distributed_rank() == (0, 1)
    assert distributed_rank(1, 4) == (1, 4)
    with pytest.raises(ac.InvalidInput, match="both or neither"):
        distributed_rank(rank=1)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        assert distributed_rank() == (0, 1)
    finally:
        dist.destroy_process_group()
