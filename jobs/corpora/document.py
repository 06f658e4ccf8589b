"""What reading a corpus gives: documents, and rows that are none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Messages = list[dict[str, Any]]
Content = str | np.ndarray | Messages
Reason = Literal[
    "not UTF-8",
    "not JSON",
    "not CSV",
    "field missing",
    "wrong type",
    "half a surrogate pair",
    "empty",
    "refused by the chat template",
    "too long to tokenise",
]


@dataclass(frozen=True, slots=True)
class Document:
    """One corpus row: the index of its source, of the row in it, and its text, token ids (1-D, integers) or messages.

    A document of many tokens comes in several pieces, one after the other; `last` marks the end.
    """

    source: int
    row: int
    content: Content
    last: bool = True


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is no document. `message` names the place, says what is wrong and the way out."""

    source: int
    row: int
    reason: Reason
    message: str


class Bad(Exception):
    """Why a row is no document; who knows the place makes a `BadRow` of it."""

    def __init__(self, reason: Reason, what: str) -> None:
        super().__init__(what)
        self.reason = reason

    def at(self, source: int, row: int, where: str) -> BadRow:
        """The bad row."""
        return BadRow(source, row, self.reason, f"{where}: {self}")
