"""Carrying out a plan: tokenise, blocks, replay, seal. This half of a build needs torch."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from actcache.cache.publish import publish, publish_array, publish_document, publish_metadata
from actcache.cache.reader import ArrayReader
from actcache.cache.seal import ENVIRONMENTS, NOT_REPLAYED, Sealed, head_layout, seal
from actcache.cache.store import Store
from actcache.jobs.batches import recomputed_fraction
from actcache.jobs.blocks import BlockRunner
from actcache.jobs.encode import load_tokenizer
from actcache.jobs.environment import environment
from actcache.jobs.model import head_parts, load_parts
from actcache.jobs.parts import ModelParts
from actcache.jobs.pool import BoundedPool
from actcache.jobs.progress import Progress, Reporter
from actcache.jobs.proof import prove
from actcache.jobs.replay import replay
from actcache.jobs.resolve import Resolved
from actcache.jobs.tokenise import tokenise
from actcache.schemas.array import head_group
from actcache.schemas.canonical import canonical, sha256
from actcache.schemas.errors import NotFound
from actcache.schemas.grid import Grid
from actcache.schemas.plan import StoredObject
from actcache.schemas.receipt import HEAD_RECEIPT, RECEIPTS, HeadArray, HeadReceipt, Receipt, receipt_key
from actcache.schemas.root import ROOT_KEY

RECOMPUTED_WARNING = 0.03


@dataclass(frozen=True)
class Outcome:
    """What a run did."""

    sealed: Sealed | None
    blocks_run: int
    bytes_written: int
    recomputed: float


def run_plan(store: Store, resolved: Resolved, reporter: Reporter, tokenise_only: bool = False) -> Outcome:
    """Carry out a plan that is in place, from wherever it stands.

    Raises:
        ActcacheError: whatever stops it; running again resumes.
    """
    began = datetime.now(UTC)
    plan = resolved.plan
    pool = BoundedPool()
    try:
        reporter.progress(Progress("tokenise"))
        tokens = tokenise(
            store,
            plan,
            resolved.corpus,
            lambda: _tokenizer(resolved),
            pool,
            lambda count: reporter.progress(Progress("tokenise", count)),
            reporter.note,
        )
        grid = Grid.of(plan, tokens)
        sequence_start = ArrayReader(store, grid.token_arrays()["sequence_start"]).read()
        recomputed = recomputed_fraction(sequence_start, grid.n_tokens, grid.block_tokens)
        if tokenise_only:
            return Outcome(None, 0, 0, recomputed)
        if recomputed > RECOMPUTED_WARNING:
            reporter.note(
                f"{recomputed:.1%} more tokens are run than stored, since sequences cross blocks of {grid.block_tokens} tokens; "
                "larger blocks (--block-tokens) cost less"
            )
        parts = load_parts(resolved.checkpoint.folder, plan.spec)
        resolved.check_model()
        runner = BlockRunner(store, grid, parts, sequence_start, pool)
        for layout in grid.block_arrays():
            publish_metadata(store, layout)
        _prepare(store, grid, parts, runner, pool)
        blocks = _Blocks(store, grid, runner, reporter)
        blocks.run()
        if store.get_or_none(ROOT_KEY) is None:
            reporter.progress(replace(blocks.state, stage="replay"))
            result = replay(store, grid, parts, sequence_start)
        else:
            result = NOT_REPLAYED
        reporter.progress(replace(blocks.state, stage="seal"))
        return Outcome(seal(store, pool, result, began), blocks.count, blocks.state.bytes_written, recomputed)
    finally:
        pool.shutdown(cancel_futures=True)


def _tokenizer(resolved: Resolved) -> Any:
    if resolved.plan.spec.tokenizer is None:
        return None
    tokenizer = load_tokenizer(resolved.checkpoint.folder)
    resolved.check_tokenizer()
    return tokenizer


def _prepare(store: Store, grid: Grid, parts: ModelParts, runner: BlockRunner, pool: BoundedPool) -> None:
    """Prove the tensors, record the environment and store the head."""
    spec = grid.plan.spec
    first = runner.batches(*grid.block_range(0))[0]
    record = canonical(environment(parts, spec, prove(parts, first, spec.execution.compute_dtype)))
    publish(store, f"{ENVIRONMENTS}{sha256(record)}.json", record)
    if not spec.head or store.get_or_none(HEAD_RECEIPT) is not None:
        return
    head = head_parts(parts)
    stored: list[StoredObject] = [publish_document(store, "head/zarr.json", head_group(head.operations))]
    arrays = {}
    for name, array in head.arrays.items():
        layout = head_layout(name, array.shape, array.dtype.name)
        stored += publish_array(store, layout, array, pool)
        arrays[name] = HeadArray(shape=array.shape, dtype=layout.dtype)
    publish(
        store, HEAD_RECEIPT, HeadReceipt(arrays=arrays, operations=head.operations, objects=tuple(stored)).to_bytes()
    )


class _Blocks:
    """Runs the blocks that have no receipt: one computes while the one before is stored, never more."""

    def __init__(self, store: Store, grid: Grid, runner: BlockRunner, reporter: Reporter) -> None:
        self._store = store
        self._grid = grid
        self._runner = runner
        self._reporter = reporter
        done = set(store.list(RECEIPTS))
        self._pending = [block for block in range(grid.n_blocks) if receipt_key(block) not in done]
        before = grid.n_tokens - sum(self._length(block) for block in self._pending)
        self._storing: Future[Receipt] | None = None
        self.count = 0
        self.state = Progress(
            "blocks", before, grid.n_tokens, before, 0, grid.n_blocks - len(self._pending), grid.n_blocks
        )

    def run(self) -> None:
        """Run every pending block.

        Two builds at once would run the same blocks side by side: whoever finds a block done by another goes on from
        the far end.
        """
        self._reporter.progress(self.state)
        from_the_end = False
        with ThreadPoolExecutor(1, thread_name_prefix="actcache-publish") as background:
            while self._pending:
                block = self._pending.pop(-1 if from_the_end else 0)
                if self._done_by_another(block):
                    from_the_end = True
                    continue
                computed = self._runner.compute(block, self._tick)
                self._wait()
                self._storing = background.submit(self._runner.publish, computed)
            self._wait()

    def _done_by_another(self, block: int) -> bool:
        try:
            self._store.size(receipt_key(block))
        except NotFound:
            return False
        self._reporter.note(f"block {block} was finished by another build at the same URL")
        self._tick(self._length(block))
        self.state = replace(self.state, blocks=self.state.blocks + 1)
        return True

    def _wait(self) -> None:
        """Wait until the block before is stored."""
        if self._storing is None:
            return
        receipt = self._storing.result()
        self._storing = None
        self.count += 1
        written = self.state.bytes_written + sum(entry.size for entry in receipt.objects)
        self.state = replace(self.state, blocks=self.state.blocks + 1, bytes_written=written)
        if receipt.mixed_attempts:
            self._reporter.note(
                f"block {receipt.block}: {len(receipt.mixed_attempts)} objects of an earlier attempt differ in their last bits "
                "from this one's and were kept (mixed_attempts)"
            )
        self._reporter.progress(self.state)

    def _tick(self, tokens: int) -> None:
        if self._storing is not None and self._storing.done():
            self._storing.result()  # a store that failed ends the build now, not after this block
        self.state = replace(self.state, tokens=self.state.tokens + tokens)
        self._reporter.progress(self.state)

    def _length(self, block: int) -> int:
        start, stop = self._grid.block_range(block)
        return stop - start
