"""The block stage of a build ÷ a bare forward pass on the same batches by the same model object."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from actcache.cache.publish import publish, publish_metadata
from actcache.cache.reader import ArrayReader
from actcache.cache.store import Store, open_store
from actcache.jobs.batches import TokenBatch
from actcache.jobs.blocks import BlockRunner
from actcache.jobs.encode import load_tokenizer
from actcache.jobs.feeds import TokenFeed
from actcache.jobs.parts import ModelParts
from actcache.jobs.pending import PendingBlocks
from actcache.jobs.pool import BoundedPool
from actcache.jobs.progress import Silent
from actcache.jobs.resolve import Resolved, resolve
from actcache.jobs.run import loaded_parts
from actcache.jobs.tokenise import tokenise
from actcache.schemas.grid import Grid
from actcache.schemas.plan import PLAN_KEY
from actcache.schemas.spec import Spec
from benchmarks.material import CONTEXT, CORPUS, TINY_GPT, Material, random_gpt2, random_text
from benchmarks.ratio import Result, Times, alternate, compare, timed

TITLE = "build: the block stage (capture, statistics, encoding, storing) ÷ a bare forward pass, tokens/s"
NOTE = """  float32, sites 'resid', files in memory where there is /dev/shm; loading, tokenising, proof, replay and seal are outside.
  The blocks are small, so that the end, when nothing is left to compute beside the storing, weighs as little as in a long build."""
GOAL = 0.95
FULL, BACKBONE = "bare forward pass", "backbone without logits"


def run(material: Material) -> Iterator[Result]:
    """Compare both models."""
    print(NOTE)
    folder = material.folder / "build"
    big = random_gpt2(folder / "gpt2", layers=8, width=512)
    text = random_text(folder / "random.txt", 32 * CONTEXT)
    spec = Spec(model=str(big), corpus=(text,), context=CONTEXT, batch_size=4, block_tokens=4 * CONTEXT)
    yield from _compare(material, "random GPT-2 of 8 × 512", resolve(spec), GOAL)
    if not (TINY_GPT / "model.safetensors").is_file():
        print("  tiny-gpt: skipped, examples/tiny-gpt has no model")
        return
    spec = Spec(
        model=str(TINY_GPT), corpus=(CORPUS,), context=CONTEXT, max_tokens=1 << 15, block_tokens=1 << 12, batch_size=8
    )
    yield from _compare(material, "tiny-gpt, 6 × 128", resolve(spec), None)


def _compare(material: Material, name: str, resolved: Resolved, goal: float | None) -> Iterator[Result]:
    parts = loaded_parts(resolved)
    with tempfile.TemporaryDirectory(prefix="actcache-benchmarks-", dir=material.memory) as folder:
        times, tokens = _times(material.seconds, resolved, parts, _stores(Path(folder)))
    for peer in (FULL, BACKBONE):
        yield compare("build", f"{name} ÷ {peer}", times, "build", peer, goal=goal, amount=tokens, unit="tokens/s")


def _times(seconds: float, resolved: Resolved, parts: ModelParts, stores: Iterator[Store]) -> tuple[Times, int]:
    """The times of the three sides, and the tokens of each."""
    prepared = _prepare(next(stores), resolved, parts)
    batches = [
        batch
        for block in range(prepared.grid.n_blocks)
        for batch in prepared.feed.batches(*prepared.grid.block_range(block))
    ]
    prepared.close()

    def build() -> float:
        prepared = _prepare(next(stores), resolved, parts)
        took = timed(PendingBlocks(prepared.store, prepared.grid, prepared.runner, Silent()).run)()
        prepared.close()
        return took

    times = alternate(
        {
            FULL: timed(lambda: _forward(parts.model, batches)),
            "build": build,
            BACKBONE: timed(lambda: _forward(parts.model.get_submodule(parts.model.base_model_prefix), batches)),
        },
        seconds,
    )
    return times, prepared.grid.n_tokens


@torch.inference_mode()
def _forward(module: torch.nn.Module, batches: list[TokenBatch]) -> None:
    for batch in batches:
        module(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)


@dataclass(frozen=True)
class _Prepared:
    """A build up to its first block."""

    store: Store
    grid: Grid
    feed: TokenFeed
    runner: BlockRunner
    pool: BoundedPool

    def close(self) -> None:
        """End the threads and remove what was stored."""
        self.pool.shutdown()
        shutil.rmtree(self.store.location.path)


def _prepare(store: Store, resolved: Resolved, parts: ModelParts) -> _Prepared:
    pool = BoundedPool()
    publish(store, PLAN_KEY, resolved.plan.to_bytes())
    load = partial(load_tokenizer, resolved.source.folder)
    tokens = tokenise(store, resolved.plan, resolved.corpus, load, pool, lambda _: None)
    grid = Grid.of(resolved.plan, tokens)
    sequence_start = ArrayReader(store, grid.token_arrays()["sequence_start"]).read()
    for layout in grid.block_arrays():
        publish_metadata(store, layout)
    feed = TokenFeed(store, grid, sequence_start, parts.device)
    return _Prepared(store, grid, feed, BlockRunner(store, grid, parts, feed, pool), pool)


def _stores(folder: Path) -> Iterator[Store]:
    return (open_store(folder / str(number)) for number in itertools.count())
