"""Several datasets as one, along the token axis."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from actcache.cache.head import Head
from actcache.cache.statistics import Moments
from actcache.clients.columns import Columns
from actcache.clients.dataset import Dataset
from actcache.clients.sources import JoinedSource, Shifted, Source
from actcache.clients.summary import html_summary, summary
from actcache.clients.text import Text
from actcache.clients.whole import Whole
from actcache.schemas.errors import InvalidInput, NotFound

_COUNTED = {"sequence": "n_sequences", "document": "n_documents"}
SHOWN = 3


class Joined(Whole):
    """Datasets of the same model and the same sites, one after the other. Made by `open` with several URLs.

    Sequences and documents are numbered through; a document's row in its source (`document_row`) is left to each of the `parts`. The
    statistics are those of all tokens. Head and tokenizer, which are the same in all, are read from the first.

    Attributes:
        parts: the datasets.
    """

    def __init__(self, parts: Sequence[Dataset]) -> None:
        if not parts:
            raise InvalidInput("no datasets to open: give at least one URL")
        first = parts[0]
        for other in parts[1:]:
            _check(first, other)
        self.parts = tuple(parts)
        self.url = " + ".join(part.url for part in parts)
        self.sites = list(first.sites)
        self.quantised = dict(first.quantised)
        self.d_model = first.d_model
        self.model = first.model
        self.key = " + ".join(part.key for part in parts)
        self.model_key = first.model_key
        self._n_tokens = sum(part.n_tokens for part in parts)
        self.n_sequences = sum(part.n_sequences for part in parts)
        self.n_documents = sum(part.n_documents for part in parts)

    def source(self, name: str, kind: str | None = None) -> Source:
        """See `View`."""
        sources = [part.source(name, kind) for part in self.parts]
        if sources[0].axes == ("token", "site"):
            raise NotFound(
                f"{self.url}: the columns of {name!r} may differ from part to part; ds.norm has them by site"
            )
        if sources[0].axes[0] != "token":
            raise NotFound(f"{self.url}: {name!r} is not along the token axis; ask one of ds.parts for it")
        if name in _COUNTED:
            before = accumulate((getattr(part, _COUNTED[name]) for part in self.parts), initial=0)
            sources = [Shifted(source, by) if by else source for source, by in zip(sources, before, strict=False)]
        return JoinedSource(sources)

    def norm_source(self, site: str) -> Source:
        """See `View`."""
        return JoinedSource([part.norm_source(site) for part in self.parts])

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """See `View`. What every part has."""
        return tuple(name for name in self.parts[0].fields if all(name in part.fields for part in self.parts))

    @cached_property
    def tokens(self) -> Columns:
        """See `View`. With `sequence_start` among them."""
        names = [name for name in self.parts[0].tokens if all(name in part.tokens for part in self.parts)]
        return Columns(f"{self.url}: no token array", [n for n in names if n != "document_row"], self._read)

    def _read(self, name: str) -> np.ndarray:
        if name != "sequence_start":
            return self.source(name).open().read()
        before = accumulate((part.n_tokens for part in self.parts), initial=0)
        starts = [part.sequence_start[:-1] + by for part, by in zip(self.parts, before, strict=False)]
        return np.concatenate([*starts, [self._n_tokens]])

    @cached_property
    def norm(self) -> Columns:
        """See `View`."""
        return Columns(
            f"{self.url}: no site",
            self.captured,
            lambda site: np.concatenate([part.norm[site] for part in self.parts]),
        )

    @cached_property
    def statistics(self) -> dict[str, dict[str, np.ndarray]]:
        """See `View`."""
        found = {}
        for site in self.captured:
            total = Moments.empty(len(self.parts[0].statistics[site]["mean"]))
            for part in self.parts:
                own = part.statistics[site]
                total = total.merge(Moments(part.n_tokens, own["mean"], own["variance"] * part.n_tokens))
            found[site] = {"mean": total.mean, "variance": total.variance}
        return found

    @property
    def head(self) -> Head:
        """See `View`."""
        return self.parts[0].head

    @property
    def tokenizer(self) -> Text:
        """See `View`."""
        return self.parts[0].tokenizer

    def facts(self) -> dict[str, str]:
        """What a summary shows, in order."""
        shown = [part.url for part in self.parts[:SHOWN]] + (["…"] if len(self.parts) > SHOWN else [])
        return {
            "urls": f"{len(self.parts)}: {' '.join(shown)}",
            "model": self.parts[0].facts()["model"],
            "tokens": f"{self.n_tokens:,} in {self.n_sequences:,} sequences, {self.n_documents:,} documents",
            "sites": self.parts[0].facts()["sites"],
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return Joined, (self.parts,)

    def __repr__(self) -> str:
        return summary(self.facts())

    def _repr_html_(self) -> str:
        return html_summary(self.facts())


def _check(first: Dataset, other: Dataset) -> None:
    """Refuse datasets whose rows do not mean the same."""

    def differ(what: str, ours: object, theirs: object) -> None:
        raise InvalidInput(f"{first.url} and {other.url} cannot be one dataset: {what}: {ours} and {theirs}")

    if first.provenance.spec.model != other.provenance.spec.model or first.model != other.model:
        differ("their models differ", *(_model(ds) for ds in (first, other)))
    if first.provenance.spec.tokenizer != other.provenance.spec.tokenizer:
        differ("their tokenizers differ", *(ds.provenance.spec.tokenizer for ds in (first, other)))
    if first.sites != other.sites or first.quantised != other.quantised:
        mine, theirs = set(first.captured), set(other.captured)
        differ(
            "their sites differ",
            f"{', '.join(sorted(mine - theirs)) or 'nothing'} in the first alone",
            f"{', '.join(sorted(theirs - mine)) or 'nothing'} in the second alone",
        )
    if first.dtypes != other.dtypes:
        differ("they are stored in different dtypes", first.dtype, other.dtype)
    widths = [{site: ds.source(site).shape[1] for site in ds.sites} for ds in (first, other)]
    if widths[0] != widths[1]:
        differ("their sites differ in width", widths[0], widths[1])


def _model(ds: Dataset) -> str:
    return f"{ds.provenance.labels.model} ({ds.provenance.spec.model.weights[:12]})"
