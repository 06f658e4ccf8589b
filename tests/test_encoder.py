"""Rows in any order: a shard's bytes are those of its rows, however and whenever they came, and nothing is made up."""

from __future__ import annotations

import threading
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actcache.cache.encoder import Placement, ShardEncoder, encode_shard
from actcache.cache.shards import decode_shard
from actcache.schemas.array import ArrayLayout

POOL = ThreadPoolExecutor(3)
DTYPES = ("float32", "float16", "bfloat16", "int64", "uint8")


class Eager(Executor):
    """Counts what it is given, and runs it at once."""

    def __init__(self) -> None:
        self.tasks: list[str] = []

    def submit(self, fn, /, *args, **kwargs) -> Future:
        self.tasks.append(fn.__name__)
        future: Future = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future

    @property
    def encoded(self) -> int:
        return len([name for name in self.tasks if name.startswith("_encode")])


@st.composite
def arrived(draw: st.DrawFn) -> tuple[ArrayLayout, np.ndarray, list[np.ndarray]]:
    """A layout, the rows of one shard of it, perhaps its last and shorter one, and an order of them in portions."""
    chunk = draw(st.integers(1, 9))
    chunks = draw(st.integers(1, 5))
    rows = draw(st.integers(1, chunk * chunks))
    width = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    names = ("token", *(f"d{i}" for i in range(len(width))))
    layout = ArrayLayout("a", (rows, *width), draw(st.sampled_from(DTYPES)), chunk * chunks, chunk, names)
    random = np.random.default_rng(draw(st.integers(0, 1 << 16)))
    data = random.bytes(rows * layout.row_bytes)
    values = np.frombuffer(data, layout.numpy_dtype).reshape(layout.shape)
    # from wholly in order to wholly shuffled
    order = np.argsort(np.arange(rows) + random.uniform(0, draw(st.sampled_from([0, 2, 1000])), rows), kind="stable")
    cuts = sorted(draw(st.lists(st.integers(0, rows), max_size=6)))
    return layout, values, np.split(order, cuts)


@given(arrived(), st.data())
def test_rows_in_any_order_and_portions_are_the_very_same_shard(made, data: st.DataObject):
    layout, values, portions = made
    encoder = ShardEncoder(layout, POOL)
    reading, buffers = [], []
    for at in portions:
        rows = values[at]
        if data.draw(st.booleans(), "late"):
            buffer = np.zeros_like(
                rows
            )  # as a device that is still copying into it: the values are there once asked for
            ready = _fills(buffer, rows)
        else:
            buffer, ready = rows.copy(), None
        buffers.append(buffer)
        reading.append(encoder.place(Placement(at), buffer, ready))
    for futures, buffer in zip(reading, buffers, strict=True):
        for future in futures:
            future.result()
        buffer[...] = 0 if buffer.size else buffer  # from here on it may change
    found = encoder.finish()
    assert found == encode_shard(layout, values, POOL)
    assert decode_shard(layout, found, len(values), "a").tobytes() == values.tobytes()


def _fills(buffer: np.ndarray, rows: np.ndarray):
    def ready() -> None:
        buffer[...] = rows

    return ready


@given(arrived())
def test_one_placement_serves_arrays_of_any_chunks(made):
    """It is made once a batch and used for every site and its quantised forms."""
    layout, values, portions = made
    placements = [Placement(at) for at in portions]
    for chunk in (layout.chunk_rows, 1, layout.shard_rows, layout.chunk_rows):
        other = ArrayLayout("b", layout.shape, layout.dtype, layout.shard_rows, chunk, layout.dimensions)
        encoder = ShardEncoder(other, POOL)
        for placement, at in zip(placements, portions, strict=True):
            encoder.place(placement, values[at])
        assert encoder.finish() == encode_shard(other, values, POOL)


