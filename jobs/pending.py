"""The blocks of a build that are not stored yet, run one after the other while the one before is stored."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from actcache.cache.store import Store
from actcache.jobs.blocks import BlockRunner
from actcache.jobs.progress import Progress, Reporter
from actcache.schemas.errors import NotFound
from actcache.schemas.grid import Grid
from actcache.schemas.receipt import Receipt, receipt_key, receipts_of


class PendingBlocks:
    """Runs the blocks that have no receipt: one computes while the one before is stored, never more."""

    def __init__(self, store: Store, grid: Grid, runner: BlockRunner, reporter: Reporter) -> None:
        self._store = store
        self._grid = grid
        self._runner = runner
        self._reporter = reporter
        done = set(store.list(receipts_of(grid.records)))
        self._pending = [block for block in range(grid.n_blocks) if receipt_key(block, grid.records) not in done]
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
            self._store.size(receipt_key(block, self._grid.records))
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
