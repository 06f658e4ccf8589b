"""What determines a dataset's tokens beside model and tokenizer: the corpus, which documents of it, how they are cut."""

from __future__ import annotations

from typing import Literal

from actcache.schemas.record import Record

CorpusKind = Literal["text", "jsonl", "csv", "parquet", "npy", "bin", "saved dataset", "hub dataset", "items"]
TokenDType = Literal["uint16", "uint32"]
Bos = Literal["tokenizer", "always", "never"]
Long = Literal["split", "truncate", "stride"]


class CorpusIdentity(Record):
    """A corpus by the content of its files in order, or by the commit of its repository, and what is taken from a row.

    `content` is a digest of what identifies each source: SHA-256 of a local file, validator of a remote one, commit of
    a hub dataset with its configuration and split; of `items`, the inputs of a module of the user's own, their bytes. One of the
    three fields is set where rows have fields. `token_dtype` is that of raw token files; `split_at_eos` says that token files
    are cut into documents after each EOS.
    """

    kind: CorpusKind
    files: int
    content: str
    text_field: str | None = None
    tokens_field: str | None = None
    messages_field: str | None = None
    token_dtype: TokenDType | None = None
    split_at_eos: bool = False
    revision: str | None = None
    config: str | None = None
    split: str | None = None


class Selection(Record):
    """Which documents are taken, and in which order.

    Documents shorter than `min_tokens` or longer than `max_document_tokens` are dropped. `shuffle` is the seed of the
    order; `sample` documents are drawn at random with the same seed, 0 without one. None everywhere: all, in order.
    """

    min_tokens: int | None = None
    max_document_tokens: int | None = None
    shuffle: int | None = None
    sample: int | None = None
    max_documents: int | None = None


class Cutting(Record):
    """How a document becomes sequences, and where a beginning-of-sequence token stands.

    `bos_id` and `eos_id` are those given by hand; None means the tokenizer's own.
    """

    long: Long = "split"
    stride: int | None = None
    bos: Bos = "tokenizer"
    bos_id: int | None = None
    eos_id: int | None = None