@given(arrived())
def test_a_chunk_is_encoded_as_soon_as_it_is_whole(made):
    layout, values, portions = made
    pool = Eager()
    encoder = ShardEncoder(layout, pool)
    there = np.zeros(layout.shard_rows, bool)
    for at in portions:
        encoder.place(Placement(at), values[at])
        there[at] = True
        whole = there.reshape(-1, layout.chunk_rows).all(axis=1).sum()
        assert pool.encoded == whole
    encoder.finish()
    assert pool.encoded == -(-len(values) // layout.chunk_rows)


@given(arrived(), st.data())
def test_a_missing_row_is_never_made_up(made, data: st.DataObject):
    layout, values, portions = made
    gone = data.draw(st.integers(0, len(values) - 1), "gone")
    encoder = ShardEncoder(layout, POOL)
    for at in portions:
        at = at[at != gone]
        encoder.place(Placement(at), values[at])
    if gone == len(values) - 1:
        assert encoder.finish() == encode_shard(layout, values[:-1], POOL), "a shard may end anywhere"
    else:
        with pytest.raises(ValueError, match="missing"):
            encoder.finish()


@given(arrived(), st.data())
def test_a_row_that_comes_twice_is_refused_whatever_else_is_missing(made, data: st.DataObject):
    """Even where the number of rows is right: the other row would hold whatever was in memory."""
    layout, values, portions = made
    order = np.concatenate(portions)
    twice = data.draw(st.integers(0, len(order) - 1), "twice")
    instead = data.draw(st.integers(0, len(order) - 1), "instead")
    changed = order.copy()
    changed[instead] = order[twice]
    if instead == twice:
        changed = np.append(order, order[twice])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(changed)), max_size=3), "cuts"))
    with pytest.raises(ValueError, match=r"twice|missing"):
        _whole(layout, values, np.split(changed, cuts))


def _whole(layout: ArrayLayout, values: np.ndarray, portions: list[np.ndarray]) -> memoryview:
    encoder = ShardEncoder(layout, POOL)
    for at in portions:
        encoder.place(Placement(at), values[at])
    return encoder.finish()


@pytest.mark.parametrize("at", [[6, 7, 8], [8], [100]])
def test_rows_beyond_the_end_are_refused(at: list[int]):
    encoder = ShardEncoder(ArrayLayout("a", (16, 2), "float32", 8, 4, ("token", "d_model")), POOL)
    with pytest.raises(ValueError, match="more rows than the 8 of a shard"):
        encoder.place(Placement(np.array(at)), np.zeros((len(at), 2), np.float32))


def test_rows_before_the_beginning_are_refused():
    encoder = ShardEncoder(ArrayLayout("a", (8, 2), "float32", 8, 4, ("token", "d_model")), POOL)
    with pytest.raises(ValueError, match="before the beginning"):
        encoder.place(Placement(np.array([-1, 0, 1, 2])), np.zeros((4, 2), np.float32))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 2), "float32"), ((3, 3), "float32"), ((3,), "float32"), ((3, 2), "float64")]
)
def test_rows_of_another_shape_or_dtype_are_refused(shape: tuple[int, ...], dtype: str):
    encoder = ShardEncoder(ArrayLayout("a", (8, 2), "float32", 8, 4, ("token", "d_model")), POOL)
    with pytest.raises(ValueError, match=r"not float32 \(3, 2\)"):
        encoder.place(Placement(np.arange(3)), np.zeros(shape, dtype))


def test_nothing_waits_for_a_device_where_rows_are_placed():
    """The thread that places them goes on with the model; the pool waits."""
    layout = ArrayLayout("a", (8, 2), "float32", 8, 4, ("token", "d_model"))
    arrive = threading.Event()
    rows, values = np.zeros((8, 2), np.float32), np.arange(16, dtype=np.float32).reshape(8, 2)
    at = np.array([7, 0, 1, 2, 3, 4, 5, 6])

    def ready() -> None:
        assert arrive.wait(10)
        rows[...] = values[at]

    with ThreadPoolExecutor(2) as pool:
        encoder = ShardEncoder(layout, pool)
        reading = encoder.place(Placement(at), rows, ready)
        assert not any(future.done() for future in reading)
        arrive.set()
        assert encoder.finish() == encode_shard(layout, values, POOL)


def test_a_device_that_fails_fails_the_shard():
    encoder = ShardEncoder(ArrayLayout("a", (8,), "float32", 8, 4, ("token",)), POOL)

    def ready() -> None:
        raise RuntimeError("the device is gone")

    encoder.place(Placement(np.array([1, 0, 2])), np.zeros(3, np.float32), ready)
    with pytest.raises(RuntimeError, match="the device is gone"):
        encoder.finish()
