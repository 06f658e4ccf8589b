"""The block stage of a build ÷ a bare forward pass on the same batches by the same model object."""

from __future__ import annotations

import copy
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from actcache.cache.publish import publish, publish_metadata
from actcache.cache.reader import ArrayReader
from actcache.cache.store import Store, open_store
from actcache.jobs.anatomy import Studied
from actcache.jobs.batches import TokenBatch
from actcache.jobs.compiled import compile_blocks
from actcache.jobs.encode import load_tokenizer
from actcache.jobs.engine import in_process
from actcache.jobs.feeds import TokenFeed
from actcache.jobs.loaded import loaded_parts
from actcache.jobs.parts import ModelParts
from actcache.jobs.pending import PendingBlocks
from actcache.jobs.pool import BoundedPool
from actcache.jobs.progress import Silent
from actcache.jobs.resolve import Resolved, resolve
from actcache.jobs.tokenise import tokenise
from actcache.jobs.worker import Worker
from actcache.schemas.anatomy import Anatomy
from actcache.schemas.grid import Grid
from actcache.schemas.plan import PLAN_KEY
from actcache.schemas.spec import Spec
from benchmarks.material import CONTEXT, CORPUS, TINY_GPT, Material, random_gpt2, random_text
from benchmarks.ratio import Result, Times, alternate, compare, timed

TITLE = "build: the block stage (capture, statistics, encoding, storing) ÷ a bare forward pass, tokens/s"
NOTE = """  float32, sites 'resid', files in memory where there is /dev/shm; loading, tokenising, proof, replay and seal are outside.
  The blocks are small, so that the end, when nothing is left to compute beside the storing, weighs as little as in a long build."""
GOAL = 0.97
FULL, BACKBONE, COMPILED = "bare forward pass", "backbone without logits", "backbone, blocks compiled"


def run(material: Material) -> Iterator[Result]:
    """Compare both models."""
    print(NOTE)
    folder = material.folder / "build"
    big = random_gpt2(folder / "gpt2", layers=8, width=512)
    text = random_text(folder / "random.txt", 32 * CONTEXT)
    spec = Spec(model=str(big), corpus=(text,), context=CONTEXT, batch_tokens=4 * CONTEXT, block_tokens=4 * CONTEXT)
    yield from _compare(material, "random GPT-2 of 8 × 512", resolve(spec), GOAL)
    if not (TINY_GPT / "model.safetensors").is_file():
        print("  tiny-gpt: skipped, examples/tiny-gpt has no model")
        return
    spec = Spec(
        model=str(TINY_GPT),
        corpus=(CORPUS,),
        context=CONTEXT,
        max_tokens=1 << 15,
        block_tokens=1 << 12,
        batch_tokens=1 << 11,
    )
    yield from _compare(material, "tiny-gpt, 6 × 128", resolve(spec), None)


def _compare(material: Material, name: str, resolved: Resolved, goal: float | None) -> Iterator[Result]:
    parts = loaded_parts(resolved)
    with tempfile.TemporaryDirectory(prefix="actcache-benchmarks-", dir=material.memory) as folder:
        times, tokens = _times(material.seconds, resolved, parts, _stores(Path(folder)))
    for peer in (FULL, BACKBONE):
        yield compare("build", f"{name} ÷ {peer}", times, "build", peer, goal=goal, amount=tokens, unit="tokens/s")
    yield compare("build", f"{name}, {COMPILED} ÷ not", times, COMPILED, BACKBONE, amount=tokens, unit="tokens/s")


def _times(seconds: float, resolved: Resolved, parts: ModelParts, stores: Iterator[Store]) -> tuple[Times, int]:
    """The times of the three sides, and the tokens of each."""
    store = next(stores)
    grid, starts = _tokenised(store, resolved)
    feed = TokenFeed.stored(store, grid, starts, parts.device)
    batches = [batch for block in range(grid.n_blocks) for batch in feed.batches(*grid.block_range(block))]

    backbone = parts.model.get_submodule(parts.model.base_model_prefix)
    compiled = copy.deepcopy(backbone)
    compile_blocks(ModelParts(compiled, _without_prefix(parts)))

    def build() -> float:
        store = next(stores)
        grid, _ = _tokenised(store, resolved)
        for layout in grid.block_arrays():
            publish_metadata(store, layout)
        worker = Worker(store, grid, replace(resolved, studied=Studied(parts.anatomy, parts.model)))
        worker.prepare()
        with in_process(lambda: worker) as engine:
            took = timed(lambda: PendingBlocks(store, grid, None, Silent()).run(engine))()
        shutil.rmtree(store.location.path)
        return took

    times = alternate(
        {
            FULL: timed(lambda: _forward(parts.model, batches)),
            "build": build,
            BACKBONE: timed(lambda: _forward(backbone, batches)),
            COMPILED: timed(lambda: _forward(compiled, batches)),
        },
        seconds,
    )
    return times, grid.n_tokens


def _without_prefix(parts: ModelParts) -> Anatomy:
    """The anatomy with the blocks' paths within the backbone."""
    prefix = f"{parts.model.base_model_prefix}."
    return parts.anatomy.model_copy(
        update={"blocks": tuple(path.removeprefix(prefix) for path in parts.anatomy.blocks)}
    )


@torch.inference_mode()
def _forward(module: torch.nn.Module, batches: list[TokenBatch]) -> None:
    for batch in batches:
        module(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)


def _tokenised(store: Store, resolved: Resolved) -> tuple[Grid, np.ndarray]:
    """A store with the tokens of a build, its grid and the row splits of its sequences."""
    publish(store, PLAN_KEY, resolved.plan.to_bytes())
    load = partial(load_tokenizer, resolved.source.folder)
    pool = BoundedPool()
    tokens = tokenise(store, resolved.plan, resolved.corpus, load, pool, lambda _: None)
    pool.shutdown()
    grid = Grid.of(resolved.plan, tokens)
    return grid, ArrayReader(store, grid.token_arrays()["sequence_start"]).read()


def _stores(folder: Path) -> Iterator[Store]:
    return (open_store(folder / str(number)) for number in itertools.count())
