"""Tokenising: from documents to the token axis and its owners, on disk until its length is known, then stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from actcache.cache.store import Store
from actcache.cache.tokenizer import store_tokenizer
from actcache.jobs.arrange import DOCUMENTS_AT_ONCE, Rules, arrange
from actcache.jobs.axis import Axis
from actcache.jobs.collect import DROPPED, NO_TOKENS, USED, Collected, Tick, Wanted, collect
from actcache.jobs.corpora.corpus import Corpus
from actcache.jobs.encode import Encoder
from actcache.jobs.selection import ranks
from actcache.jobs.special_ids import SpecialIds, special_ids
from actcache.jobs.spool import Spool
from actcache.jobs.store_axis import store_axis, stored_once
from actcache.schemas.errors import InvalidInput
from actcache.schemas.grid import token_layouts
from actcache.schemas.plan import Plan, StoredObject, TokensRecord

Note = Callable[[str], None]


def tokenise(
    store: Store,
    plan: Plan,
    corpus: Corpus,
    tokenizer: Callable[[], Any],
    pool: Executor,
    tick: Tick,
    note: Note = lambda _: None,
    files: Callable[[Any], Mapping[str, bytes]] = lambda _: {},
) -> TokensRecord:
    """Store the token axis, or find it stored. One worker does it under a lease, others wait for it.

    `tokenizer` gives the model's tokenizer, or None where it has none, and `files` what is stored of it. `tick` is called
    with the number of tokens so far, `note` with what a user should know of rows that were skipped.

    Raises:
        InvalidInput: the corpus cannot be read, has no usable row, or does not fit tokenizer and model.
        SpecMismatch: the stored tokens are not those of this corpus and tokenizer.
        StoreError: a server fails, or the disk is full.
    """

    def make() -> TokensRecord:
        loaded = tokenizer()
        of_tokenizer = store_tokenizer(store, files(loaded))
        with ExitStack() as spools:
            made = gather(plan, corpus, loaded, spools, tick)
            if made.skipped or made.dropped:
                note(_told(made))
            return _store(store, made, of_tokenizer, pool)

    record = stored_once(store, make)
    if corpus.strict and record.skipped:
        raise InvalidInput(
            f"{store.location}: {sum(record.skipped.values()):,} rows were skipped when these tokens were stored; "
            "build without --strict, or correct the corpus and build into another URL"
        )
    return record


@dataclass(frozen=True)
class Made:
    """The token axis, and what is not on it."""

    axis: Axis
    skipped: dict[str, int]
    dropped: dict[str, int]
    first_skipped: str | None


def gather(plan: Plan, corpus: Corpus, tokenizer: Any, spools: ExitStack, tick: Tick) -> Made:
    """Read the corpus as far as the plan needs it, and lay it out on the token axis, in spools.

    Raises:
        InvalidInput: as `tokenise`.
        StoreError: a server fails, or the disk is full.
    """
    spec = plan.spec
    ids = special_ids(spec, corpus, tokenizer)
    wanted = wanted_of(plan, ids)
    encoder = None
    if corpus.holds != "tokens":
        encoder = Encoder(tokenizer, special=spec.cutting.bos == "tokenizer" and corpus.holds == "text")
    collected = Collected(spools.enter_context(Spool("int32")), spools.enter_context(Spool("int64", 5)))
    collect(corpus, encoder, ids.eos, wanted, collected, tick)
    axis, dropped = laid_out(collected, wanted, ids, spools)
    if corpus.strict and collected.skipped:  # a document without tokens, among those that ranks chose
        raise InvalidInput(
            f"{collected.skipped['empty']:,} documents have no tokens; build without --strict to skip them"
        )
    first = collected.first_skipped
    if axis.arranged.n_tokens == 0:
        raise _nothing(collected, dropped)
    return Made(axis, dict(collected.skipped), dropped, first.message if first is not None else None)


def wanted_of(plan: Plan, ids: SpecialIds) -> Wanted:
    """What a plan asks of documents."""
    spec, cutting, always = plan.spec, plan.spec.cutting, plan.spec.cutting.bos == "always"
    packed = spec.packing == "stream"
    return Wanted(
        Rules(spec.context, always, cutting.long, cutting.stride, packed, spec.max_tokens),
        spec.selection,
        plan.model.vocab_size,
        bos=ids.bos if always else None,
        eos=ids.eos if packed else None,
    )


def laid_out(collected: Collected, wanted: Wanted, ids: SpecialIds, spools: ExitStack) -> tuple[Axis, dict[str, int]]:
    """The token axis of what was collected, and how many documents were dropped on the way to it, by reason.

    Where ranks choose or order, memory holds some 60 bytes a document.
    """
    order = walked = None
    if wanted.ranked:
        order, walked = _ordered(collected.documents.rows(0, len(collected.documents)), wanted)
    runs, starts, rows = (spools.enter_context(Spool("int64", width)) for width in (4, 1, 2))
    lengths = ((used[:, 0], used[:, 1]) for used in _used(collected.documents, order))
    arranged = arrange(lengths, wanted.rules, runs, starts)
    left = arranged.n_documents
    for used in _used(collected.documents, order):
        rows.append(used[:left, 2:4])
        left -= len(used[:left])
        if not left:
            break
    enough = wanted.selection.shuffle is not None and arranged.n_tokens == wanted.rules.max_tokens
    if enough and walked is not None and order is not None:
        walked = walked[: int(np.flatnonzero(walked == order[arranged.n_documents - 1])[0]) + 1]
    verdicts = _verdicts(collected.documents, walked)
    if verdicts[NO_TOKENS]:
        collected.skipped["empty"] += verdicts[NO_TOKENS]
    dropped = {reason: verdicts[verdict] for verdict, reason in DROPPED.items() if verdicts[verdict]}
    return Axis(collected.tokens, arranged, rows, ids.bos, ids.eos), dropped


def _ordered(documents: np.ndarray, wanted: Wanted) -> tuple[np.ndarray, np.ndarray]:
    """The chosen documents in their order, and all that were passed on the way to them, by rank."""
    chosen = wanted.selection
    walked = np.argsort(ranks(wanted.seed, documents[:, 2], documents[:, 3]), kind="stable")
    shuffled = chosen.shuffle is not None
    limits = [limit for limit in (chosen.sample, chosen.max_documents if shuffled else None) if limit is not None]
    used = np.flatnonzero(documents[walked, 4] == USED)
    if limits and len(used) >= min(limits):
        walked = walked[: used[min(limits) - 1] + 1]
    order = walked[documents[walked, 4] == USED]
    return (order if shuffled else np.sort(order)[: chosen.max_documents]), walked


def _used(documents: Spool, order: np.ndarray | None) -> Iterator[np.ndarray]:
    """The rows of the documents that are used, in their order, in portions."""
    for start in range(0, len(documents) if order is None else len(order), DOCUMENTS_AT_ONCE):
        if order is not None:
            yield documents.take(order[start : start + DOCUMENTS_AT_ONCE])
            continue
        rows = documents.rows(start, start + DOCUMENTS_AT_ONCE)
        if len(rows := rows[rows[:, 4] == USED]):
            yield rows


def _verdicts(documents: Spool, walked: np.ndarray | None) -> Counter[int]:
    """How many documents there are of each verdict."""
    counts: Counter[int] = Counter()
    for start in range(0, len(documents) if walked is None else len(walked), DOCUMENTS_AT_ONCE):
        stop = start + DOCUMENTS_AT_ONCE
        rows = documents.rows(start, stop) if walked is None else documents.take(walked[start:stop])
        counts.update(dict(zip(*(part.tolist() for part in np.unique(rows[:, 4], return_counts=True)), strict=True)))
    return counts


def _nothing(collected: Collected, dropped: dict[str, int]) -> InvalidInput:
    """Why there are no tokens: the first row that could not be used."""
    first, count = collected.first_skipped, sum(collected.skipped.values())
    if dropped:
        told = "; ".join(f"{number:,} documents are {reason}" for reason, number in dropped.items())
        return InvalidInput(f"the corpus has no tokens left: {told}; choose others")
    if first is None:
        return InvalidInput("the corpus has no tokens: there are no rows in it")
    more = f" (nor can any other of its {count:,} rows be used)" if count > 1 else ""
    return InvalidInput(f"{first.message}; the corpus has no tokens{more}")


def _told(made: Made) -> str:
    """What was left out, on one line."""
    parts = []
    if made.skipped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(made.skipped.items()))
        first = f"; the first: {made.first_skipped}" if made.first_skipped is not None else ""
        parts.append(f"{sum(made.skipped.values()):,} rows were skipped ({reasons}){first}")
    parts += [f"{count:,} documents were dropped, {reason}" for reason, count in made.dropped.items()]
    return "; ".join(parts)


def _store(store: Store, made: Made, of_tokenizer: list[StoredObject], pool: Executor) -> TokensRecord:
    axis, arranged = made.axis, made.axis.arranged
    n_tokens, n_sequences = arranged.n_tokens, len(arranged.sequence_start) - 1
    record = TokensRecord(
        n_tokens=n_tokens,
        n_sequences=n_sequences,
        n_documents=arranged.n_documents,
        bos_token_id=axis.bos,
        eos_token_id=axis.eos,
        content={},
        objects=tuple(of_tokenizer),
        skipped=made.skipped,
        dropped=made.dropped,
    )
    return store_axis(store, token_layouts(n_tokens, n_sequences, arranged.n_documents), axis.rows, record, pool)
