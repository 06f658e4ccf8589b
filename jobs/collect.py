"""Reading and tokenising a corpus: the tokens of every document that is wanted, on disk, and what was wrong with the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from actcache.jobs.ahead import ahead
from actcache.jobs.arrange import Rules
from actcache.jobs.corpora.corpus import Corpus
from actcache.jobs.corpora.document import Bad, BadRow, Document
from actcache.jobs.encode import PIECE, Encoder
from actcache.jobs.selection import Lowest, rank
from actcache.jobs.spool import Spool
from actcache.schemas.corpora import Selection
from actcache.schemas.errors import InvalidInput

ITEMS_AT_ONCE = 512
USED, TOO_SHORT, TOO_LONG, NO_TOKENS = 0, 1, 2, 3
DROPPED = {TOO_SHORT: "shorter than min_tokens", TOO_LONG: "longer than max_document_tokens"}

Item = Document | BadRow
Tick = Callable[[int], None]


@dataclass(frozen=True)
class Wanted:
    """What is asked of the documents. `bos` is taken off their beginning, `eos` is put at their end, where not None."""

    rules: Rules
    selection: Selection
    vocab_size: int
    bos: int | None = None
    eos: int | None = None

    @property
    def ranked(self) -> bool:
        """Whether the documents' ranks choose or order them, so that all of the corpus must be read."""
        return self.selection.shuffle is not None or self.selection.sample is not None

    @property
    def seed(self) -> int:
        """The seed of the ranks."""
        return self.selection.shuffle or 0

    def lowest(self) -> Lowest:
        """Which ranks can be wanted."""
        chosen = self.selection
        shuffled = chosen.shuffle is not None
        limits = [chosen.sample, chosen.max_documents if shuffled else None]
        documents = min((limit for limit in limits if limit is not None), default=None)
        return Lowest(documents, self.rules.max_tokens if shuffled else None)


@dataclass
class Collected:
    """Tokens one document after the other, and a row a document: where they begin, their number, source, row, verdict."""

    tokens: Spool
    documents: Spool
    skipped: Counter[str] = field(default_factory=Counter)
    first_skipped: BadRow | None = None


def collect(
    corpus: Corpus, encoder: Encoder | None, split_at: int | None, wanted: Wanted, into: Collected, tick: Tick
) -> None:
    """Read the corpus as far as it is needed. `tick` is called with the number of tokens so far.

    Reading, tokenising and writing run side by side; the order is that of the corpus.

    Raises:
        InvalidInput: the corpus cannot be read, a row of it cannot be used and it is strict, or ids are not the model's.
        StoreError: a server fails, or the disk is full.
    """
    lowest = wanted.lowest()
    items = _texts(corpus.documents(split_at), corpus, encoder)
    if wanted.ranked:
        items = _admitted(items, wanted, lowest)
    collector = _Collector(corpus, wanted, lowest, into)
    portions = _portions(items)
    with ahead(portions, "read") as read, ahead((_encoded(portion, encoder) for portion in read), "encode") as encoded:
        for items_of in encoded:
            for item in items_of():
                if collector.add(item):
                    tick(len(into.tokens))
                    corpus.check_unchanged(item.source)
                    return
            tick(len(into.tokens))


def _admitted(items: Iterable[Item], wanted: Wanted, lowest: Lowest) -> Iterator[Item]:
    """Without the documents that are surely not wanted. Every bad row stays, to be counted.

    How many are left out depends on how far the writing is: nothing that is stored may depend on it.
    """
    decided: tuple[int, int] | None = None
    admits = True
    for item in items:
        if isinstance(item, Document):
            if decided != (item.source, item.row):  # of a document in pieces, all or none
                decided = item.source, item.row
                admits = lowest.admits(rank(wanted.seed, item.source, item.row))
            if not admits:
                continue
        yield item


def _texts(items: Iterable[Item], corpus: Corpus, encoder: Encoder | None) -> Iterator[Item]:
    """Conversations become texts, and long texts pieces."""
    for item in items:
        if isinstance(item, BadRow) or isinstance(item.content, np.ndarray) or encoder is None:
            yield item
            continue
        try:
            text = item.content if isinstance(item.content, str) else encoder.chat(item.content)
            if len(text) <= PIECE:
                yield Document(item.source, item.row, text)
                continue
            held: str | None = None
            for piece in encoder.pieces(text):
                if held is not None:
                    yield Document(item.source, item.row, held, last=False)
                held = piece
            yield Document(item.source, item.row, held or "")
        except Bad as bad:
            yield bad.at(item.source, item.row, corpus.where(item.source, item.row))


