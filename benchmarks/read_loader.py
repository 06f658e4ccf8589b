"""Shuffled batches of a site ÷ reading the site whole, and ÷ shuffled rows of an uncompressed Arrow file; and the memory that they take.

Memory is measured in a process of its own: `python -m benchmarks.read_loader URL`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import actcache
from actcache.clients.loader import Batches
from benchmarks import readers
from benchmarks.datasets import STORED, wide
from benchmarks.material import CONTEXT, Material
from benchmarks.ratio import Result, alternate, compare, timed

TITLE = "read_loader: an epoch of shuffled batches of 4,096 tokens, float32, from files in memory"
SIZE, BUFFER = 4096, 1 << 16
OURS, BULK = "batches", "bulk"
ROWS, ROWS_AT_ONCE, TOKENS = (
    f"Arrow rows of {CONTEXT} tokens, one by one",
    f"Arrow rows of {CONTEXT} tokens, a batch at once",
    "Arrow rows of a token, a batch at once",
)
GOALS = {BULK: 0.8, ROWS: 1.0, ROWS_AT_ONCE: None, TOKENS: 1.0}


def run(material: Material) -> Iterator[Result]:
    """Compare float32 and bfloat16."""
    print(f"  768 wide, 262,144 tokens; a window of {BUFFER:,} tokens; Arrow files are float32, not compressed")
    arrow = {
        ROWS: _arrow(material, CONTEXT, one_by_one=True),
        ROWS_AT_ONCE: _arrow(material, CONTEXT),
        TOKENS: _arrow(material, 1),
    }
    for dtype in ("float32", "bfloat16"):
        folder = wide(material, dtype)
        ds = actcache.open(folder)
        epoch = _batches(str(folder))
        sides = {
            OURS: lambda epoch=epoch: _count(epoch),  # type: ignore[misc]
            BULK: readers.through_dask(ds[STORED]),
            **arrow,
        }
        times = alternate({name: timed(work) for name, work in sides.items()}, material.seconds)
        millions = ds.n_tokens / 1e6
        for peer, goal in GOALS.items():
            yield compare(
                "read_loader",
                f"{dtype} ÷ {peer}",
                times,
                OURS,
                peer,
                goal=goal,
                amount=millions,
                unit="million activations/s",
            )
        yield _memory(dtype, str(folder), epoch.memory_bytes)


def _batches(url: str) -> Batches:
    return actcache.open(url).batches(STORED, size=SIZE, shuffle=0, buffer=BUFFER)


def _count(batches: Batches) -> None:
    if sum(len(batch[STORED]) for batch in batches) != len(batches.index):
        raise AssertionError("not every token came")


def _arrow(material: Material, tokens: int, one_by_one: bool = False) -> Callable[[], object]:
    """An epoch of rows of an Arrow file in random order, as torch tensors: one by one as a DataLoader fetches them, or a batch at once.

    Rows of several tokens are matrices (`Array2D`), as SAELens stores activations.
    """
    width, at_once = material.widths[1], 1 if one_by_one else SIZE // tokens
    shape = (tokens, width) if tokens > 1 else (width,)
    rows = material.activations(width, "float32", 1 << 18).reshape(-1, *shape)
    import datasets  # after transformers, which material imports

    path = material.in_memory / f"rows-{tokens}.arrow"
    if not path.exists():
        kind = datasets.Array2D(shape, "float32") if tokens > 1 else datasets.List(datasets.Value("float32"), width)
        writer = datasets.arrow_writer.ArrowWriter(features=datasets.Features({"x": kind}), path=str(path))
        for some in np.split(rows, len(rows) * tokens // SIZE):
            writer.write_batch({"x": list(some)})
        writer.finalize()
    opened = datasets.Dataset.from_file(str(path)).with_format("torch")

    def epoch() -> None:
        order = np.random.default_rng(0).permutation(len(rows))
        for some in np.split(order, len(order) // at_once):
            found = opened[int(some[0])]["x"][None] if one_by_one else opened[some.tolist()]["x"]
            if found.shape != (at_once, *shape):
                raise AssertionError("other rows came")

    return epoch


def _memory(dtype: str, url: str, bound: int) -> Result:
    command = [sys.executable, "-m", "benchmarks.read_loader", url]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    grown = json.loads(done.stdout)["grown"]
    ratio = grown / bound
    figures = {"grown by, MB": grown / 1e6, "bound, MB": bound / 1e6}
    return Result("read_loader", f"{dtype}, memory ÷ memory_bytes", ratio, ratio, ratio, 1, 1.0, "lower", figures)


def _side(url: str) -> None:
    """Print by how many bytes this process grew at most in an epoch; files that are mapped are the page cache's."""
    batches = _batches(url)
    before, most, over = _anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.is_set():
            most = max(most, _anonymous())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _count(batches)
    over.set()
    watcher.join()
    print(json.dumps({"grown": most - before}))


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


if __name__ == "__main__":
    _side(sys.argv[1])
