"""How many bytes are fetched for those that are asked for, by what is asked and by the size of chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

import actcache
from actcache.clients import sources
from actcache.clients.dataset import Dataset
from actcache.clients.view import View
from benchmarks.counting import Count, as_if_remote, counting
from benchmarks.datasets import STORED, layout_of, stored_bytes, wide
from benchmarks.material import SITES, Material
from benchmarks.ratio import Result

TITLE = "read_amplification: bytes of the sites fetched ÷ bytes asked for (compressed, in proportion to the rows)"
CHUNK_BYTES: tuple[int | None, ...] = (64 << 10, 128 << 10, None, 2 << 20)
"""None is what a build chooses."""
TIMES = 20

Asked = Callable[[Dataset, np.random.Generator], int]
"""Reads something, and says how many rows of how many sites that was, multiplied."""


def run(material: Material) -> Iterator[Result]:
    """A table for each dtype; the results are those of a build's chunks."""
    print("  768 wide, 262,144 tokens, 3 sites; files, read by the ranges that S3 would be asked for; with the index of each shard;")
    print("  in brackets the requests for one such thing")
    for dtype in ("float32", "bfloat16"):
        yield from _table(material, dtype)


def _table(material: Material, dtype: str) -> Iterator[Result]:
    folders = [wide(material, dtype, size) for size in CHUNK_BYTES]
    sizes = [layout_of(folder, STORED).chunk_rows for folder in folders]
    print(f"    {dtype}, tokens a chunk {''.join(f'{size:>18,}' for size in sizes)}")
    for what, asked in _all_asked().items():
        found = [_measured(folder, asked) for folder in folders]
        print(f"    {what:30}" + "".join(f"{ratio:11.2f} {f'({requests:,.1f})':>6}" for ratio, requests in found))
        ratio = found[CHUNK_BYTES.index(None)][0]
        yield Result("read_amplification", f"{dtype}, {what}", ratio, ratio, ratio, 1, None, "lower")


def _all_asked() -> Mapping[str, Asked]:
    return {
        "a whole site": lambda ds, _: _read(ds, 1),
        "a document, all sites": _times(lambda ds, rng: _read(ds.document(int(rng.integers(ds.n_documents))), len(SITES))),
        "a sequence, one site": _times(lambda ds, rng: _read(ds.sequence(int(rng.integers(ds.n_sequences))), 1)),
        "a random token": _times(lambda ds, rng: _read(ds.at([int(rng.integers(ds.n_tokens))]), 1)),
        "10,000 random tokens": lambda ds, rng: _read(ds.at(rng.integers(0, ds.n_tokens, 10_000)), 1),
        "where(position__gt=0)": lambda ds, _: _read(ds.where(position__gt=0), 1),
        "where of 1 % of the tokens": lambda ds, rng: _read(ds.where(rng.random(ds.n_tokens) < 0.01), 1),
        "where(document=7)": lambda ds, _: _read(ds.where(document=7), 1),
    }


def _read(view: View, sites: int) -> int:
    """Read the first sites of a view, without keeping them. Returns their rows."""
    for site in SITES[:sites]:
        view.site(site, "stored").map_blocks(lambda block: block[:1, :1], chunks=(1, 1)).compute(scheduler="threads")
    return view.n_tokens * sites


def _times(asked: Asked) -> Asked:
    return lambda ds, rng: sum(asked(ds, rng) for _ in range(TIMES))


def _measured(folder: Path, asked: Asked) -> tuple[float, float]:
    """Bytes of the sites fetched ÷ asked for, and requests to the sites for one such thing."""
    ds = actcache.open(folder)
    sources.forget()
    with as_if_remote(), counting() as count:
        rows = asked(ds, np.random.default_rng(0))
    layout = layout_of(folder, STORED)
    wanted = rows * stored_bytes(folder, layout) / layout.rows
    return count.bytes_below(*SITES) / wanted, _requests(count)


def _requests(count: Count) -> float:
    return sum(key.startswith(SITES) for key, _ in count.requests)
