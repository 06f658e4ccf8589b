"""What a build tells while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from actcache.jobs.forecast import Forecast
from actcache.jobs.stages import Usage

Step = Literal["tokenise", "blocks", "replay", "seal"]


@dataclass(frozen=True)
class Progress:
    """How far a build is. `tokens_total` is None while the corpus is being counted; `tokens_resumed` were done before.

    `failed` counts attempts at blocks, `retried` those of them that were made anew. `usage` is that of all workers together.
    """

    stage: Step
    tokens: int = 0
    tokens_total: int | None = None
    tokens_resumed: int = 0
    bytes_written: int = 0
    blocks: int = 0
    blocks_total: int | None = None
    failed: int = 0
    retried: int = 0
    workers: int = 1
    usage: Usage = field(default_factory=Usage)


class Reporter(Protocol):
    """Who wants to know."""

    def progress(self, state: Progress) -> None:
        """Called often; show it or not."""

    def note(self, text: str) -> None:
        """Something that a user should know, on one line."""

    def event(self, name: str, **facts: Any) -> None:
        """Something that happened, for a log: plain data."""

    def forecast(self, forecast: Forecast) -> None:
        """What is left to be done will take this."""


def untold(tokens: int) -> None:
    """Who counts tokens and has nobody to tell calls this."""


class Silent:
    """Shows nothing."""

    def progress(self, state: Progress) -> None:
        """Shows nothing."""

    def note(self, text: str) -> None:
        """Shows nothing."""

    def event(self, name: str, **facts: Any) -> None:
        """Shows nothing."""

    def forecast(self, forecast: Forecast) -> None:
        """Shows nothing."""
