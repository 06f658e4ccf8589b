"""The field of a row that holds the document, and what counts as one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from actcache.jobs.corpora.document import Bad, Content, Messages

NAMES_SHOWN, NAME_SHOWN = 12, 40


@dataclass(frozen=True)
class Field:
    """A field by its name, and what it holds."""

    name: str
    holds: Literal["text", "tokens", "messages"] = "text"

    def of(self, row: Any) -> Content:
        """The document of a row with named fields.

        Raises:
            Bad: there is none.
        """
        if not isinstance(row, dict):
            raise Bad("wrong type", self._none(f"there is: {type(row).__name__}"))
        if row.get(self.name) is None:
            raise Bad("field missing", self.absent(row))
        return self.content(row[self.name], row)

    def content(self, value: Any, names: Collection[str] = ()) -> Content:
        """The document that is a field's value.

        Raises:
            Bad: it is none.
        """
        found = _READ[self.holds](value)
        if found is None:
            raise Bad("wrong type", self._none(f"it holds {type(value).__name__}; there is: {self._shown(names)}"))
        if len(found) == 0:
            raise Bad("empty", f"field {self.name!r} is empty")
        return found

    def absent(self, names: Collection[str]) -> str:
        """What to say where the field holds no such thing: which fields there are, and the option that chooses."""
        return self._none(f"there is: {self._shown(names)}")

    def _shown(self, names: Collection[str]) -> str:
        names = list(names) or [self.name]
        return ", ".join([_shown(str(name)) for name in names[:NAMES_SHOWN]] + ["…"] * (len(names) > NAMES_SHOWN))

    def _none(self, there: str) -> str:
        what = {"text": "text", "tokens": "list of token ids", "messages": "list of {role, content} messages"}
        return f"no {what[self.holds]} in field {self.name!r} ({there}); choose with --{self.holds}-field"


def _shown(name: str) -> str:
    """A stranger's field name as it may be shown."""
    return "".join(character if character.isprintable() else "�" for character in name[:NAME_SHOWN])


def text(value: Any) -> str | None:
    """A text that can be tokenised, None if it is no text.

    Raises:
        Bad: it holds half of a surrogate pair, which no UTF-8 can hold.
    """
    if not isinstance(value, str):
        return None
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise Bad("half a surrogate pair", "the text holds half of a surrogate pair, which is no text") from None
    return value


def _tokens(value: Any) -> np.ndarray | None:
    if isinstance(value, np.ndarray):
        return value if value.ndim == 1 and value.dtype.kind in "iu" else None
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        return None
    try:
        return np.array(value, np.int64)
    except OverflowError:
        return None


def _messages(value: Any) -> Messages | None:
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) > 1:
            return None
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]  # column by column
    if not isinstance(value, list):
        return None
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            return None
        for part in message.values():
            if isinstance(part, str):
                text(part)
    return value


_READ = {"text": text, "tokens": _tokens, "messages": _messages}
