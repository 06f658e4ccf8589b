"""How many bytes are fetched for those that are asked for, by what is asked and by the size of chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

import actcache
from actcache.clients import sources
from actcache.clients.dataset import Dataset
from actcache.clients.view import View
from benchmarks import readers
from benchmarks.counting import as_if_remote, counting
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
    print(
        "  768 wide, 262,144 tokens, 3 sites; files, read by the ranges that S3 would be asked for; with the index of each shard;"
    )
    print("  in brackets the requests for one such thing")
    for dtype in ("float32", "bfloat16"):
        yield from _table(material, dtype)


def _table(material: Material, dtype: str) -> Iterator[Result]:
    folders = [wide(material, dtype, size) for size in CHUNK_BYTES]
    sizes = [layout_of(folder, STORED).chunk_rows for folder in folders]
    print(f"    {dtype}, tokens a chunk {''.join(f'{size:>18,}' for size in sizes)}")
    results = []
    for what, (asked, times) in _all_asked().items():
        found = [_measured(folder, asked, times) for folder in folders]
        print(f"    {what:30}" + "".join(f"{ratio:11.2f} {f'({requests:,.1f})':>6}" for ratio, requests in found))
        ratio = found[CHUNK_BYTES.index(None)][0]
        results.append(Result("read_amplification", f"{dtype}, {what}", ratio, ratio, ratio, 1, None, "lower"))
    yield from results


def _all_asked() -> Mapping[str, tuple[Asked, int]]:
    """What is asked, and how many times."""
    return {
        "a whole site": (lambda ds, _: _read(ds, 1), 1),
        "a document, all sites": (lambda ds, rng: _read(ds.document(_any(ds.n_documents, rng)), len(SITES)), TIMES),
        "a sequence, one site": (lambda ds, rng: _read(ds.sequence(_any(ds.n_sequences, rng)), 1), TIMES),
        "a random token": (lambda ds, rng: _read(ds.at([_any(ds.n_tokens, rng)]), 1), TIMES),
        "10,000 random tokens": (lambda ds, rng: _read(ds.at(rng.integers(0, ds.n_tokens, 10_000)), 1), 1),
        "where(position__gt=0)": (lambda ds, _: _read(ds.where(position__gt=0), 1), 1),
        "where(document=7)": (lambda ds, _: _read(ds.where(document=7), 1), 1),
        "where of 1 % of the tokens": (lambda ds, rng: _read(ds.where(rng.random(ds.n_tokens) < 0.01), 1), 1),
        "shuffled batches": (_epoch, 1),
    }


def _epoch(ds: Dataset, _: np.random.Generator) -> int:
    return sum(len(batch[STORED]) for batch in ds.batches(STORED, size=4096, shuffle=0, buffer=1 << 16))


def _any(count: int, rng: np.random.Generator) -> int:
    return int(rng.integers(count))


def _read(view: View, sites: int) -> int:
    """Read the first sites of a view, without keeping them. Returns their rows."""
    for site in SITES[:sites]:
        readers.through_dask(view.site(site, "stored"))()
    return view.n_tokens * sites


def _measured(folder: Path, asked: Asked, times: int) -> tuple[float, float]:
    """Bytes of the sites fetched ÷ asked for, and requests to the sites for one such thing."""
    ds, rng = actcache.open(folder), np.random.default_rng(0)
    sources._forget()  # no index is known
    with as_if_remote(), counting() as count:
        rows = sum(asked(ds, rng) for _ in range(times))
    layout = layout_of(folder, STORED)
    requests = sum(key.startswith(SITES) for key, _ in count.requests)
    return count.bytes_below(*SITES) / (rows * stored_bytes(folder, layout) / layout.rows), requests / times
