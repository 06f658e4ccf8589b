"""Choosing tokens of a view, by what is known of them or by their places."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.clients.columns import Columns
from actcache.clients.conditions import conditions
from actcache.clients.filtering import checked_mask, kept
from actcache.clients.sources import Source, read
from actcache.clients.token_index import Listed, TokenIndex
from actcache.clients.trainable import Trainable
from actcache.schemas.errors import InvalidInput
from actcache.schemas.sites import residual_stream

if TYPE_CHECKING:
    from actcache.cache.head import Head
    from actcache.clients.text import Text
    from actcache.clients.whole import Whole

LAYER, NORM = "layer", "norm"
PLACE_BITS = 40
"""A document has fewer tokens than two to the power of this."""


class Selectable(Trainable):
    """A view of which tokens and layers can be chosen."""

    @property
    @abstractmethod
    def whole(self) -> Whole:
        """The dataset that the tokens are of."""

    def where(self, *masks: Any, site: str | None = None, **asked: Any) -> Selection:
        """The tokens for which everything holds that is asked: a lazy selection with the same accessors.

        Keywords are `field=value`, or `field__operator=value` with eq, ne, lt, le, gt, ge or in; a list of values means in. Fields are
        the arrays with one number a token (`position`, `document`, `sequence`, `token_id`, `document_position`, `loss`, …); `special`
        (True, False, 'bos' or 'eos'); `norm`, the L2 norm at `site`; and `layer`, which chooses among the states of the
        residual stream, 0 being the embedding. `masks` are boolean arrays, numpy or Dask, with one value a token of this view.

        Nothing is read before the selection is used. Then the named fields of this view's tokens are read, once.

        Raises:
            InvalidInput: no such field, operator or value; a norm without its site; a mask of another length.
            NotFound: no such site.
        """
        found = conditions(asked, [*self.fields, NORM, LAYER])
        layers = list(self.layers)
        for condition in (each for each in found if each.field == LAYER):
            layers = [layer for layer in layers if condition.holds(np.array([layer])).all()]
        if any(each.field == LAYER for each in found) and not layers:
            raise InvalidInput(f"where(layer…): no such layer; there is {min(self.layers)} to {max(self.layers)}")
        of_tokens = [each for each in found if each.field != LAYER]
        if any(each.field == NORM for each in of_tokens):
            if site is None:
                raise InvalidInput(
                    f"where({NORM}…): say at which site: where({NORM}__lt=500, site={self._example()!r})"
                )
            self.norm_source(site)
        elif site is not None:
            raise InvalidInput(f"where(site={site!r}): a site goes with a condition on the norm, such as norm__lt=500")
        checked = [checked_mask(mask) for mask in masks]
        chosen = None if len(layers) == len(self.layers) else tuple(layers)
        if not of_tokens and not checked:
            return Selection(self, lambda: self.index, chosen)
        return Selection(self, lambda: kept(self.index, partial(self._column, site=site), of_tokens, checked), chosen)

    def _column(self, field: str, low: int, high: int, site: str | None) -> np.ndarray:
        """A field of the tokens at positions [low, high), without keeping it."""
        if field == NORM and site is not None:
            return read(self.norm_source(site), self.index, low, high)
        have = self.tokens.kept(field)
        return self.rows(field, low, high) if have is None else have[low:high]

    def _example(self) -> str:
        return (self.sites or list(self.quantised))[-1]

    def at(self, tokens: Any) -> Selection:
        """The tokens at these positions of the view, in this order, any of them as often as it is named; of a dataset, its token axis.

        Raises:
            InvalidInput: no list of whole numbers.
            IndexError: a position beyond the last.
        """
        wanted = np.asarray(tokens)
        if wanted.ndim == 0:
            wanted = wanted[None]
        if wanted.ndim != 1 or (wanted.dtype.kind not in "iu" and len(wanted)):
            raise InvalidInput(
                f"at(tokens=…): a list of whole numbers is asked for, not {wanted.ndim}-dimensional {wanted.dtype}"
            )
        wanted = wanted.astype(np.int64)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < self.n_tokens):
            raise IndexError(f"{self.url}: tokens {wanted.min()} to {wanted.max()} of {self.n_tokens}")
        return Selection(self, lambda: Listed(self.index.at(wanted)), None)


class Selection(Selectable):
    """Some tokens of a dataset, or of another selection, and some layers. Made by `where`, `at`, `sequence` and `document`.

    `statistics` and `head` are those of the whole dataset.
    """

    def __init__(self, base: Selectable, index: Callable[[], TokenIndex], layers: Sequence[int] | None) -> None:
        self._base = base
        self._make_index = index
        self._index: TokenIndex | None = None
        self._layers = base.layers if layers is None else layers
        self.url = base.url
        self.model = base.model
        self.d_model = base.d_model
        stream = residual_stream(base.model.n_layers)
        chosen = {stream[layer] for layer in self._layers}
        restricted = len(self._layers) < base.model.n_layers + 1
        self.sites = [site for site in base.sites if not restricted or site in chosen]
        self.quantised = {site: kinds for site, kinds in base.quantised.items() if not restricted or site in chosen}

    @property
    def index(self) -> TokenIndex:
        """See `View`. Found when it is first asked for, and kept.

        No `cached_property`: until Python 3.12 that holds one lock for all selections, and a mask that Dask computes may ask for another's.
        """
        if self._index is None:
            self._index = self._make_index()
        return self._index

    @property
    def whole(self) -> Whole:
        """See `Selectable`."""
        return self._base.whole

    @property
    def layers(self) -> Sequence[int]:
        """See `View`."""
        return self._layers

    def source(self, name: str, kind: str | None = None) -> Source:
        """See `View`. A site of a layer that was not chosen is not there."""
        if name in self._base.captured and name not in self.captured:
            raise self._no_site(name)
        return self._base.source(name, kind)

    def norm_source(self, site: str) -> Source:
        """See `View`."""
        return self._base.norm_source(site)

    @property
    def fields(self) -> tuple[str, ...]:
        """See `View`."""
        return self._base.fields

    @property
    def statistics(self) -> dict[str, dict[str, np.ndarray]]:
        """See `View`."""
        return self._base.statistics

    @property
    def head(self) -> Head:
        """See `View`."""
        return self._base.head

    @property
    def tokenizer(self) -> Text:
        """See `View`."""
        return self._base.tokenizer

    @cached_property
    def tokens(self) -> Columns:
        """See `View`."""
        return Columns(f"{self.url}: no field", self.fields, lambda name: self.rows(name, 0, self.n_tokens))

    @cached_property
    def norm(self) -> Columns:
        """See `View`."""
        return Columns(f"{self.url}: no site", self.captured, self._norms)

    def _norms(self, site: str) -> np.ndarray:
        return read(self.norm_source(site), self.index, 0, self.n_tokens)

    @property
    def text(self) -> str:
        """The text of the tokens, in their order.

        Left out are, but for a list of tokens (`at`), beginning-of-sequence tokens that no document has, and what
        overlapping sequences repeat.

        Raises: as `tokenizer`.
        """
        ids = self.tokens["token_id"]
        if self.index.ascending and len(ids):
            document = self.tokens["document"]
            place = (document - document.min() << PLACE_BITS) + self.tokens["document_position"]
            latest = np.concatenate([[-1], np.maximum.accumulate(place)[:-1]])
            ids = ids[(place > latest) & (self.tokens["document_position"] >= 0)]
        return self.tokenizer.decode(ids)

    @property
    def strings(self) -> list[str]:
        """Each token by itself as text.

        Raises: as `tokenizer`.
        """
        return self.tokenizer.strings(self.tokens["token_id"])

    def __reduce__(self) -> tuple[Any, ...]:
        """A selection travels with its tokens, which are looked up before."""
        return _selection, (self._base, self.index, self._layers)

    def __repr__(self) -> str:
        known = f"{self.n_tokens:,} tokens" if self._index is not None else "tokens not looked at yet"
        return f"<actcache.Selection of {self.url}: {known}, {len(self.sites)} sites>"


def _selection(base: Selectable, index: TokenIndex, layers: Sequence[int]) -> Selection:
    return Selection(base, lambda: index, layers)
