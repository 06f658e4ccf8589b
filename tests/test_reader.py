"""The reader: any rows in any order, few requests, every fault named."""

from __future__ import annotations

import os
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import actcache as ac
from actcache.cache.encoder import encode_shard
from actcache.cache.reader import ArrayReader
from actcache.cache.rows import JoinedRows
from actcache.cache.store import Store, open_store
from actcache.cache.threads import ahead, spread
from actcache.schemas.array import ArrayLayout

WIDTH = 24


class Counted:
    """A store that counts its requests. `part` and `gap` are what it says of itself."""

    def __init__(self, store: Store, part: int | None = None, gap: int = 0) -> None:
        self._store = store
        self.location = store.location
        self.part_bytes = part
        self.gap_bytes = gap
        self.requests: list[tuple[str, str, int]] = []

    def __getattr__(self, name: str):
        method = getattr(self._store, name)
        if name not in ("get", "get_range", "get_end", "get_tail"):
            return method

        def counted(key, *args):
            found = method(key, *args)
            self.requests.append((name, key, len(found[0] if name == "get_tail" else found)))
            return found

        return counted


def stored(rows: np.ndarray, chunk: int, per_shard: int) -> tuple[Store, ArrayLayout]:
    """An array in memory, as a build stores it."""
    layout = ArrayLayout("a", rows.shape, rows.dtype.name, chunk * per_shard, chunk, ("token", "d_model"))
    store = open_store(f"memory://{uuid.uuid4().hex}")
    with ThreadPoolExecutor(1) as pool:
        for shard in range(layout.n_shards):
            low, high = layout.shard_range(shard)
            store.put_new(layout.shard_key(shard), bytes(encode_shard(layout, rows[low:high], pool)))
    return store, layout


def some_rows(n: int, dtype: str) -> np.ndarray:
    values = np.random.default_rng(n).standard_normal((n, WIDTH)).astype(np.float32)
    return values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


