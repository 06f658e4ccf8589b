"""The plan of a build, and the record that ends its tokenising. Nothing in either depends on time or host."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from actcache.schemas.record import Record
from actcache.schemas.spec import ResolvedSpec

FORMAT = "1.1"
RECORDS = ".actcache/"
"""Folder of the records of a dataset's first build. Every added build has one of its own below it."""
PLAN_KEY = f"{RECORDS}plan.json"
TOKENS_KEY = f"{RECORDS}tokens.json"


def added_records(key: str) -> str:
    """Folder of the records of the added build of this key."""
    return f"{RECORDS}{key}/"


def plan_key(records: str = RECORDS) -> str:
    """Key of a build's plan."""
    return f"{records}plan.json"


class ModelShape(Record):
    """The sizes of a model. `max_context` is None where positions have no end."""

    n_layers: int
    d_model: int
    vocab_size: int
    max_context: int | None


class BatchRule(Record):
    """How the sequences that touch a block become batches. So a batch depends on the block alone.

    `order` "length": longest first, equal ones as they come; a batch takes sequences until one more would make it, padded,
    more than `tokens` tokens. `order` "sequence": as they come, `size` at a time.

    A batch is padded on the right to its own longest sequence with `pad_token_id`, and to at least `least_positions` in all of
    its sequences together; `attention_mask` is 1 on tokens and 0 on pads and is always given.
    """

    order: Literal["sequence", "length"] = "sequence"
    size: int | None = None
    tokens: int | None = None
    least_positions: int | None = None
    padding: Literal["right"] = "right"
    pad_token_id: int = 0
    attention_mask: Literal["always"] = "always"

    @model_validator(mode="after")
    def _complete(self) -> Self:
        limit = self.tokens if self.order == "length" else self.size
        if limit is None or limit < 1:
            raise ValueError(
                f"batches in order of {self.order} need {'tokens' if self.order == 'length' else 'a size'}"
            )
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the limits that are not used."""
        document: dict[str, Any] = serialise(self)
        return {name: value for name, value in document.items() if value is not None}


class Source(Record):
    """One file of the corpus, or one split of a hub dataset.

    `name` is relative to the fixed part of the pattern that found it. `sha256` is that of a local file's content. What
    is read from elsewhere is identified by what its server says of it: `validator` is `etag:…`, `last-modified:…`, each
    with the size, or `commit:…`. `bytes` is None where nobody says.
    """

    name: str
    bytes: int | None
    sha256: str | None = None
    validator: str | None = None


class Labels(Record):
    """What things are called: for people, without effect on the content."""

    model: str
    revision: str | None = None
    model_license: str | None = None
    corpus: tuple[str, ...]
    corpus_revision: str | None = None
    corpus_license: str | None = None


class Plan(Record):
    """Written first, create-only. Who resumes a build adopts it.

    `widths` has the length of the vectors of each site where it is not `model.d_model`.
    """

    format: str = FORMAT
    key: str
    tokens_key: str
    spec: ResolvedSpec
    labels: Labels
    model: ModelShape
    widths: dict[str, int] = Field(default_factory=dict)
    batches: BatchRule
    sources: tuple[Source, ...]


class StoredObject(Record):
    """One object under a dataset's URL."""

    key: str
    size: int
    sha256: str


class TokensRecord(Record):
    """Written when every token is stored: from here on block b is exactly tokens [b·T, (b+1)·T).

    `content` maps each token array to the SHA-256 of its decoded little-endian bytes; `objects` are the stored ones, the
    tokenizer's files among them.
    `skipped` counts the rows that could not be used, by reason, `dropped` the documents that the spec did not want.
    """

    n_tokens: int
    n_sequences: int
    n_documents: int
    bos_token_id: int | None
    eos_token_id: int | None
    content: dict[str, str]
    objects: tuple[StoredObject, ...]
    skipped: dict[str, int] = Field(default_factory=dict)
    dropped: dict[str, int] = Field(default_factory=dict)
