"""How many tokens a plan's corpus will give, from a part of it. Nothing is stored."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np

from actcache.jobs.arrange import Rules
from actcache.jobs.axis import Axis
from actcache.jobs.corpora.corpus import Corpus
from actcache.jobs.corpora.measured import AFTER, BEFORE, ROW, SIZE, SOURCE, MeasuredCorpus
from actcache.jobs.encode import PIECE
from actcache.jobs.progress import untold
from actcache.jobs.special_ids import special_ids
from actcache.jobs.spool import Spool
from actcache.jobs.tokenise import gather, wanted_of
from actcache.schemas.corpora import Selection
from actcache.schemas.errors import InvalidInput
from actcache.schemas.plan import Plan

MOST_TOKENS = 1 << 18
CONTEXTS_KEPT = 64
DECODED = 1 << 16


@dataclass(frozen=True)
class TokenEstimate:
    """What a build would put on the token axis.

    Attributes:
        n_tokens, n_sequences, n_documents: how many there will be.
        exact: whether all of that was counted as the build would.
        basis: what the numbers rest on, in words.
        lengths: tokens of each sequence that was looked at, int64 (n,).
        sequences: the token ids of the first of them, int32, together at most 64 contexts, or one sequence.
    """

    n_tokens: int
    n_sequences: int
    n_documents: int
    exact: bool
    basis: str
    lengths: np.ndarray
    sequences: tuple[np.ndarray, ...]


def estimate_tokens(plan: Plan, corpus: Corpus, tokenizer: Any, most_tokens: int = MOST_TOKENS) -> TokenEstimate:
    """Count the tokens of a corpus, or tell from `most_tokens` of them how many there will be.

    The corpus is read by the rules of a build: cutting, packing, special tokens, documents that are dropped. Where it ends within
    `most_tokens`, or the plan wants no more, the numbers are exact. Otherwise the tokens are divided by the part of the corpus
    that they were read from: of its bytes as they are stored (before they are unpacked), within a Parquet file or a saved
    dataset by rows, of a hub dataset by rows; of files that are one document each, their number by that of the files. The
    sources are taken in a random order, the same every time, or, where only the first documents are wanted, in their own; each
    is taken to go on as it begins. Documents that are shuffled or sampled are taken to be like those that are read.

    More is read where `most_tokens` are less than what a compressed file unpacks to at once, and all of the corpus where nobody
    says how large it is.

    `tokenizer` is the model's own, None where it has none. Memory is bounded; tokens that are counted wait in a file in TMPDIR.

    Raises:
        InvalidInput: the corpus cannot be read, has no usable row, or does not fit tokenizer and model; or `most_tokens` is
            not positive.
        StoreError: a server fails, or the disk is full.
    """
    if most_tokens < 1:
        raise InvalidInput(f"most_tokens is {most_tokens}; give at least 1")
    spec = plan.spec
    ranked = spec.selection.shuffle is not None or spec.selection.sample is not None
    wanted_whole = not ranked and spec.max_tokens is not None and spec.max_tokens <= most_tokens
    with ExitStack() as spools:
        noted = spools.enter_context(Spool("float64", 6))
        spread = len(corpus.parts) > 1 and (ranked or spec.selection.max_documents is None)
        measured = None if wanted_whole else MeasuredCorpus.of(corpus, noted, spread)
        if measured is not None:
            head = _head(plan, most_tokens, ranked)
            axis = gather(head, measured, tokenizer, spools, untold).axis
            if axis.arranged.n_tokens == most_tokens:
                found = _Head(measured, axis, tokenizer, _rules(head, corpus, tokenizer))
                part = found.part()
                if part is None:
                    return estimate_tokens(plan, corpus, tokenizer, 4 * most_tokens)
                return _extrapolated(plan, found, part)
            if not ranked and not spread:
                return _counted(plan, axis, most_tokens, "all that the build will read was tokenised")
        axis = gather(plan, corpus, tokenizer, spools, untold).axis
        what = "all that the build will read was tokenised"
        what += "" if wanted_whole or measured is not None else ", since nobody says how large the corpus is"
        return _counted(plan, axis, most_tokens, what)


def _head(plan: Plan, most_tokens: int, ranked: bool) -> Plan:
    """The same plan for so many tokens, in the order of the corpus."""
    chosen = plan.spec.selection
    if ranked:
        chosen = Selection(min_tokens=chosen.min_tokens, max_document_tokens=chosen.max_document_tokens)
    spec = plan.spec.model_copy(update={"max_tokens": most_tokens, "selection": chosen})
    return plan.model_copy(update={"spec": spec})


def _rules(plan: Plan, corpus: Corpus, tokenizer: Any) -> Rules:
    return wanted_of(plan, special_ids(plan.spec, corpus, tokenizer)).rules


def _counted(plan: Plan, axis: Axis, most_tokens: int, basis: str) -> TokenEstimate:
    arranged = axis.arranged
    starts = arranged.sequence_start
    n_sequences = len(starts) - 1
    looked_at = starts.rows(0, min(n_sequences, starts.last_at_most(most_tokens - 1) + 1) + 1)
    kept = _kept(plan, axis, looked_at)
    n_tokens, n_documents = arranged.n_tokens, arranged.n_documents
    return TokenEstimate(n_tokens, n_sequences, n_documents, True, basis, np.diff(looked_at), kept)


def _extrapolated(plan: Plan, head: _Head, part: _Part) -> TokenEstimate:
    axis, chosen = head.axis, plan.spec.selection
    starts = axis.arranged.sequence_start.rows(0, len(axis.arranged.sequence_start))
    starts = starts[:-1] if len(starts) > 2 else starts  # the last sequence was cut off
    tokens, documents = part.tokens / part.fraction, part.documents / part.documents_fraction
    limits = [limit for limit in (chosen.sample, chosen.max_documents) if limit is not None]
    if limits and documents > min(limits):
        each = (
            tokens / documents if head.corpus.spread else part.tokens / part.documents
        )  # the first are the ones wanted
        tokens, documents = each * min(limits), min(limits)
    else:
        tokens = max(tokens, axis.arranged.n_tokens)
    if plan.spec.max_tokens is not None and tokens > plan.spec.max_tokens:
        tokens, documents = plan.spec.max_tokens, documents * plan.spec.max_tokens / tokens
    n_tokens = max(1, round(tokens))
    return TokenEstimate(
        n_tokens=n_tokens,
        n_sequences=ceil(n_tokens * (len(starts) - 1) / int(starts[-1])),
        n_documents=max(1, round(documents)),
        exact=False,
        basis=f"from {100 * part.fraction:.3g} % of the corpus's {head.corpus.unit}",
        lengths=np.diff(starts),
        sequences=_kept(plan, axis, starts),
    )


def _kept(plan: Plan, axis: Axis, starts: np.ndarray) -> tuple[np.ndarray, ...]:
    """The ids of the first sequences between these starts."""
    count = int(np.searchsorted(starts, CONTEXTS_KEPT * plan.spec.context, side="right")) - 1
    edges = starts[: max(1, count) + 1]
    return tuple(np.split(axis.rows("token_id", 0, int(edges[-1])), edges[1:-1]))


@dataclass(frozen=True)
class _Part:
    """So many tokens come from this fraction of the corpus, and so many documents from that one."""

    tokens: int
    fraction: float
    documents: float
    documents_fraction: float


class _Head:
    """The beginning of a corpus on the token axis, the last document of it perhaps not whole."""

    def __init__(self, corpus: MeasuredCorpus, axis: Axis, tokenizer: Any, rules: Rules) -> None:
        self.corpus, self.axis, self._tokenizer, self._rules = corpus, axis, tokenizer, rules
        self._runs = axis.arranged.runs.rows(0, len(axis.arranged.runs))
        self._rows = axis.document_row.rows(0, axis.arranged.n_documents)
        noted = corpus.noted.rows(0, len(corpus.noted))
        source, row = self._rows[-1]
        last = int(np.flatnonzero((noted[:, SOURCE] == source) & (noted[:, ROW] == row))[0])
        self._noted = noted[: last + 1]  # what was read ahead depends on the weather

    def part(self) -> _Part | None:
        """The documents before the last one that moved the position, or, where they are few, all that is there.

        None where nobody knows how far into the corpus the last one is: it is one of many that were unpacked at once, or there
        is nothing of it yet.
        """
        moved = np.flatnonzero(self._noted[:, AFTER] != self._noted[:, BEFORE])
        if len(moved):
            source, row, before, *_ = self._noted[moved[-1]]
            earlier = (self._rows[:, 0] < source) | ((self._rows[:, 0] == source) & (self._rows[:, 1] < row))
            documents = int(np.count_nonzero(earlier))
            tokens = self._begin(documents)
            if 2 * tokens >= self.axis.arranged.n_tokens:
                return self._part(tokens, before, documents, float(moved[-1]))
        begun = (
            self._runs[self._runs[:, 1] == len(self._rows) - 1, 3] >= 0
        ).any()  # with more than what is put before it
        return self._with_the_last() if begun and len(moved) and moved[-1] == len(self._noted) - 1 else None

    def _with_the_last(self) -> _Part:
        """All tokens, and the share of the last document that is among them."""
        last, total = len(self._rows) - 1, self.axis.arranged.n_tokens
        begin, end, length = self._last_document()
        share = min(1.0, (total - self._begin(last)) / self._rules.tokens(max(1, round(length))))
        return self._part(total, begin + share * (end - begin), last + share, len(self._noted) - 1 + share)

    def _last_document(self) -> tuple[float, float, float]:
        """Where the last document begins and ends in the corpus, and how many tokens it has in all."""
        last = len(self._rows) - 1
        run = next(run for run in self._runs if run[1] == last and run[3] >= 0)
        offset = int(run[3] - run[2])
        collected = len(self.axis.collected) - offset
        source, _, begin, end, size, unfinished = self._noted[-1]
        first, whole = self.corpus.ends[int(source)], self.corpus.ends[int(source) + 1]
        if unfinished:  # a file of token ids: it has as many as fit into its bytes
            each = (end - begin) / size
            length = collected if self.corpus.split_at_eos else (whole - begin) / each
            return begin, begin + length * each, length
        if size > 0:  # what was unpacked before it may be a part of it: go by what all of its source's documents hold
            sizes = self._noted[:-1][self._noted[:-1, SOURCE] == source, SIZE]
            before = sizes[sizes > 0].sum()
            begin = first + (end - first) * before / (before + size)
        if size <= PIECE or self._tokenizer is None or self.corpus.holds != "text":
            return begin, end, collected
        ids = self.axis.collected.rows(offset, offset + min(collected, DECODED))
        characters = len(self._tokenizer.decode(ids.tolist(), skip_special_tokens=True))
        return begin, end, max(collected, len(ids) * size / max(1, characters))

    def _begin(self, document: int) -> int:
        """The first token of a document on the axis."""
        return int(self._runs[np.searchsorted(self._runs[:, 1], document), 0])

    def _part(self, tokens: int, position: float, documents: float, rows: float) -> _Part:
        fraction = min(1.0, position / self.corpus.ends[-1])
        files = min(1.0, rows / len(self.corpus.parts))
        return _Part(tokens, fraction, documents, files if self.corpus.kind == "text" else fraction)
