"""What a build tells while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

Stage = Literal["tokenise", "blocks", "replay", "seal"]


@dataclass(frozen=True)
class Progress:
    """How far a stage is. `tokens_total` is None while the corpus is being counted; `tokens_resumed` were done before."""

    stage: Stage
    tokens: int = 0
    tokens_total: int | None = None
    tokens_resumed: int = 0
    bytes_written: int = 0
    blocks: int = 0
    blocks_total: int | None = None


class Reporter(Protocol):
    """Who wants to know."""

    def progress(self, state: Progress) -> None:
        """Called often; show it or not."""

    def note(self, text: str) -> None:
        """Something that a user should know, on one line."""


class Silent:
    """Shows nothing."""

    def progress(self, state: Progress) -> None:
        """Shows nothing."""

    def note(self, text: str) -> None:
        """Shows nothing."""