def _portions(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Portions of bounded count and, but for a single long text, bounded size."""
    portion: list[Item] = []
    size = 0
    for item in items:
        portion.append(item)
        size += len(item.content) if isinstance(item, Document) else 0
        if len(portion) == ITEMS_AT_ONCE or size >= PIECE:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def _encoded(portion: list[Item], encoder: Encoder | None) -> Callable[[], list[Item]]:
    """What is left to do for the same items with ids for texts."""
    texts = [item.content for item in portion if isinstance(item, Document) and isinstance(item.content, str)]
    if encoder is None or not texts:
        return lambda: portion
    arrays = encoder.begin(texts)

    def items() -> list[Item]:
        ids = iter(arrays())
        return [
            Document(item.source, item.row, next(ids), item.last)
            if isinstance(item, Document) and isinstance(item.content, str)
            else item
            for item in portion
        ]

    return items


class _Collector:
    """Takes the items in order, and knows when it has enough."""

    def __init__(self, corpus: Corpus, wanted: Wanted, lowest: Lowest, into: Collected) -> None:
        self._corpus, self._wanted, self._lowest, self._into = corpus, wanted, lowest, into
        self._begun = False
        self._offset = 0
        self._length = 0
        self._ends_with: int | None = None
        self._used = 0
        self._axis = 0  # tokens on the axis, of a stream before it is cut

    def add(self, item: Item) -> bool:
        """Take an item. True when nothing more is needed."""
        if isinstance(item, BadRow):
            return self._skip(item)
        ids = np.asarray(item.content)
        self._check(ids, item)
        if not self._begun:
            self._begun, self._offset, self._length, self._ends_with = True, len(self._into.tokens), 0, None
            if self._wanted.bos is not None and len(ids) and ids[0] == self._wanted.bos:
                ids = ids[1:]
        self._take(ids)
        chosen = self._wanted.selection
        cut_now = self._length >= (chosen.min_tokens or 1) and chosen.max_document_tokens is None
        if not item.last and not (cut_now and self._enough(self._length)):
            return False
        return self._end(item)

    def _take(self, ids: np.ndarray) -> None:
        longest = self._wanted.selection.max_document_tokens
        self._length += len(ids)
        if longest is not None and self._length > longest:
            return  # it is dropped at its end
        if self._wanted.rules.long == "truncate" and not self._wanted.rules.pack:
            ids = ids[: max(0, self._wanted.rules.room - (len(self._into.tokens) - self._offset))]
        if len(ids):
            self._into.tokens.append(ids)
            self._ends_with = int(ids[-1])

    def _end(self, item: Document) -> bool:
        """A document is whole."""
        self._begun = False
        chosen, eos = self._wanted.selection, self._wanted.eos
        if self._length == 0 and not self._wanted.ranked:
            where = self._corpus.where(item.source, item.row)
            return self._skip(BadRow(item.source, item.row, "empty", f"{where}: no tokens"))
        verdict = USED if self._length else NO_TOKENS
        if verdict == USED and chosen.min_tokens is not None and self._length < chosen.min_tokens:
            verdict = TOO_SHORT
        if chosen.max_document_tokens is not None and self._length > chosen.max_document_tokens:
            verdict = TOO_LONG
        if verdict != USED:
            self._into.tokens.truncate(self._offset)
        elif eos is not None and self._ends_with != eos:
            self._into.tokens.append(np.array([eos]))
        length = len(self._into.tokens) - self._offset
        self._into.documents.append(np.array([[self._offset, length, item.source, item.row, verdict]]))
        if verdict != USED:
            return False
        if self._wanted.ranked:
            self._lowest.add(rank(self._wanted.seed, item.source, item.row), length)
            return False
        self._used += 1
        self._axis = self._axis + length if self._wanted.rules.pack else self._axis + self._wanted.rules.tokens(length)
        return self._enough(0)

    def _enough(self, more: int) -> bool:
        """Whether the documents so far, and `more` tokens of the next one, are all that is asked for."""
        if self._wanted.ranked:
            return False
        rules = self._wanted.rules
        so_far = rules.tokens(self._axis + more) if rules.pack else self._axis + rules.tokens(more)
        if rules.max_tokens is not None and so_far >= rules.max_tokens:
            return True
        return self._used == self._wanted.selection.max_documents

    def _skip(self, row: BadRow) -> bool:
        if self._corpus.strict:
            raise InvalidInput(f"{row.message}; without --strict such rows are skipped and counted")
        self._begun = False
        self._into.skipped[row.reason] += 1
        self._into.first_skipped = self._into.first_skipped or row
        return False

    def _check(self, ids: np.ndarray, item: Document) -> None:
        if not len(ids):
            return
        low, high, size = int(ids.min()), int(ids.max()), self._wanted.vocab_size
        if low < 0 or high >= size:
            tokenised = self._corpus.holds == "tokens"
            way_out = "the corpus was tokenised for another" if tokenised else "the tokenizer is not this model's"
            raise InvalidInput(
                f"{self._corpus.where(item.source, item.row)}: token id {low if low < 0 else high} is beyond the model's "
                f"vocabulary of {size}; {way_out}"
            )
