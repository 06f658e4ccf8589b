"""Handing out the blocks of a build that are not stored yet, until all of them are."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import replace

from actcache.cache.store import Store
from actcache.jobs.engine import Engine, Event, Failed, Ticked, is_final
from actcache.jobs.progress import Progress, Reporter
from actcache.jobs.stages import Usage
from actcache.jobs.worker import Done
from actcache.schemas.errors import StoreError
from actcache.schemas.grid import Grid
from actcache.schemas.part import Part
from actcache.schemas.receipt import receipt_key, receipts_of


class PendingBlocks:
    """The blocks that have no receipt, of all or of one part."""

    def __init__(self, store: Store, grid: Grid, part: Part | None, reporter: Reporter) -> None:
        self._grid = grid
        self._reporter = reporter
        done = set(store.list(receipts_of(grid.records)))
        self.blocks = blocks = range(grid.n_blocks) if part is None else part.blocks(grid.n_blocks)
        self._pending = deque(block for block in blocks if receipt_key(block, grid.records) not in done)
        self._under_way: dict[int, int] = {}
        self._attempts: Counter[int] = Counter()
        self._stored = sum(map(self._length, blocks)) - sum(map(self._length, self._pending))
        self._from_the_end = False
        self._usage = Usage()
        self.count = 0
        self.state = Progress(
            "blocks",
            self._stored,
            sum(map(self._length, blocks)),
            self._stored,
            0,
            len(blocks) - len(self._pending),
            len(blocks),
        )

    @property
    def tokens_left(self) -> int:
        """Tokens of the blocks that are not stored."""
        return sum(map(self._length, (*self._pending, *self._under_way)))

    def __len__(self) -> int:
        return len(self._pending) + len(self._under_way)

    def run(self, engine: Engine) -> None:
        """Have every pending block run.

        Two builds at once would run the same blocks side by side: whoever finds a block done by another goes on from
        the far end.

        Raises:
            ActcacheError: a block failed, and trying again is of no use or was of none.
        """
        self._tell(engine)
        while self:
            while self._pending and len(self._under_way) < engine.window:
                block = self._pending.pop() if self._from_the_end else self._pending.popleft()
                self._under_way[block] = 0
                engine.submit(block)
            event = engine.next()
            if event is not None:
                self._take(event, engine)
            self._tell(engine)

    def _take(self, event: Event, engine: Engine) -> None:
        if isinstance(event, Ticked):
            self._under_way[event.block] += event.tokens
            return
        del self._under_way[event.block]
        if isinstance(event, Done):
            self._done(event)
        else:
            self._failed(event, engine)

    def _done(self, done: Done) -> None:
        self._stored += done.tokens
        self._usage += done.usage
        self.state = replace(
            self.state, blocks=self.state.blocks + 1, bytes_written=self.state.bytes_written + done.bytes_written
        )
        if done.found:
            self._from_the_end = True
            self._reporter.note(f"block {done.block} was finished by another build at the same URL")
        else:
            self.count += 1
        if done.mixed_attempts:
            self._reporter.note(
                f"block {done.block}: {done.mixed_attempts} objects of an earlier attempt differ in their last bits "
                "from this one's and were kept (mixed_attempts)"
            )
        self._reporter.event(
            "block",
            block=done.block,
            tokens=done.tokens,
            bytes=done.bytes_written,
            worker=done.worker,
            found=done.found,
            seconds=round(done.usage.seconds, 3),
            busy=done.usage.told,
        )

    def _failed(self, failed: Failed, engine: Engine) -> None:
        error = failed.error
        self._attempts[failed.block] += failed.attempts
        self.state = replace(self.state, failed=self.state.failed + 1)
        again = not is_final(error, failed.elsewhere) and self._attempts[failed.block] <= engine.retries
        told = " ".join(f"{type(error).__name__}: {error}".split())
        self._reporter.event("failed", block=failed.block, error=told, again=again)
        if not again:
            raise StoreError(f"block {failed.block}: {error}") if type(error) is StoreError else error
        self.state = replace(self.state, retried=self.state.retried + 1)
        self._reporter.note(f"block {failed.block} failed and is tried again: {told[:300]}")
        self._pending.append(failed.block)

    def _tell(self, engine: Engine) -> None:
        tokens = self._stored + sum(self._under_way.values())
        self.state = replace(self.state, tokens=tokens, workers=engine.workers, usage=self._usage)
        self._reporter.progress(self.state)

    def _length(self, block: int) -> int:
        start, stop = self._grid.block_range(block)
        return stop - start
