"""The log of a build: a JSON object a line, with the time, of all that happened."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import IO, Any

from actcache.jobs.forecast import Forecast
from actcache.jobs.progress import Progress, Reporter
from actcache.schemas.errors import InvalidInput, StoreError

SECONDS_BETWEEN_STATES = 10.0


class BuildLog:
    """The file of a log, begun with its first line: who finds nothing to do leaves none.

    It is where the user says, or in `$XDG_STATE_HOME/actcache` (`~/.local/state/actcache`); there it is left out, or ends,
    where it cannot be written.
    """

    def __init__(self, url: str, asked: str | None) -> None:
        self.path = _default(url) if asked is None else Path(asked).expanduser()
        self._must = asked is not None
        self._file: IO[str] | None = None
        self._given_up = False
        self._lock = Lock()
        if self._must:
            self._open()

    def write(self, name: str, **facts: Any) -> bool:
        """Write a line. True if it is the first one.

        Raises:
            StoreError: it cannot be written where the user wants it; that is told once.
        """
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": name, **facts}
        with self._lock:
            first = self._file is None and not self._given_up and self._may_open()
            if self._file is None:
                return False
            try:
                self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            except OSError as error:
                self._given_up = True
                self._let_go()
                if self._must:
                    raise StoreError(f"--log {self.path}: cannot be written: {error.strerror}") from None
                return False
        return first

    def close(self) -> None:
        """End the file."""
        self._let_go()

    def _let_go(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # what is not written yet is lost, and that was told
                file.close()

    def _may_open(self) -> bool:
        try:
            self._open()
        except InvalidInput:
            self._given_up = True
            return False
        return True

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # the name of a file may hold bytes that are no text: they are written as JSON escapes them
            self._file = self.path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
        except OSError as error:
            raise InvalidInput(f"--log {self.path}: cannot be written: {error.strerror}") from None


def _default(url: str) -> Path:
    base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "actcache"
    name = "".join(c if c.isalnum() or c in ".-_" else "-" for c in url.rstrip("/").rsplit("/", 1)[-1])[:80]
    return base / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{name}-{os.getpid()}.jsonl"


class Logged:
    """A reporter that also writes all it hears to a log."""

    def __init__(self, inner: Reporter, log: BuildLog) -> None:
        self._inner = inner
        self._log = log
        self._stage: str | None = None
        self._last = 0.0

    def progress(self, state: Progress) -> None:
        """Pass on; log it now and then, once there is something."""
        self._inner.progress(state)
        if state.stage == "tokenise" and not state.tokens:
            return
        now = time.monotonic()
        if state.stage == self._stage and now - self._last < SECONDS_BETWEEN_STATES:
            return
        self._stage, self._last = state.stage, now
        self.write(
            "progress",
            stage=state.stage,
            tokens=state.tokens,
            tokens_total=state.tokens_total,
            bytes=state.bytes_written,
            blocks=state.blocks,
            blocks_total=state.blocks_total,
            failed=state.failed,
            retried=state.retried,
            workers=state.workers,
            busy=state.usage.told,
            limit=state.usage.limit,
        )

    def note(self, text: str) -> None:
        """Pass on and log."""
        self._inner.note(text)
        self.write("note", text=text)

    def event(self, name: str, **facts: Any) -> None:
        """Pass on and log."""
        self._inner.event(name, **facts)
        self.write(name, **facts)

    def forecast(self, forecast: Forecast) -> None:
        """Pass on and log."""
        self._inner.forecast(forecast)
        self.write("forecast", **dataclasses.asdict(forecast))

    def write(self, name: str, **facts: Any) -> None:
        """Write a line; tell where, once."""
        if self._log.write(name, **facts):
            self._inner.note(f"log: {self._log.path}")
