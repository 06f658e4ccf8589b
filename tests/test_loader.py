"""Batches: exact, aligned, seeded, resumable; whatever the sizes, and whatever the threads do."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import actcache as ac
from actcache.cache.location import Location
from actcache.cache.opening import read_root
from actcache.cache.store import open_store
from actcache.clients.buffered import THREADS
from actcache.clients.loader import Batches
from actcache.clients.shuffle import Plan, Share, permutation
from actcache.clients.sources import StoredSource
from actcache.clients.token_index import Listed, Masked, Span, TokenIndex
from tests.array_source import ArrayRows, ArraySource, cut, numbered

Kept = list[dict[str, np.ndarray]]


def masked(kept: np.ndarray) -> Masked:
    bits = Masked.empty(len(kept))
    Masked.mark(bits, np.flatnonzero(kept))
    return Masked(bits)


@st.composite
def indexes(draw: st.DrawFn) -> tuple[int, TokenIndex]:
    """Length of a token axis, and tokens of it: a range, a mask or a list with repeats, perhaps empty."""
    n = draw(st.integers(1, 300))
    kind = draw(st.sampled_from(["span", "masked", "listed"]))
    if kind == "span":
        low, high = sorted((draw(st.integers(0, n)), draw(st.integers(0, n))))
        return n, Span(low, high)
    chosen = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    if kind == "masked":
        return n, masked(chosen.random(n) < draw(st.sampled_from([0.0, 0.02, 0.5, 1.0])))
    return n, Listed(chosen.integers(0, n, draw(st.integers(0, 200))))


ARGUMENTS = {
    "size": st.sampled_from([1, 3, 16, 64, 1000]),
    "block": st.sampled_from([1, 7, 50, 1000]),
    "buffer": st.sampled_from([1, 2, 20, 64, 150, 10_000]),
    "shuffle": st.sampled_from([None, 0, 5]),
    "world_size": st.sampled_from([1, 2, 3]),
    "workers": st.sampled_from([1, 2, 5]),
    "drop_last": st.booleans(),
    "prefetch": st.sampled_from([0, 1, 3]),
}


def make(n: int, index: TokenIndex, block: int, **arguments: Any) -> Batches:
    return Batches({"x": numbered(n, 3, cut(n, block))}, index, **arguments)


def tokens(batches: Kept) -> list[int]:
    return [token for batch in batches for token in batch["token"].tolist()]


def same(one: Kept, other: Kept) -> bool:
    return len(one) == len(other) and all(
        list(a) == list(b) and all(np.array_equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )


@given(indexes(), st.fixed_dictionaries(ARGUMENTS))
@example((300, Span(0, 300)), {"size": 64, "block": 1000, "buffer": 20, "shuffle": 0, "world_size": 1, "workers": 1,
                               "drop_last": False, "prefetch": 1})  # fmt: skip
def test_every_token_comes_as_often_as_it_was_named_whoever_reads(given_index, arguments: dict[str, Any]):
    n, index = given_index
    arguments = dict(arguments)
    workers, world = arguments.pop("workers"), arguments["world_size"]
    wanted = index.tokens(0, len(index)).tolist()
    found, full, sizes = [], set(), []
    for rank in range(world):
        batches = make(n, index, rank=rank, **arguments)
        of_rank = [batch for worker in range(workers) for batch in batches.iterate(worker, workers)]
        assert len(of_rank) == len(batches)
        assert {len(batch["token"]) for batch in of_rank[:-1]} <= {batches.size}, "only the last is short"
        for batch in of_rank:
            assert np.array_equal(batch["x"], 100 * batch["token"][:, None] + np.arange(3))
            assert (batch["x"].dtype, batch["token"].dtype) == (np.float32, np.int64)
        found += tokens(of_rank)
        full.add(len(of_rank))
        sizes.append(len(tokens(of_rank)))
    if arguments["drop_last"]:
        assert full == {len(index) // world // arguments["size"]}
        counts, most = np.bincount(found, minlength=n), np.bincount(wanted, minlength=n)
        assert (counts <= most).all()
        assert sum(sizes) == full.pop() * arguments["size"] * world
    else:
        assert max(sizes) - min(sizes) <= 1
        assert sorted(found) == sorted(wanted)
        if arguments["shuffle"] is None:
            assert found == wanted, "the view's own order"


@given(indexes(), st.fixed_dictionaries(ARGUMENTS), st.data())
def test_what_goes_on_from_a_state_is_what_would_have_come(given_index, arguments: dict[str, Any], data: st.DataObject):
    n, index = given_index
    arguments = dict(arguments)
    worker = (data.draw(st.integers(0, arguments["workers"] - 1)), arguments.pop("workers"))
    arguments["rank"] = data.draw(st.integers(0, arguments["world_size"] - 1))
    whole = list(make(n, index, **arguments).iterate(*worker))
    done = data.draw(st.integers(0, len(whole)))
    interrupted = make(n, index, **arguments)
    running = interrupted.iterate(*worker)
    begun = [next(running) for _ in range(done)]
    state = json.loads(json.dumps(interrupted.state_dict()))
    running.close()
    again = make(n, index, epoch=7, **arguments)
    again.load_state_dict(state, *worker)
    assert again.state_dict() == state
    assert same(begun + list(again.iterate(*worker)), whole)
    assert same(list(again.iterate(*worker)), whole), "the next iteration is a whole epoch again"


@settings(max_examples=12)
@given(st.integers(0, 1 << 30), st.sampled_from([16, 100, 500]), st.sampled_from([None, 1]))
def test_the_order_does_not_depend_on_threads(seed: int, buffer: int, shuffle: int | None):
    def batches(slow: bool) -> Kept:
        chance = random.Random(seed)
        sources = {"x": numbered(500, 2, cut(500, 40)), "y": numbered(500, 2, cut(500, 130))}
        for source in sources.values():
            source.delay = (lambda number: chance.random() * 0.003) if slow else None
        found = []
        for batch in Batches(sources, Span(0, 500), 32, shuffle=shuffle, buffer=buffer):
            found.append(batch)
            time.sleep(chance.random() * 0.002 if slow else 0)
        return found

    assert same(batches(True), batches(False))


def test_seeds_and_epochs_differ_and_an_epoch_stays_until_it_is_set():
    batches = make(400, Span(0, 400), 30, size=64, shuffle=1, buffer=100)
    first = list(batches)
    assert same(first, list(batches))
    assert same(first, list(make(400, Span(0, 400), 30, size=64, shuffle=1, buffer=100)))
    batches.set_epoch(1)
    second = list(batches)
    assert same(second, list(make(400, Span(0, 400), 30, size=64, shuffle=1, epoch=1, buffer=100)))
    other = list(make(400, Span(0, 400), 30, size=64, shuffle=2, buffer=100))
    orders = {tuple(tokens(each)) for each in (first, second, other)}
    assert len(orders) == 3
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(400))}


def test_sites_of_other_shards_and_columns_are_of_the_same_tokens():
    n = 1000
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=(n, width)).astype(dtype) for name, width, dtype in (
        ("a", 5, np.float32), ("b", 3, np.float16), ("c", 4, ml_dtypes.bfloat16))}  # fmt: skip
    sources = {name: ArraySource(name, rows, cut(n, 10 + 97 * i)) for i, (name, rows) in enumerate(values.items())}
    ids = ArraySource("token_id", rng.integers(0, 9, n).astype(np.int32), cut(n, 333))
    index = Listed(rng.integers(0, n, 700))
    for dtype in ("float32", "stored"):
        for batch in Batches(sources, index, 64, shuffle=3, buffer=200, dtype=dtype, columns={"token_id": ids}):
            at = batch["token"]
            assert list(batch) == ["a", "b", "c", "token_id", "token"]
            assert np.array_equal(batch["token_id"], ids.values[at])
            assert batch["token_id"].dtype == np.int32
            for name, rows in values.items():
                assert batch[name].dtype == (np.float32 if dtype == "float32" else rows.dtype)
                assert np.array_equal(batch[name], rows[at].astype(batch[name].dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_normalised(dtype: str):
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(900, 6)) * [1, 10, 0.1, 5, 1, 1] + 3).astype(np.dtype(dtype))
    values[:, 4] = 2
    wide = values.astype(np.float64)
    mean, variance = wide.mean(axis=0), wide.var(axis=0)
    variance[4] = 0
    expected = {
        "center": wide - mean,
        "standard": (wide - mean) / np.where(variance > 0, np.sqrt(variance), 1),
        "scale": wide * np.sqrt(6 / np.mean((wide**2).sum(axis=1))),
    }
    for how, rows in expected.items():
        given = {"x": (mean, variance)}
        batches = Batches(
            {"x": ArraySource("x", values, cut(900, 100))},
            Span(0, 900),
            500,
            shuffle=0,
            normalise=how,
            statistics=given,
        )
        for batch in batches:
            np.testing.assert_allclose(batch["x"], rows[batch["token"]], rtol=2e-6, atol=2e-6)
            assert batch["x"].dtype == np.float32


def test_a_dimension_that_hardly_varies_gives_no_infinity():
    values = np.zeros((10, 2), np.float32)
    for how in ("standard", "scale"):
        given = {"x": (np.zeros(2), np.array([1e-300, 0]))}
        (batch,) = Batches({"x": ArraySource("x", values, (10,))}, Span(0, 10), 16, normalise=how, statistics=given)
        assert np.isfinite(batch["x"]).all()


def test_resuming_reads_its_window_alone():
    def batches() -> tuple[Batches, ArraySource]:
        source = numbered(4000, 2, cut(4000, 100))
        return Batches({"x": source}, Span(0, 4000), 50, shuffle=0, buffer=1000), source

    whole = list(batches()[0])
    first, _ = batches()
    running = iter(first)
    for _ in range(75):
        next(running)
    again, source = batches()
    again.load_state_dict(first.state_dict())
    assert same(list(again), whole[75:])
    assert sum(source.read) == 1000
    assert len(whole) == 80


@pytest.mark.parametrize(
    "change", [{"size": 10}, {"shuffle": 4}, {"buffer": 50}, {"drop_last": True}, {"world_size": 2}]
)
def test_a_state_of_something_else_is_refused_by_name(change: dict[str, Any]):
    arguments = {"size": 20, "shuffle": 3, "buffer": 60}
    state = make(100, Span(0, 100), 30, **arguments).state_dict()
    with pytest.raises(ac.InvalidInput, match=f"the state is of {next(iter(change))} "):
        make(100, Span(0, 100), 30, **arguments | change).load_state_dict(state)
    for other in (make(100, Span(0, 99), 30, **arguments), make(100, Span(0, 100), 31, **arguments)):
        with pytest.raises(ac.InvalidInput, match="the state is of tokens "):
            other.load_state_dict(state)
    with pytest.raises(ac.InvalidInput, match="there are 5"):
        make(100, Span(0, 100), 30, **arguments).load_state_dict(state | {"batches": 6})
    for version in ({}, {"version": 99}):
        with pytest.raises(ac.InvalidInput, match="version"):
            make(100, Span(0, 100), 30, **arguments).load_state_dict(version)


def test_a_state_of_other_content_is_refused_by_name():
    n = 100

    def batches(name: str = "x", values: str = "x", **arguments: Any) -> Batches:
        source = numbered(n, 3, cut(n, 30), "float16", values)
        ids = numbered(n, 1, (n,), "int32", "token_id")
        statistics = {name: (np.zeros(3), np.ones(3))}
        return Batches(
            {name: source}, Span(0, n), 20, shuffle=3, statistics=statistics, columns={"ids": ids}, **arguments
        )

    state = json.loads(json.dumps(batches().state_dict()))
    batches().load_state_dict(state)
    for other, said in (
        (batches(dtype="stored"), "x: the state is of dtype 'float32', not 'float16'"),
        (batches(normalise="scale"), "x: the state is of normalise None, not 'scale'"),
        (batches(values="y"), "x: the state is of the stored values '"),
        (batches(name="y"), "the state is of the arrays x, ids, not y, ids"),
    ):
        with pytest.raises(ac.InvalidInput, match=said):
            other.load_state_dict(state)
        with pytest.raises(ac.InvalidInput, match="the state is of"):
            batches().load_state_dict(other.state_dict())
    with pytest.raises(ac.InvalidInput, match="the arrays"):
        batches().load_state_dict({name: value for name, value in state.items() if name != "arrays"})


def test_a_state_goes_on_with_a_copy_and_with_nothing_else(spec: ac.Spec, tmp_path: Path):
    def build(name: str, **change: Any) -> Any:
        ac.build(spec.model_copy(update={"sites": "resid", "max_tokens": 400, **change}), tmp_path / name)
        return ac.open(tmp_path / name)

    one = build("one", quantize=("int8",))
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    copy, other = ac.open(tmp_path / "copy"), build("other", shuffle=1, quantize=("int8",))
    sites = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]

    def batches(ds: Any, sites: Any = sites) -> Batches:
        return ds.batches(sites, 64, shuffle=0, normalise="scale", columns=["token_id"])

    for make in (lambda ds: ds, lambda ds: ds.at(np.arange(300)), lambda ds: ac.open([ds.url, other.url])):
        first = batches(make(one))
        whole = list(first)
        running = iter(first)
        next(running)
        state = json.loads(json.dumps(first.state_dict()))
        assert len(json.dumps(state)) < 1000
        again = batches(make(copy))
        again.load_state_dict(state)
        assert same(list(again), whole[1:])
    for name in ("token_id", *sites):
        for kind in (None, "int8") if name in sites else (None,):
            assert one.source(name, kind).content == copy.source(name, kind).content
            assert one.source(name, kind).key != copy.source(name, kind).key
    state = batches(one.at(np.arange(300))).state_dict()
    with pytest.raises(ac.InvalidInput, match=f"{sites[0]}: the state is of the stored values"):
        batches(other.at(np.arange(300))).load_state_dict(state)
    with pytest.raises(ac.InvalidInput, match="of the arrays"):
        batches(one.at(np.arange(300)), sites[1]).load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"size": 0}, "size=0"), ({"size": 2.5}, "size=2.5"), ({"shuffle": True}, "a seed or None"),
        ({"shuffle": -1}, "shuffle=-1"), ({"epoch": -1}, "epoch"), ({"buffer": 0}, "buffer"), ({"rank": 1}, "rank=1"),
        ({"rank": -1}, "rank"), ({"world_size": 0}, "world_size"), ({"prefetch": -1}, "prefetch"),
        ({"dtype": "float64"}, "'float32' and 'stored'"), ({"normalise": "zscore"}, "'standard'"),
        ({"normalise": "center", "dtype": "stored"}, "stored"),
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense(arguments: dict[str, Any], word: str):
    statistics = {"x": (np.zeros(3), np.ones(3))}
    with pytest.raises(ac.InvalidInput, match=word) as raised:
        make(10, Span(0, 10), 5, **{"statistics": statistics} | arguments)
    assert "\n" not in str(raised.value)


def test_sources_that_do_not_go_together():
    short = numbered(9, 1, (9,), name="y")
    x = numbered(10, 1, (10,))
    with pytest.raises(ac.InvalidInput, match="one token axis"):
        Batches({"x": x, "y": short}, Span(0, 9))
    with pytest.raises(ac.InvalidInput, match="twice"):
        Batches({"x": x}, Span(0, 9), columns={"x": x})
    with pytest.raises(ac.InvalidInput, match="'token' twice"):
        Batches({"x": x}, Span(0, 9), columns={"token": x})
    with pytest.raises(ac.InvalidInput, match="no site"):
        Batches({}, Span(0, 9))
    with pytest.raises(ac.InvalidInput, match="no statistics"):
        Batches({"x": x}, Span(0, 9), normalise="center")
    with pytest.raises(ac.InvalidInput, match="another shape"):
        Batches({"x": x}, Span(0, 9), normalise="center", statistics={"x": (np.zeros(2), np.ones(2))})
    with pytest.raises(ac.InvalidInput, match="not finite"):
        Batches({"x": x}, Span(0, 9), normalise="center", statistics={"x": (np.array([np.nan]), np.ones(1))})


def test_tokens_that_are_not_there():
    for index in (Listed(np.array([3, 10])), Listed(np.array([-1, 3])), Span(5, 11)):
        with pytest.raises(ac.InvalidInput, match="1 tokens of the view are not among the 10"):
            list(make(10, index, 4, shuffle=0))
    with pytest.raises(IndexError, match="10"):
        list(make(10, Listed(np.array([3, 10])), 4))


def test_a_dataset_of_nothing():
    for shuffle in (None, 0):
        batches = make(0, Span(0, 0), 10, shuffle=shuffle)
        assert (len(batches), list(batches)) == (0, [])
        assert batches.memory_bytes >= 0
        batches.load_state_dict(batches.state_dict())
        assert list(batches) == []


def test_no_torch_is_needed():
    script = (
        "from tests.array_source import *; import sys; from actcache.clients.loader import Batches\n"
        "from actcache.clients.token_index import Span; import actcache.clients.torch_dataset\n"
        "list(Batches({'x': numbered(100, 2, (50, 50))}, Span(0, 100), 10, shuffle=0)); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("False\n", "")


def running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(THREADS)]


def ended() -> bool:
    until = time.monotonic() + 5
    while running() and time.monotonic() < until:
        time.sleep(0.01)
    return not running()


@pytest.mark.parametrize("error", [ac.Corrupt("broken"), ac.StoreError("away"), IndexError("beyond")])
def test_what_a_reader_raises_comes_to_the_consumer(error: Exception):
    source = numbered(1000, 2, cut(1000, 50))
    source.failure, source.fails_at = error, 777
    found: Kept = []
    with pytest.raises(type(error), match=str(error)):
        found.extend(Batches({"x": source}, Span(0, 1000), 10, buffer=100))
    assert tokens(found) == list(range(10 * len(found)))
    assert len(found) <= 77
    assert ended()


def test_an_error_that_is_kept_keeps_no_buffer(monkeypatch: pytest.MonkeyPatch):
    buffers = []
    original = ArrayRows.scatter

    def scatter(rows: ArrayRows, index: np.ndarray, out: np.ndarray, at: np.ndarray) -> None:
        buffers.append(weakref.ref(out))
        original(rows, index, out, at)

    monkeypatch.setattr(ArrayRows, "scatter", scatter)
    source = numbered(1000, 2, cut(1000, 50))
    source.failure, source.fails_at = ac.Corrupt("broken"), 777
    with pytest.raises(ac.Corrupt) as kept:
        list(Batches({"x": source}, Span(0, 1000), 10, buffer=100, shuffle=0))
    assert kept.value.__traceback__ is not None
    assert buffers
    assert {each() is None for each in buffers} == {True}


def test_an_iterator_that_is_left_ends_its_threads():
    batches = make(5000, Span(0, 5000), 100, size=10, shuffle=0, buffer=500)
    for _ in batches:
        assert running()
        break
    assert ended()
    kept = iter(batches)
    next(kept)
    assert running()
    del kept
    gc.collect()
    assert ended()

    def interrupted() -> None:
        for _ in batches:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert ended()
    list(batches)
    assert ended(), "and so does one that is through"


@pytest.mark.parametrize("name", ["kept", "pytest.kept", "threading.kept"])
def test_a_script_may_end_in_the_middle(name: str):
    script = (
        "import threading, pytest; from tests.test_loader import *\n"
        f"{name} = iter(make(5000, Span(0, 5000), 100, size=10, shuffle=0, buffer=500)); next({name}); print('there')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "there\n", "")


def test_batches_that_are_kept_stay_what_they_are():
    batches = make(3000, Span(0, 3000), 100, size=16, shuffle=0, buffer=300)
    kept, views = [], []
    for number, batch in enumerate(batches):
        if number % 3 == 0:
            kept.append(batch)
        elif number % 3 == 1:
            views.append((batch["x"][5:9, 1:], batch["token"][5:9].copy()))
    for batch in kept:
        assert np.array_equal(batch["x"][:, 0], 100 * batch["token"])
    for view, at in views:
        assert np.array_equal(view[:, 0], 100 * at + 1)


def test_a_window_mixes_many_blocks_even_where_one_would_fill_it():
    plan = Plan(Span(0, 64_000), np.array([0, 32_000, 64_000]), size=100, shuffle=0, epoch=0, buffer=1600, share=Share(),
                drop_last=False)  # fmt: skip
    assert np.diff(plan.windows).max() <= 1600
    assert np.ptp(np.diff(plan.windows)) <= 1
    regions = [np.unique(plan.tokens(unit) // 100).size for unit in range(100)]
    assert max(regions) <= 3
    for window in range(3):
        units = np.flatnonzero(plan.window_of == window)
        assert len({int(plan.tokens(unit)[0]) // 100 for unit in units}) >= 10


def test_batches_are_mixed_as_well_as_their_window_allows():
    from benchmarks.mixing import expected, order, pairs, spread

    tokens, sequence, size, buffer, block = 400_000, 64, 512, 40_000, 1000
    found = order(tokens, buffer, block, tokens)
    assert np.array_equal(np.sort(found), np.arange(tokens))
    assert pairs(found, sequence, size) == pytest.approx(expected(buffer, sequence, size), rel=0.05)
    perfect = np.random.default_rng(0).permutation(tokens)
    assert pairs(perfect, sequence, size) == pytest.approx(expected(tokens, sequence, size), rel=0.05)
    chi_square, blocks = spread(found, tokens, block, size)
    assert blocks >= buffer / block
    assert chi_square == pytest.approx(size / 400 * (400 / (buffer / block) - 1) * 400 / 399, rel=0.3)
    assert spread(perfect, tokens, block, size)[0] == pytest.approx(1, rel=0.05)


def test_permutations_are_uniform_and_never_change():
    assert permutation(10, 1, 2, "window", 0).tolist() == [3, 8, 1, 2, 5, 9, 0, 4, 7, 6]
    assert permutation(0, 1).tolist() == []
    assert permutation(1, 1).tolist() == [0]
    n, times = 6, 6000
    counts = np.zeros((n, n))
    for seed in range(times):
        counts[np.arange(n), permutation(n, seed)] += 1
    chi_square = ((counts - times / n) ** 2 / (times / n)).sum()
    assert chi_square < 60, "25 degrees of freedom: exceeded by chance once in 10⁴"


def stored(url: str, names: list[str]) -> Iterator[StoredSource]:
    root = read_root(open_store(url))
    for name in names:
        yield StoredSource(Location.of(url), root.attributes.generations[0].manifest, root.layouts[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_stored_dataset(built_by_dtype: dict[str, str], dtype: str):
    url = built_by_dtype[dtype]
    names = ["blocks.0.hook_resid_post", "blocks.2.hook_mlp_out"]
    sources = dict(zip(names, stored(url, names), strict=True))
    (ids,) = stored(url, ["token_id"])
    n = ids.shape[0]
    whole = {name: source.open().read() for name, source in sources.items()}
    all_ids = ids.open().read()
    for index in (Span(3, n - 5), masked(np.arange(n) % 3 == 0), Listed(np.arange(n)[::-7])):
        found = list(Batches(sources, index, 100, shuffle=1, buffer=256, columns={"token_id": ids}))
        assert sorted(tokens(found)) == sorted(index.tokens(0, len(index)).tolist())
        for batch in found:
            for name in names:
                assert np.array_equal(batch[name], whole[name][batch["token"]].astype(np.float32))
            assert np.array_equal(batch["token_id"], all_ids[batch["token"]])


def test_a_damaged_shard_is_named(spec: ac.Spec, tmp_path: Path):
    ac.build(spec.model_copy(update={"sites": "resid"}), tmp_path / "ds")
    (source,) = stored(str(tmp_path / "ds"), ["blocks.1.hook_resid_post"])
    (tmp_path / "ds/blocks.1.hook_resid_post/c/2/0").unlink()
    with pytest.raises(ac.Corrupt, match="hook_resid_post/c/2/0: the shard is missing"):
        list(Batches({"x": source}, Span(0, source.shape[0]), 100, shuffle=1))


MEMORY = """
import sys, ml_dtypes, numpy as np
from actcache.cache.location import Location
from actcache.clients.loader import Batches
from actcache.clients.sources import StoredSource
from actcache.clients.token_index import Span
from actcache.schemas.array import ArrayLayout
def status(name):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name))
layouts = [ArrayLayout(name, (60_000, 256), "float32", 4000, 500, ("token", "d_model")) for name in ("a", "b")]
sources = {each.name: StoredSource(Location.of(sys.argv[1]), "", each) for each in layouts}
list(Batches(sources, Span(0, 100), 100))  # threads, modules
shuffle, buffer = eval(sys.argv[2])
batches = Batches(sources, Span(0, 60_000), 1000, shuffle=shuffle, buffer=buffer)
before = status("VmRSS")
for batch in batches:
    last = batch["a"].sum()
