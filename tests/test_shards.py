"""Shards: any rows come back, equal input gives equal bytes, any flipped byte is noticed, others decode them."""

from __future__ import annotations

import asyncio
import json
import uuid
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given
from hypothesis import strategies as st

from actcache.cache.encoder import ShardEncoder, encode_shard
from actcache.cache.publish import publish_array
from actcache.cache.reader import ArrayReader
from actcache.cache.shards import decode_shard
from actcache.cache.store import open_store
from actcache.schemas.array import ArrayLayout
from actcache.schemas.errors import Corrupt

POOL = ThreadPoolExecutor(2)
DTYPES = ("float32", "float16", "bfloat16", "int32", "int64", "uint8", "int8", "float64")


@st.composite
def arrays(draw: st.DrawFn) -> tuple[ArrayLayout, np.ndarray]:
    """A layout, and rows of any bits at all (NaNs with payloads too)."""
    chunk = draw(st.integers(1, 9))
    shard = chunk * draw(st.integers(1, 5))
    rows = draw(st.integers(1, 40))
    width = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    dtype = draw(st.sampled_from(DTYPES))
    layout = ArrayLayout("a", (rows, *width), dtype, shard, chunk, ("token", *(f"d{i}" for i in range(len(width)))))
    seed = draw(st.integers(0, 1 << 16))
    count = rows * int(np.prod(width, dtype=int))
    data = np.random.default_rng(seed).bytes(count * layout.numpy_dtype.itemsize)
    return layout, np.frombuffer(data, layout.numpy_dtype).reshape(layout.shape)


@given(arrays(), st.lists(st.integers(1, 7), min_size=1, max_size=6))
def test_rows_in_any_portions_come_back_with_the_same_bytes(made: tuple[ArrayLayout, np.ndarray], portions: list[int]):
    layout, rows = made
    for index in range(layout.n_shards):
        low, high = layout.shard_range(index)
        whole = encode_shard(layout, rows[low:high], POOL)
        encoder, at = ShardEncoder(layout, POOL), low
        while at < high:
            step = portions[at % len(portions)]
            encoder.append(rows[at : min(at + step, high)])
            at += step
        assert encoder.finish() == whole
        assert decode_shard(layout, whole, high - low, "a").tobytes() == rows[low:high].tobytes()


@given(arrays(), st.data())
def test_any_flipped_bit_in_a_shard_is_noticed_or_harmless(made: tuple[ArrayLayout, np.ndarray], data: st.DataObject):
    layout, rows = made
    shard = encode_shard(layout, rows[: layout.shard_range(0)[1]], POOL)
    place = data.draw(st.integers(0, len(shard) * 8 - 1))
    shard[place // 8] ^= 1 << place % 8
    with pytest.raises(Corrupt):
        decode_shard(layout, shard, layout.shard_range(0)[1], "a")


@given(arrays(), st.data())
def test_truncated_shards_are_noticed(made: tuple[ArrayLayout, np.ndarray], data: st.DataObject):
    layout, rows = made
    shard = encode_shard(layout, rows[: layout.shard_range(0)[1]], POOL)
    with pytest.raises(Corrupt):
        decode_shard(layout, shard[: data.draw(st.integers(0, len(shard) - 1))], layout.shard_range(0)[1], "a")


@given(arrays(), st.data())
def test_every_range_of_rows_reads_the_same_as_numpy(made: tuple[ArrayLayout, np.ndarray], data: st.DataObject):
    layout, rows = made
    store = open_store(f"memory://range-{uuid.uuid4()}")
    publish_array(store, layout, rows, POOL)
    reader = ArrayReader(store, layout)
    start = data.draw(st.integers(0, layout.rows))
    stop = data.draw(st.integers(start, layout.rows))
    assert reader.read(start, stop).tobytes() == rows[start:stop].tobytes()
    assert reader.read(start, stop).shape == rows[start:stop].shape
    with pytest.raises(IndexError):
        reader.read(0, layout.rows + 1)


@given(made=arrays())
def test_tensorstore_and_zarr_read_them_bit_exact(
    made: tuple[ArrayLayout, np.ndarray], tmp_path_factory: pytest.TempPathFactory
):
    layout, rows = made
    folder = tmp_path_factory.mktemp("array")
    publish_array(open_store(folder), layout, rows, POOL)
    kvstore = {"driver": "file", "path": str(folder / "a")}
    theirs = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result().read().result()
    assert theirs.dtype == rows.dtype
    assert theirs.tobytes() == rows.tobytes()
    assert np.asarray(zarr.open_array(str(folder / "a"), mode="r")[...]).tobytes() == rows.tobytes()


@given(made=arrays())
def test_what_tensorstore_and_zarr_write_is_read(
    made: tuple[ArrayLayout, np.ndarray], tmp_path_factory: pytest.TempPathFactory
):
    """The decoder is of the format, not of our own encoder."""
    layout, rows = made
    folder = tmp_path_factory.mktemp("array")
    open_store(folder).put_new(layout.metadata_key, json.dumps(layout.document()).encode())
    kvstore = {"driver": "file", "path": str(folder / "a")}
    array = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, open=True).result()
    array.write(rows).result()
    zeros = rows.reshape(len(rows), -1).view(f"u{rows.dtype.itemsize}") == 0
    starts = range(0, len(rows), layout.chunk_rows)
    reader = ArrayReader(open_store(folder), layout)
    if any(zeros[start : start + layout.chunk_rows].all() for start in starts):
        # tensorstore leaves out what holds nothing but the fill value; here that is no way to write zeros
        with pytest.raises(Corrupt, match=r"missing|absent"):
            reader.read()
    else:
        assert reader.read().tobytes() == rows.tobytes()


def test_an_encoder_refuses_too_many_rows_and_another_dtype():
    layout = ArrayLayout("a", (8, 2), "float32", 4, 2, ("token", "d_model"))
    encoder = ShardEncoder(layout, POOL)
    with pytest.raises(ValueError, match="more rows"):
        encoder.append(np.zeros((5, 2), np.float32))
    with pytest.raises(ValueError, match="float64"):
        encoder.append(np.zeros((1, 2)))


def test_equal_input_gives_equal_bytes_on_any_number_of_threads():
    layout = ArrayLayout("a", (4096, 64), "float32", 4096, 256, ("token", "d_model"))
    rows = np.random.default_rng(0).standard_normal((4096, 64)).astype(np.float32)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(7) as many:
        assert encode_shard(layout, rows, one) == encode_shard(layout, rows, many)


def test_bfloat16_registers_once_and_reduces_as_float32():
    from zarr.core.dtype import data_type_registry

    from actcache.cache.bfloat16 import BFloat16, register

    register()
    register()
    assert data_type_registry.get("bfloat16") is BFloat16
    group = zarr.group(zarr.storage.MemoryStore())
    array = group.create_array("x", shape=(3,), chunks=(3,), dtype=BFloat16())
    array[:] = np.array([1, 2, 3], array.dtype)
    assert array[:].astype(np.float32).sum() == 6
    assert asyncio.run(_document(array))["data_type"] == "bfloat16"


async def _document(array: zarr.Array) -> dict:
    return array.metadata.to_dict()