@given(
    n=st.integers(1, 120),
    chunk=st.integers(1, 9),
    per_shard=st.integers(1, 6),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    part=st.sampled_from([None, 200, 1000, 1 << 20]),
    gap=st.sampled_from([0, 300, 1 << 20]),
    data=st.data(),
)
def test_any_rows_in_any_order(
    n: int, chunk: int, per_shard: int, dtype: str, part: int | None, gap: int, data: st.DataObject
):
    rows = some_rows(n, dtype)
    store, layout = stored(rows, chunk, per_shard)
    reader = ArrayReader(Counted(store, part, gap), layout)  # type: ignore[arg-type]
    for _ in range(3):
        low, high = sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n))))
        assert reader.read(low, high).tobytes() == rows[low:high].tobytes()
        assert np.array_equal(reader.read(low, high, np.dtype("f4")), rows[low:high].astype(np.float32))
        index = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=30)), np.int64)
        assert reader.take(index).tobytes() == rows[index].tobytes()
        at = np.random.default_rng(0).permutation(len(index) + 5)[: len(index)]
        out = np.full((len(index) + 5, WIDTH), -7, np.float32)
        reader.scatter(index, out, at)
        assert np.array_equal(out[at], rows[index].astype(np.float32))
        assert (np.delete(out, at, axis=0) == -7).all()
    joined = JoinedRows([lambda: reader, lambda: reader], [n, n], (WIDTH,), reader.dtype)
    both, index = np.concatenate([rows, rows]), np.array([n, 2 * n - 1, 0, n - 1, n])
    assert joined.take(index).tobytes() == both[index].tobytes()
    assert joined.read(n // 2, n + n // 2).tobytes() == both[n // 2 : n + n // 2].tobytes()


def test_one_token_is_one_range_request_once_the_index_is_known():
    rows = some_rows(4000, "float32")
    store, layout = stored(rows, 50, 20)
    counted = Counted(store, 1 << 20)
    reader = ArrayReader(counted, layout)  # type: ignore[arg-type]
    for shard in range(4):
        reader.take(np.array([shard * 1000]))
    assert [name for name, _, _ in counted.requests] == ["get_end", "get_range"] * 4
    counted.requests.clear()
    rng = np.random.default_rng(0)
    for token in rng.integers(0, 4000, 30).tolist():
        assert np.array_equal(reader.read(token, token + 1)[0], rows[token])
    assert [name for name, _, _ in counted.requests] == ["get_range"] * 30
    assert max(size for _, _, size in counted.requests) < 50 * WIDTH * 4 + 100


def test_many_tokens_coalesce_and_no_chunk_is_fetched_twice():
    rows = some_rows(4000, "float32")
    store, layout = stored(rows, 50, 20)
    total = sum(store.list().values())
    for gap, most in ((0, 80), (20_000, 16)):
        counted = Counted(store, 1 << 20, gap)
        reader = ArrayReader(counted, layout)  # type: ignore[arg-type]
        index = np.random.default_rng(1).integers(0, 4000, 60)
        assert np.array_equal(reader.take(index), rows[index])
        assert sum(name != "get_end" for name, _, _ in counted.requests) <= most
        assert sum(size for _, _, size in counted.requests) <= total


def test_a_whole_shard_comes_in_parts_and_none_is_asked_for_twice():
    rows = some_rows(1000, "float32")
    store, layout = stored(rows, 50, 20)
    size = store.size("a/c/0/0")
    counted = Counted(store, size // 4)
    assert np.array_equal(ArrayReader(counted, layout).read(), rows)  # type: ignore[arg-type]
    names = [name for name, _, _ in counted.requests]
    assert names[0] == "get_tail"
    assert names[1:] == ["get_range"] * (len(names) - 1)
    assert len(names) <= 6
    assert sum(got for _, _, got in counted.requests) < 1.1 * size
    small = Counted(store, 2 * size)
    assert np.array_equal(ArrayReader(small, layout).read(), rows)  # type: ignore[arg-type]
    assert [name for name, _, _ in small.requests] == ["get_tail"], "one that fits into a part is one GET"


@pytest.mark.parametrize("part", [None, 500, 1 << 20])
def test_missing_and_cut_shards_are_told_by_name(part: int | None):
    rows = some_rows(300, "float32")
    store, layout = stored(rows, 10, 10)
    whole = bytes(store.get("a/c/1/0"))
    for broken in (None, b"", whole[:100], whole[:-1], whole[100:], bytes(len(whole))):
        store.delete("a/c/1/0")
        if broken is not None:
            store.put_new("a/c/1/0", broken)
        reader = ArrayReader(Counted(store, part), layout)  # type: ignore[arg-type]
        for ask in (reader.read, partial(reader.take, np.array([0, 150, 299])), partial(reader.read, 150, 151)):
            with pytest.raises(ac.Corrupt, match="a/c/1/0"):
                ask()
        assert np.array_equal(reader.read(0, 100), rows[:100]), "the others are read all the same"


def test_rows_that_are_not_there():
    store, layout = stored(some_rows(30, "float32"), 10, 2)
    reader = ArrayReader(store, layout)
    for wrong in ([30], [-1], [[1]]):
        with pytest.raises(IndexError, match="a: "):
            reader.take(np.array(wrong))
    with pytest.raises(IndexError, match="rows 3:31 of 30"):
        reader.read(3, 31)


def test_ahead_keeps_order_and_its_bound():
    lock, under_way, most = threading.Lock(), 0, 0

    def make(item: int) -> int:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        return item

    taken = []
    for item in ahead(make, iter(range(50)), lambda item: 3, 10):
        with lock:
            under_way -= 1
        taken.append(item)
    assert taken == list(range(50))
    assert most <= 4

    def fail(item: int) -> int:
        if item == 7:
            raise ac.StoreError("no")
        return item

    with pytest.raises(ac.StoreError, match="no"):
        list(ahead(fail, range(20), lambda _: 1, 5))


def test_spread_does_everything_once_and_raises_what_failed():
    done: list[int] = []
    spread(done.append, range(100))
    assert sorted(done) == list(range(100))

    def fail(item: int) -> None:
        if item == 3:
            raise ac.Corrupt("here")

    with pytest.raises(ac.Corrupt, match="here"):
        spread(fail, range(50))
    spread(done.append, [])


def test_a_fork_of_a_process_with_connections_is_told_so_instead_of_waiting_for_ever():
    store, layout = stored(some_rows(30, "float32"), 10, 2)
    assert len(ArrayReader(store, layout).read()) == 30
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            ArrayReader(store, layout).read()
        except ac.StoreError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    said = os.read(read, 1000).decode()
    os.close(read)
    os.waitpid(child, 0)
    assert "forked" in said
    assert "forkserver" in said
