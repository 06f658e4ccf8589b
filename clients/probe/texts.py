"""Labels of tokens from text: of a token by itself, of a document, or of spans of characters of a document."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.schemas.errors import InvalidInput

if TYPE_CHECKING:
    from actcache.clients.selection import Selectable
    from actcache.clients.text import Text
    from actcache.clients.whole import Whole

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
Span = tuple[int, int, Any]


def by_token(ds: Selectable, function: Callable[[str], Any]) -> np.ndarray:
    """A label for every token of the dataset from the token's own text: `by_token(ds, str.isspace)`.

    `function` is called once for each token id that occurs, with its text as `ds.tokenizer.strings` gives it. Returns (n_tokens,), of
    numbers, booleans or strings; None stays None: no label.

    Raises:
        NotFound: the dataset has no token ids, or no tokenizer.
        Unsupported: the package `tokenizers` is missing.
    """
    whole = ds.whole
    ids = whole.tokens["token_id"]
    kept, numbers = np.unique(ids, return_inverse=True)
    return np.asarray(_array([function(text) for text in whole.tokenizer.strings(kept)])[numbers])


def by_document(ds: Selectable, labels: Callable[[str], Any] | Any) -> np.ndarray:
    """A label for every token of the dataset that is its document's.

    `labels` is an array (n_documents,), or (n_documents, outputs), or a function of a document's text: its tokens' text end to end,
    without special tokens. Returns (n_tokens,) or (n_tokens, outputs).

    Raises:
        InvalidInput: not one label a document.
        NotFound, Unsupported: as `by_token`, of a function.
    """
    whole = ds.whole
    if callable(labels):
        labels = _array([labels(document.text) for document in documents(whole)])
        return np.asarray(labels[np.unique(whole.tokens["document"], return_inverse=True)[1]])
    labels = np.asarray(labels)
    if labels.shape[:1] != (whole.n_documents,):
        raise InvalidInput(
            f"{whole.url}: labels of shape {labels.shape}, and there are {whole.n_documents:,} documents; give one label for each"
        )
    return np.asarray(labels[whole.tokens["document"]])


def by_span(ds: Selectable, function: Callable[[str], Iterable[Span]]) -> np.ndarray:
    """A label for every token of the dataset from spans of its document's characters.

    `function` takes a document's text and gives (start, end, label) of characters [start, end); a later span lies over an earlier
    one. A token has the label that most of its characters have that have any, the first in the text of equals; without such a
    character it has None. Tokens that make one character together have the same label; special tokens have none. Returns (n_tokens,).

    Raises:
        InvalidInput: a span that is not within the text.
        NotFound, Unsupported: as `by_token`.
    """
    whole = ds.whole
    names: dict[Any, int] = {None: -1}
    found = np.full(whole.n_tokens, -1)
    for document in documents(whole):
        character = np.full(len(document.text), -1)
        for start, end, label in function(document.text):
            if not 0 <= start <= end <= len(document.text):
                raise InvalidInput(
                    f"{whole.url}: document {document.number}: a span [{start}, {end}) of {len(document.text):,} characters"
                )
            character[start:end] = names.setdefault(label, len(names) - 1)
        found[document.low : document.high] = _most_common(character, document.spans)
    return np.asarray(_array([*list(names)[1:], None])[found])


@dataclass(frozen=True)
class Document:
    """A document's text and where its tokens are in it.

    Attributes:
        number: which document.
        low, high: its tokens are [low, high) on the token axis.
        text: the text of its tokens end to end, special ones left out.
        spans: the characters [start, end) of each token, (token, 2); none, of a special token.
    """

    number: int
    low: int
    high: int
    text: str
    spans: np.ndarray


def documents(whole: Whole) -> Iterator[Document]:
    """Every document of a dataset with its text, in their order.

    Raises:
        NotFound, Unsupported: as `by_token`.
    """
    ids, owner, position = (whole.tokens[name] for name in ("token_id", "document", "document_position"))
    special = whole.tokens["special"] if "special" in whole.fields else np.zeros(len(ids), np.uint8)
    tokenizer = whole.tokenizer
    kept, numbers = np.unique(ids, return_inverse=True)
    alone = tokenizer.strings(kept)
    lows = np.flatnonzero(np.diff(owner, prepend=-1))
    for low, high in zip(lows.tolist(), [*lows[1:].tolist(), len(ids)], strict=True):
        plain = np.flatnonzero((position[low:high] >= 0) & (special[low:high] == 0))
        _, first, inverse = np.unique(position[low:high][plain], return_index=True, return_inverse=True)
        chosen = low + plain[first]  # where sequences overlap, a token of the text is there more than once
        text, edges = _joined(tokenizer, ids[chosen], [alone[number] for number in numbers[chosen].tolist()])
        spans = np.zeros((high - low, 2), np.int64)
        spans[plain] = edges[inverse]
        yield Document(int(owner[low]), low, high, text, spans)


def _joined(tokenizer: Text, ids: np.ndarray, strings: list[str]) -> tuple[str, np.ndarray]:
    """The text of tokens, and the characters of each, (token, 2). Tokens that make a character together are decoded together."""
    parts: list[str] = []
    edges = np.empty((len(ids), 2), np.int64)
    at = place = 0
    while place < len(strings):
        stop = place + 1
        part = strings[place]
        if UNKNOWN in part:
            while stop < len(strings) and UNKNOWN in strings[stop]:
                stop += 1
            part = tokenizer.decode(ids[place:stop])
        edges[place:stop] = at, at + len(part)
        parts.append(part)
        at += len(part)
        place = stop
    return "".join(parts), edges


def _most_common(character: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """Of numbers of characters, -1 for none, the most common of each span."""
    length = spans[:, 1] - spans[:, 0]
    token = np.repeat(np.arange(len(spans)), length)
    place = np.arange(len(token)) - np.repeat(np.cumsum(length) - length, length) + spans[token, 0]
    number = character[place]
    token, number = token[number >= 0], number[number >= 0]
    found = np.full(len(spans), -1)
    pairs = np.stack([token, number], 1)
    kept, first, count = np.unique(pairs, axis=0, return_index=True, return_counts=True)
    order = np.lexsort((-first, count))  # the last that is written to a token's place wins
    found[kept[order, 0]] = kept[order, 1]
    return found


def _array(values: list[Any]) -> np.ndarray:
    """Labels as an array: of numbers or booleans where all are, else of objects."""
    if all(isinstance(value, bool | int | float | np.number | np.bool_) for value in values):
        return np.array(values)
    found = np.empty(len(values), object)
    found[:] = values
    return found