print(status("VmHWM") - before, batches.memory_bytes, 60_000 * 2048)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two sites of 61 MB in shards of 4 MB, without any metadata."""
    from actcache.cache.shards import assemble, encode_chunk
    from actcache.schemas.array import ArrayLayout

    url = str(tmp_path_factory.mktemp("large"))
    store = open_store(url)
    rows = np.random.default_rng(0).normal(size=(4000, 256)).astype(np.float32)
    for name in ("a", "b"):
        layout = ArrayLayout(name, (60_000, 256), "float32", 4000, 500, ("token", "d_model"))
        shard = assemble(layout, [encode_chunk(layout, rows[low : low + 500]) for low in range(0, 4000, 500)])
        for number in range(layout.n_shards):
            store.put_new(layout.shard_key(number), shard)
    return url


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(("shuffle", "buffer"), [(1, 8000), (1, 1 << 20), (None, 8000)])
def test_memory_stays_within_what_is_stated(large: str, shuffle: int | None, buffer: int):
    command = [sys.executable, "-c", MEMORY, large, repr((shuffle, buffer))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    taken, stated, whole = map(int, done.stdout.split())
    assert taken <= stated
    if buffer < 60_000:
        assert taken < whole, "this test could not fail"


def test_the_summary_tells_order_and_memory():
    text = repr(make(1000, Span(0, 1000), 100, size=64, shuffle=5, rank=1, world_size=2))
    for word in ("x", "8 batches of 64", "1,000 tokens", "shuffle=5", "epoch 0", "rank 1 of 2", "MB"):
        assert word in text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_does_not_wait_for_the_threads_of_its_parent():
    iterator = iter(make(4000, Span(0, 4000), 30, size=16, shuffle=0, buffer=100))
    next(iterator)
    child = os.fork()
    if not child:
        try:
            for _ in iterator:
                pass
        except ac.StoreError:
            os._exit(7)
        finally:
            os._exit(1)
    ended = (0, 0)
    for _ in range(300):
        ended = os.waitpid(child, os.WNOHANG)
        if ended[0]:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(ended[1]) == 7
    assert len(list(iterator)) == 249
