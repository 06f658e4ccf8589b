"""A corpus: its sources in order, of one kind, and the documents in them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from actcache.jobs.corpora.columns import arrow_rows, parquet_rows
from actcache.jobs.corpora.document import BadRow, Document
from actcache.jobs.corpora.field import Field
from actcache.jobs.corpora.files import CorpusFile
from actcache.jobs.corpora.find import find
from actcache.jobs.corpora.hub import SCHEME, HubDataset, hub_dataset
from actcache.jobs.corpora.remote import Access
from actcache.jobs.corpora.rows import csv_rows, json_lines, whole_file
from actcache.jobs.corpora.token_files import bin_rows, npy_rows
from actcache.schemas.canonical import digest
from actcache.schemas.corpora import CorpusIdentity, CorpusKind, TokenDType
from actcache.schemas.errors import ActcacheError, InvalidInput
from actcache.schemas.plan import Source
from actcache.schemas.spec import Spec

_SUFFIXES: dict[str, CorpusKind] = {
    **dict.fromkeys((".jsonl", ".jsonl.gz", ".jsonl.zst"), "jsonl"),
    **dict.fromkeys((".csv", ".csv.gz", ".csv.zst"), "csv"),
    ".parquet": "parquet",
    ".npy": "npy",
    ".bin": "bin",
}
_WITH_FIELDS = ("jsonl", "csv", "parquet", "saved dataset", "hub dataset")


@dataclass(frozen=True)
class Corpus:
    """Sources of one kind in the order in which they are read."""

    kind: CorpusKind
    field: Field
    token_dtype: TokenDType
    split_at_eos: bool
    strict: bool
    parts: tuple[CorpusFile | HubDataset, ...]

    @property
    def sources(self) -> tuple[Source, ...]:
        """What the plan records of each."""
        return tuple(part.source for part in self.parts)

    @property
    def holds(self) -> str:
        """What a document is made from: `text`, `tokens` or `messages`."""
        return "tokens" if self.kind in ("npy", "bin") else self.field.holds

    @property
    def revision(self) -> str | None:
        """The commit of a hub dataset."""
        return next((part.commit for part in self.parts if isinstance(part, HubDataset)), None)

    def identity(self) -> CorpusIdentity:
        """The corpus by its content."""
        hub = [part for part in self.parts if isinstance(part, HubDataset)]
        fields = {f"{self.field.holds}_field": self.field.name} if self.kind in _WITH_FIELDS else {}
        return CorpusIdentity(
            kind=self.kind,
            files=len(self.parts),
            content=digest([_content(part) for part in self.parts]),
            token_dtype=self.token_dtype if self.kind == "bin" else None,
            split_at_eos=self.split_at_eos,
            revision=self.revision if len(hub) == 1 else None,
            config=hub[0].config if hub else None,
            split=hub[0].split if hub else None,
            **fields,
        )

    def documents(self, eos: int | None = None) -> Iterator[Document | BadRow]:
        """Every row, in order. Token files are cut after each `eos` if the corpus was asked to.

        Raises:
            InvalidInput: a source is not what its name says, or has changed.
            StoreError: a server fails.
        """
        for index, part in enumerate(self.parts):
            try:
                part.check_unchanged()
                yield from self._rows(index, part, eos)
                part.check_unchanged()
            except ActcacheError:
                raise
            except (OSError, EOFError, zlib.error) as error:
                raise InvalidInput(f"{part.where}: cannot be read: {error}") from None

    def where(self, source: int, row: int) -> str:
        """A row as an error names it."""
        return f"{self.parts[source].where}, row {row}"

    def check_unchanged(self, source: int) -> None:
        """Check that a source is still what the plan records.

        Raises:
            InvalidInput: it has changed.
        """
        self.parts[source].check_unchanged()

    def _rows(self, index: int, part: CorpusFile | HubDataset, eos: int | None) -> Iterator[Document | BadRow]:
        if isinstance(part, HubDataset):
            return part.documents(index)
        cut = eos if self.split_at_eos else None
        readers: dict[CorpusKind, Callable[[CorpusFile, int], Iterator[Document | BadRow]]] = {
            "text": whole_file,
            "jsonl": partial(json_lines, field=self.field),
            "csv": partial(csv_rows, field=self.field),
            "parquet": partial(parquet_rows, field=self.field),
            "saved dataset": partial(arrow_rows, field=self.field),
            "npy": partial(npy_rows, eos=cut),
            "bin": partial(bin_rows, dtype=self.token_dtype, eos=cut),
        }
        return readers[self.kind](part, index)


def open_corpus(spec: Spec, endpoint_url: str | None = None, profile: str | None = None) -> Corpus:
    """Find the sources of a spec's corpus and identify them: local files are hashed, others asked for.

    `endpoint_url` and `profile` say how to reach S3.

    Raises:
        InvalidInput: a pattern matches nothing, kinds are mixed, or an option does not fit the kind.
        StoreError: a server or the hub refuses or fails.
    """
    if not spec.corpus:
        raise InvalidInput("no corpus; give files, globs or hf://datasets/… with --corpus")
    field = _field(spec)
    parts: tuple[CorpusFile | HubDataset, ...]
    hub = [pattern for pattern in spec.corpus if pattern.startswith(SCHEME)]
    if hub:
        if len(hub) != len(spec.corpus):
            raise InvalidInput("the corpus mixes hub datasets with files; build them as two datasets")
        parts = tuple(hub_dataset(url, spec.dataset_config, spec.split, field) for url in hub)
        kind: CorpusKind = "hub dataset"
    else:
        files, saved = find(spec.corpus, Access(endpoint_url, profile, spec.corpus_anonymous), spec.split)
        parts, kind = tuple(files), "saved dataset" if saved else _kind(files)
    _check_options(spec, kind, field)
    return Corpus(kind, field, spec.token_dtype or "uint16", spec.split_at_eos, spec.strict, parts)


def _field(spec: Spec) -> Field:
    if spec.tokens_field is not None and spec.messages_field is not None:
        raise InvalidInput("--tokens-field and --messages-field: a document is made from one of them; leave one out")
    if spec.tokens_field is not None:
        return Field(spec.tokens_field, "tokens")
    if spec.messages_field is not None:
        return Field(spec.messages_field, "messages")
    return Field(spec.text_field)


def _kind(files: list[CorpusFile]) -> CorpusKind:
    kinds = {kind_of(file.source.name) for file in files}
    if len(kinds) > 1:
        raise InvalidInput(
            f"the corpus mixes {' and '.join(sorted(kinds))} files; build them as two datasets, or narrow the patterns"
        )
    return kinds.pop()


def kind_of(name: str) -> CorpusKind:
    """The kind of a file by the end of its name; whatever is not known is text."""
    return next((kind for suffix, kind in _SUFFIXES.items() if name.endswith(suffix)), "text")


def _check_options(spec: Spec, kind: CorpusKind, field: Field) -> None:
    """Refuse options that would be passed over in silence."""
    if field.holds != "text" and (kind not in _WITH_FIELDS or kind == "csv"):
        raise InvalidInput(
            f"--{field.holds}-field has no meaning for {kind} files; JSONL, Parquet and datasets hold lists"
        )
    if spec.split is not None and not kind.endswith("dataset"):
        raise InvalidInput(f"--split has no meaning for {kind} files; it chooses among a dataset's splits")
    if spec.dataset_config is not None and kind != "hub dataset":
        raise InvalidInput(f"--dataset-config has no meaning for a {kind} corpus; it is for hf://datasets/…")
    if spec.token_dtype is not None and kind != "bin":
        raise InvalidInput(f"--token-dtype has no meaning for a {kind} corpus; it is for raw .bin files")
    if spec.split_at_eos and kind not in ("npy", "bin"):
        raise InvalidInput(f"--split-at-eos has no meaning for a {kind} corpus; it is for .npy and .bin files")


def _content(part: CorpusFile | HubDataset) -> object:
    if isinstance(part, HubDataset):
        return [part.commit, part.config, part.split]
    source = part.source
    return source.sha256 if source.sha256 is not None else [source.validator, source.bytes]
