"""Tokenising: from documents to the token axis and its owners, on disk until its length is known, then stored."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from actcache.cache.lease import Lease
from actcache.cache.publish import publish, publish_metadata, publish_shard
from actcache.cache.shards import encode_shard
from actcache.cache.store import Store
from actcache.jobs.corpus import Corpus, Document
from actcache.jobs.model import first_line
from actcache.schemas.errors import InvalidInput, SpecMismatch, StoreError
from actcache.schemas.grid import BOS_FLAG, EOS_FLAG, token_layouts
from actcache.schemas.plan import TOKENS_KEY, Plan, StoredObject, TokensRecord

DOCUMENTS_AT_ONCE = 64
CHARACTERS_AT_ONCE = 4 << 20

Tick = Callable[[int], None]


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer beside a model.

    Raises:
        InvalidInput: transformers cannot load it.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise what they like
        raise InvalidInput(f"{folder}: the tokenizer cannot be loaded: {first_line(error)}") from error


def tokenise(
    store: Store, plan: Plan, corpus: Corpus, tokenizer: Callable[[], Any], pool: Executor, tick: Tick
) -> TokensRecord:
    """Store the token axis, or find it stored. One worker does it under a lease, others wait for it.

    `tick` is called with the number of tokens so far.

    Raises:
        InvalidInput: the corpus cannot be read, is empty, or the tokenizer does not fit the model.
        SpecMismatch: the stored tokens are not those of this corpus and tokenizer.
    """
    lease = Lease(store, "tokenise")
    while True:
        done = store.get_or_none(TOKENS_KEY)
        if done is not None:
            return TokensRecord.from_bytes(bytes(done), str(store.location.child(TOKENS_KEY)))
        if lease.acquire():
            break
        lease.wait()
    if store.get_or_none(TOKENS_KEY) is not None:  # the holder before finished between the two looks
        with lease:
            return tokenise(store, plan, corpus, tokenizer, pool, tick)
    with lease, tempfile.TemporaryFile(prefix="actcache-tokens-", buffering=0) as spool:
        return _store(store, _spool(plan, corpus, tokenizer(), spool, tick), pool)


@dataclass(frozen=True)
class Axis:
    """The token axis before it is stored: ids, and where documents and sequences begin on it."""

    token_id: np.ndarray
    document_start: np.ndarray
    sequence_start: np.ndarray
    document_row: np.ndarray
    bos: int | None
    eos: int | None

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a token array, in its stored dtype."""
        if name == "sequence_start":
            return self.sequence_start[start:stop]
        if name == "document_row":
            return self.document_row[start:stop]
        if name == "token_id":
            return np.array(self.token_id[start:stop])
        if name == "special":
            return self._special(start, stop)
        token = np.arange(start, stop)
        starts = self.document_start if name.startswith("document") else self.sequence_start
        owner = np.searchsorted(starts, token, side="right") - 1
        if name in ("document", "sequence"):
            return owner
        position = token - starts[owner]
        return np.asarray(position, np.int32 if name == "position" else np.int64)

    def _special(self, start: int, stop: int) -> np.ndarray:
        ids = self.token_id[start:stop]
        flags = np.zeros(len(ids), np.uint8)
        for special, flag in ((self.bos, BOS_FLAG), (self.eos, EOS_FLAG)):
            if special is not None:
                flags |= np.where(ids == special, flag, 0).astype(np.uint8)
        return flags


