"""Progress of a build: a bar on a terminal, plain lines elsewhere, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from actcache.clients.cli.build_log import BuildLog, Logged
from actcache.clients.cli.forecast import lines
from actcache.jobs.forecast import Forecast
from actcache.jobs.progress import Progress, Reporter

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0
_STAGES = {"tokenise": "tokenising", "blocks": "capturing", "replay": "replaying", "seal": "sealing"}


@contextmanager
def reporter(log: BuildLog) -> Iterator[Reporter]:
    """A reporter that suits standard error, and writes the log."""
    with ExitStack() as stack:
        stack.callback(log.close)
        logged = Logged(stack.enter_context(_on_terminal()) if sys.stderr.isatty() else Lines(), log)
        try:
            yield logged
        except BaseException as error:
            log.write("ended", error=" ".join(f"{type(error).__name__}: {error}".split()))
            raise


@contextmanager
def _on_terminal() -> Iterator[OnTerminal]:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.text import Text

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=20),
        TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    console = Console(stderr=True)
    bar, below = Bar(*columns, console=console), Text()
    with Live(Group(bar, below), console=console, refresh_per_second=4):
        yield OnTerminal(bar, below)


class Speed:
    """Tokens a second of the current stage, not counting those done before this run."""

    def __init__(self) -> None:
        self._stage: str | None = None
        self._since = 0.0

    def of(self, state: Progress) -> float:
        """Tokens a second up to now."""
        now = time.monotonic()
        if state.stage != self._stage:
            self._stage, self._since = state.stage, now
        return (state.tokens - state.tokens_resumed) / max(now - self._since, 1e-3)


def facts(state: Progress, speed: float) -> str:
    """A state in words."""
    if state.stage == "tokenise":
        return f"{state.tokens:,} tokens"
    if state.stage != "blocks":
        return f"{state.tokens:,} tokens  {state.bytes_written / 1e9:.2f} GB written"
    total = state.tokens_total or 0
    return (
        f"{state.tokens:,}/{total:,} tokens  {speed:,.0f} tokens/s  {state.bytes_written / 1e9:.2f} GB written  "
        f"block {state.blocks}/{state.blocks_total}"
    )


def usage(state: Progress) -> str:
    """How busy each stage of the workers is, and which is the limit. Empty before a block is stored."""
    used, limit = state.usage, state.usage.limit
    if state.stage != "blocks" or limit is None:
        return ""
    shares = "  ".join(f"{stage} {share:.0%}" for stage, share in used.shares.items())
    workers = f"{state.workers} workers  " if state.workers != 1 else ""
    failed = f"{state.failed} failed, {state.retried} tried again  " if state.failed else ""
    return f"{workers}{failed}busy: {shares}  limit: {limit}"


class OnTerminal:
    """A bar."""

    def __init__(self, bar: Bar, below: Text) -> None:
        self._bar = bar
        self._below = below
        self._task = bar.add_task("starting", total=None, facts="")
        self._speed = Speed()
        self._stage: str | None = None

    def progress(self, state: Progress) -> None:
        """Redraw."""
        speed = self._speed.of(state)
        if state.stage != self._stage:
            self._stage = state.stage
            self._bar.reset(self._task, total=state.tokens_total, completed=state.tokens)
        self._bar.update(
            self._task,
            description=_STAGES[state.stage],
            total=state.tokens_total,
            completed=state.tokens if state.tokens_total else 0,
            facts=facts(state, speed),
        )
        self._below.plain = usage(state)

    def note(self, text: str) -> None:
        """A line above the bar."""
        self._bar.console.print(f"note: {text}", markup=False, highlight=False)

    def event(self, name: str, **facts: Any) -> None:
        """Shows nothing: events are for logs."""

    def forecast(self, forecast: Forecast) -> None:
        """Lines above the bar."""
        for line in lines(forecast):
            self._bar.console.print(line, markup=False, highlight=False)


class Lines:
    """A line when a stage begins and every ten seconds, with the time left."""

    def __init__(self) -> None:
        self._stage: str | None = None
        self._last = 0.0
        self._speed = Speed()

    def progress(self, state: Progress) -> None:
        """Print, if it is time to."""
        now = time.monotonic()
        speed = self._speed.of(state)
        finished = state.stage == "blocks" and state.blocks == state.blocks_total
        if state.stage == self._stage and now - self._last < SECONDS_BETWEEN_LINES and not finished:
            return
        left = ""
        if state.stage == "blocks" and state.stage == self._stage and speed > 0 and not finished:
            left = f"  {((state.tokens_total or 0) - state.tokens) / speed:,.0f} s left"
        self._stage, self._last = state.stage, now
        print(f"{_STAGES[state.stage]}: {facts(state, speed)}{left}", file=sys.stderr, flush=True)
        if told := usage(state):
            print(f"  {told}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """A line."""
        print(f"note: {text}", file=sys.stderr, flush=True)

    def event(self, name: str, **facts: Any) -> None:
        """Shows nothing: events are for logs."""

    def forecast(self, forecast: Forecast) -> None:
        """Lines."""
        for line in lines(forecast):
            print(line, file=sys.stderr, flush=True)
