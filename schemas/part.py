"""A part of a build's blocks: what one of n workers that know nothing of each other runs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from actcache.schemas.errors import InvalidInput
from actcache.schemas.plan import RECORDS


@dataclass(frozen=True)
class Part:
    """Part `number` of `of`, counted from 1: blocks that lie side by side."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `i/n`.

        Raises:
            InvalidInput: it is no such part.
        """
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise InvalidInput(f"part {text!r}: give i/n with i from 1 to n, as in 3/8")
        return cls(int(found[1]), int(found[2]))

    def blocks(self, n_blocks: int) -> range:
        """The part's own blocks of so many."""
        return range((self.number - 1) * n_blocks // self.of, self.number * n_blocks // self.of)

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def parts_of(records: str = RECORDS) -> str:
    """Folder where builds by parts say in how many; the seal removes it."""
    return f"{records}parts/"


def parts_with(blocks: set[int], n_blocks: int, of: int) -> list[Part]:
    """Which of so many parts have any of these blocks."""
    every = (Part(number, of) for number in range(1, of + 1))
    return [part for part in every if not blocks.isdisjoint(part.blocks(n_blocks))]