def _spool(plan: Plan, corpus: Corpus, tokenizer: Any, spool: IO[bytes], tick: Tick) -> Axis:
    """Tokenise to a file, at most `max_tokens`."""
    spec, total = plan.spec, 0
    lengths: list[int] = []
    rows: list[tuple[int, int]] = []
    for documents in _portions(corpus.documents()):
        encoded = tokenizer([d.text for d in documents], return_attention_mask=False, verbose=False)["input_ids"]
        for document, ids in zip(documents, encoded, strict=True):
            tokens = np.asarray(ids, np.int32)
            _check_ids(tokens, plan, corpus, document)
            if spec.max_tokens is not None:
                tokens = tokens[: spec.max_tokens - total]
            _write(spool, tokens)
            total += len(tokens)
            lengths.append(len(tokens))
            rows.append((document.source, document.row))
            if total == spec.max_tokens:
                corpus.check_unchanged(document.source)
                break
        tick(total)
        if total == spec.max_tokens:
            break
    if total == 0:
        raise InvalidInput("the corpus has no tokens: every document is empty")
    token_id = np.memmap(spool, np.int32, "r", shape=(total,))
    ends = np.cumsum(lengths)
    starts = ends - lengths
    # An empty document owns no token; a search for a token's owner must not find it.
    pieces = [np.arange(s, e, spec.context) for s, e in zip(starts, ends, strict=True)]
    sequence_start = np.append(np.concatenate(pieces), total).astype(np.int64)
    return Axis(
        token_id,
        starts.astype(np.int64),
        sequence_start,
        np.asarray(rows, np.int64).reshape(-1, 2),
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )


def _write(spool: IO[bytes], tokens: np.ndarray) -> None:
    left = memoryview(tokens.tobytes())
    try:
        while left:  # unbuffered: closing a file whose last bytes did not fit would raise once more
            left = left[spool.write(left) :]
    except OSError as error:
        folder = tempfile.gettempdir()
        raise StoreError(
            f"{folder}: tokens are kept here while they are counted: {error.strerror}; set TMPDIR"
        ) from None


def _check_ids(tokens: np.ndarray, plan: Plan, corpus: Corpus, document: Document) -> None:
    if len(tokens) and int(tokens.max()) >= plan.model.vocab_size:
        raise InvalidInput(
            f"{corpus.files[document.source]}: token id {int(tokens.max())} is beyond the model's vocabulary of "
            f"{plan.model.vocab_size}; the tokenizer is not this model's"
        )


def _portions(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in portions of bounded count and, but for a single long one, bounded size."""
    portion: list[Document] = []
    size = 0
    for document in documents:
        portion.append(document)
        size += len(document.text)
        if len(portion) == DOCUMENTS_AT_ONCE or size >= CHARACTERS_AT_ONCE:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def _store(store: Store, axis: Axis, pool: Executor) -> TokensRecord:
    n_tokens, n_sequences = len(axis.token_id), len(axis.sequence_start) - 1
    layouts = token_layouts(n_tokens, n_sequences, len(axis.document_row))
    objects: list[StoredObject] = []
    content: dict[str, str] = {}
    for name, layout in layouts.items():
        objects.append(publish_metadata(store, layout))
        hashed = hashlib.sha256()
        for index in range(layout.n_shards):
            rows = np.ascontiguousarray(axis.rows(name, *layout.shard_range(index)))
            hashed.update(rows.data)
            shard = publish_shard(store, layout, index, encode_shard(layout, rows, pool))
            if shard.kept is not None:
                raise SpecMismatch(
                    f"{store.location.child(layout.shard_key(index))}: holds other tokens than this tokenizer makes; "
                    "another version of it began this build: use that one, or build into another URL"
                )
            objects.append(shard.stored)
        content[name] = hashed.hexdigest()
    record = TokensRecord(
        n_tokens=n_tokens,
        n_sequences=n_sequences,
        n_documents=len(axis.document_row),
        bos_token_id=axis.bos,
        eos_token_id=axis.eos,
        content=content,
        objects=tuple(objects),
    )
    published = publish(store, TOKENS_KEY, record.to_bytes())
    if published.other is None:
        return record
    theirs = TokensRecord.from_bytes(bytes(published.other), str(store.location.child(TOKENS_KEY)))
    if theirs.content != record.content:
        raise SpecMismatch(
            f"{store.location.child(TOKENS_KEY)}: another build stored other tokens here; build into another URL"
        )
    return theirs
