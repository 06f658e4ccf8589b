"""Tokenising a large JSONL corpus ÷ the bare fast tokenizer on the same texts, and the most memory that it takes.

Each side is a process of its own, so that its peak memory is its own: `python -m benchmarks.tokenise SIDE MODEL CORPUS`.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.material import CORPUS, Material
from benchmarks.ratio import Result, compare

TITLE = "tokenise: a JSONL corpus read, tokenised and stored ÷ encode_batch_fast alone, bytes/s"
NOTE = """  The peer has its texts in memory and throws its ids away; imports, hashing of the corpus and loading the tokenizer are outside
  on both sides. --megabytes sets the size of the corpus; from 500 on there is one round."""
GOAL = 0.8
PEAK_GOAL = 1.0
TEXTS_AT_ONCE = 512
OURS, PEER = "tokenise", "bare tokenizer"


def run(material: Material) -> Iterator[Result]:
    """Run both sides in turns."""
    print(NOTE)
    path = material.folder / "corpus.jsonl"
    characters = _write(path, material.megabytes * 1_000_000)
    rounds = 3 if material.megabytes < 500 else 1
    times: dict[str, list[float]] = {OURS: [], PEER: []}
    processor: dict[str, list[float]] = {OURS: [], PEER: []}
    peaks: dict[str, float] = {}
    order = [OURS, PEER]
    for _ in range(rounds):
        for side in order:
            measured = _measured(side, material.model, path)
            times[side].append(measured["seconds"])
            processor[side].append(measured["processor"])
            peaks[side] = max(peaks.get(side, 0), measured["peak_bytes"])
        order.reverse()
    times, processor = (
        {side: rows * (2 if rounds == 1 else 1) for side, rows in all_.items()} for all_ in (times, processor)
    )
    name = f"{material.megabytes} MB of JSONL, {material.model_name}"
    yield compare("tokenise", f"{name} ÷ {PEER}", times, OURS, PEER, goal=GOAL, amount=characters / 1e6, unit="MB/s")
    yield compare("tokenise", f"{name} ÷ {PEER}, by processor time", processor, OURS, PEER)
    peak = peaks[OURS] / 1e9
    yield Result(
        "tokenise",
        f"{name}: peak memory, GB",
        peak,
        peak,
        peak,
        rounds,
        PEAK_GOAL,
        "lower",
        {"peer, GB": peaks[PEER] / 1e9},
    )


def _write(path: Path, size: int) -> int:
    """Pieces of the standard library's source of 200 to 8,000 characters, a row each. Returns their characters."""
    files = sorted(Path(CORPUS).parent.glob("*.py"))
    source = "".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    generator, characters = random.Random(0), 0
    with path.open("w", encoding="utf-8") as file:
        while characters < size:
            length = generator.randrange(200, 8_000)
            start = generator.randrange(len(source) - length)
            file.write(json.dumps({"text": source[start : start + length]}) + "\n")
            characters += length
    return characters


def _measured(side: str, model: Path, path: Path) -> dict[str, float]:
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, "-m", "benchmarks.tokenise", side, str(model), str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _tokenise(model: str, corpus: str) -> float:
    from actcache.cache.store import open_store
    from actcache.jobs.encode import load_tokenizer
    from actcache.jobs.pool import BoundedPool
    from actcache.jobs.resolve import resolve
    from actcache.jobs.tokenise import tokenise
    from actcache.schemas.spec import Spec

    resolved = resolve(Spec(model=model, corpus=(corpus,)))
    tokenizer = load_tokenizer(Path(model))
    pool = BoundedPool()
    with tempfile.TemporaryDirectory(prefix="actcache-benchmarks-") as folder:
        began = time.perf_counter()
        tokenise(open_store(folder), resolved.plan, resolved.corpus, lambda: tokenizer, pool, lambda _: None)
        took = time.perf_counter() - began
    pool.shutdown()
    return took


def _bare(model: str, corpus: str) -> float:
    from actcache.jobs.encode import load_tokenizer

    encode = load_tokenizer(Path(model)).backend_tokenizer.encode_batch_fast
    took = 0.0
    with open(corpus, encoding="utf-8") as lines:
        for texts in iter(partial(_texts, lines), []):
            began = time.perf_counter()
            encode(texts)
            took += time.perf_counter() - began
    return took


def _texts(lines: Iterator[str]) -> list[str]:
    return [json.loads(line)["text"] for _, line in zip(range(TEXTS_AT_ONCE), lines, strict=False)]


def _side() -> None:
    side, model, corpus = sys.argv[1:]
    work = {OURS: _tokenise, PEER: _bare}[side]
    before = resource.getrusage(resource.RUSAGE_SELF)
    seconds = work(model, corpus)
    used = resource.getrusage(resource.RUSAGE_SELF)
    processor = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps({"seconds": seconds, "processor": processor, "peak_bytes": used.ru_maxrss * 1024}))


if __name__ == "__main__":
    _side()
