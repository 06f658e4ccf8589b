"""The Gram pass of a ridge lens ÷ the lower of two limits: reading its states in bulk, and its products on arrays in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

import actcache
from actcache.cache.head import Head
from actcache.cache.threads import spread
from actcache.clients.lens.ridge import grams
from actcache.clients.states import States, states
from benchmarks import readers
from benchmarks.datasets import STORED, layout_of, wide
from benchmarks.material import SITES, THREADS, Material
from benchmarks.ratio import Result, Times, alternate, compare, fastest, timed

TITLE = "lens_gram: Gram matrices of a ridge lens, of states in files in memory, tokens/s"
GOAL = 0.7
WIDE_SHARDS = {"float32": 6, "bfloat16": 3}
"""Shards of a wide site that are read: as many tokens of either dtype."""
OURS, LIMIT = "Gram pass", "lower limit"
READ, PRODUCTS = "read: ", "products: "
CODEC, IN_TURN = "codec alone", "reading, then products"


def run(material: Material) -> Iterator[Result]:
    """Compare the bundled model's states, and wide ones."""
    print(
        f"  three sites, of which the last is what the others are mapped to; {THREADS} threads on every side. Bulk read is the faster\n"
        "  of the same reader without work, and Dask to float32; products, the faster of one call on all threads and one a thread"
    )
    sealed = material.in_memory / "sealed"
    if not sealed.is_dir():
        shutil.copytree(material.sealed, sealed)
    yield from _compare(material, sealed, "128 wide, float32", "float32", None)
    for dtype, shards in WIDE_SHARDS.items():
        yield from _compare(material, wide(material, dtype), f"768 wide, {dtype}", dtype, shards)


def _compare(material: Material, folder: Path, what: str, dtype: str, shards: int | None) -> Iterator[Result]:
    layout = layout_of(folder, STORED)
    rows = min(layout.rows, layout.rows if shards is None else shards * layout.shard_rows)
    ds = actcache.open(folder)
    targets = np.zeros(ds.n_tokens, np.int64)  # of which the Gram pass takes no notice
    read = states(ds, sites=SITES, head=Head([], {}), targets=targets, max_tokens=rows)
    decoded = [
        readers.codec_alone(layout_of(folder, site), readers.mapped(folder), range(-(-rows // layout.shard_rows)))
        for site in SITES
    ]
    dask = [readers.through_dask(ds[site][:rows]) for site in SITES]
    one_call, one_a_thread = _products(read)
    sides = {
        OURS: lambda: grams(read),
        f"{READ}States.pieces": lambda: _all_pieces(read),
        f"{READ}Dask": lambda: [work() for work in dask],
        CODEC: lambda: [work() for work in decoded],
        f"{PRODUCTS}one call on all threads": one_call,
        f"{PRODUCTS}one a thread": one_a_thread,
    }
    times = alternate({name: timed(work) for name, work in sides.items()}, material.seconds)
    bulk, products = "bulk read", "BLAS"
    times |= {bulk: fastest(times, READ), products: fastest(times, PRODUCTS)}
    times[LIMIT] = _slower(times, bulk, products)
    times[IN_TURN] = [sum(pair) for pair in zip(times[bulk], times[products], strict=True)]
    goals = {LIMIT: GOAL, bulk: None, products: None, IN_TURN: None, CODEC: None}
    for peer, goal in goals.items():
        kind = f" ({bulk if times[LIMIT] is times[bulk] else products})" if peer == LIMIT else ""
        yield compare(
            "lens_gram",
            f"{what} ÷ {peer}{kind}",
            times,
            OURS,
            peer,
            goal=goal,
            amount=rows / 1e6,
            unit="million tokens/s",
        )


def _slower(times: Times, *names: str) -> list[float]:
    """The seconds of that side which was slower by its median."""
    return max((times[name] for name in names), key=np.median)


def _all_pieces(read: States) -> None:
    if sum(len(piece.final) for piece in read.pieces()) != len(read):
        raise AssertionError("not every token came")


def _products(read: States) -> tuple[Callable[[], None], Callable[[], None]]:
    """The products x xᵀ and x yᵀ of every layer and piece, on arrays that are in memory before: two ways to spend all cores on them."""
    pieces = [[state.copy() for state in piece.states] for piece in read.pieces()]
    layers = [(number, layer) for number in range(len(pieces)) for layer in range(read.n_layers - 1)]

    def multiply(which: tuple[int, int]) -> None:
        number, layer = which
        x, y = pieces[number][layer], pieces[number][-1]
        x.T @ x
        x.T @ y

    def one_call() -> None:
        for which in layers:
            multiply(which)

    def one_a_thread() -> None:
        with threadpool_limits(1, user_api="blas"):
            spread(multiply, layers)

    return one_call, one_a_thread
