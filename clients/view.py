"""Tokens of a dataset with everything that is stored of them: what a whole dataset and a selection have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from actcache.clients.columns import Columns
from actcache.clients.conditions import conditions
from actcache.clients.filtering import checked_mask, kept
from actcache.clients.lazy import lazy
from actcache.clients.sources import Source, read
from actcache.clients.token_index import Listed, TokenIndex
from actcache.schemas.dtypes import numpy_dtype
from actcache.schemas.errors import InvalidInput, NotFound
from actcache.schemas.plan import ModelShape
from actcache.schemas.quantised import KINDS
from actcache.schemas.sites import residual_stream

if TYPE_CHECKING:
    import dask.array as da
    import torch
    import xarray

    from actcache.cache.head import Head
    from actcache.clients.text import Text

LAYER, NORM = "layer", "norm"
PLACE_BITS = 40
"""A document has fewer tokens than two to the power of this."""


class View(ABC):
    """Tokens of a dataset, in some order, and some of its sites.

    Attributes:
        url: where the dataset is.
        sites: names of the activation sites whose values are stored as they are, in model order.
        quantised: the kinds in which each site is stored quantised, by site.
        d_model: width of the residual stream.
        model: the model's shape.
    """

    url: str
    sites: list[str]
    quantised: dict[str, tuple[str, ...]]
    d_model: int
    model: ModelShape

    @property
    @abstractmethod
    def index(self) -> TokenIndex:
        """Which tokens, by their places on the dataset's token axis."""

    @abstractmethod
    def source(self, name: str, kind: str | None = None) -> Source:
        """Where the rows of an array come from, of all tokens of the dataset; of a site's quantised form with a `kind`.

        Raises:
            NotFound: no array of that name, or a site that is not stored so.
        """

    @abstractmethod
    def norm_source(self, site: str) -> Source:
        """Where the L2 norms of a site come from, (token,), of all tokens of the dataset.

        Raises:
            NotFound: no such site.
        """

    @property
    @abstractmethod
    def fields(self) -> tuple[str, ...]:
        """Names of the arrays that have one number a token."""

    @property
    @abstractmethod
    def tokens(self) -> Mapping[str, np.ndarray]:
        """The small arrays of the token axis by name, numpy, each read when it is first asked for."""

    @property
    @abstractmethod
    def norm(self) -> Mapping[str, np.ndarray]:
        """L2 norm of every vector by site, each (token,), float32: as stored, or as it was before it was quantised alone."""

    @property
    @abstractmethod
    def statistics(self) -> dict[str, dict[str, np.ndarray]]:
        """Mean and variance per dimension by site, each (d_model,), float64, over all tokens of the dataset."""

    @property
    @abstractmethod
    def head(self) -> Head:
        """Final norm and unembedding, evaluated in numpy.

        Raises:
            NotFound: the dataset was built without a head.
        """

    @property
    @abstractmethod
    def tokenizer(self) -> Text:
        """What makes text of token ids.

        Raises:
            NotFound: the dataset has no tokenizer.
            Unsupported: its tokenizer needs more than the package tokenizers, or that is not installed.
        """

    @property
    def layers(self) -> Sequence[int]:
        """Which states of the residual stream `resid` has; 0 is the embedding."""
        return range(self.model.n_layers + 1)

    @property
    def n_tokens(self) -> int:
        """How many tokens."""
        return len(self.index)

    def __getitem__(self, name: str) -> da.Array:
        """A site, or any other array of the dataset, as a lazy Dask array; a site's values as float32.

        A site's shape is (token, d_model). One Dask chunk is what there is of one shard. Slices read only the chunks of the store that
        they touch.

        Raises:
            NotFound: no array of that name, or a site that is stored in quantised form alone: `site` gives that.
        """
        if name in self.sites or name in self.quantised:
            return self.site(name)
        source = self.source(name)
        return lazy(source, self._index_of(source), source.dtype)

    def site(
        self,
        name: str,
        dtype: Literal["float32", "stored", "int8", "fp8"] = "float32",
        chunks: int | None = None,
    ) -> da.Array:
        """A site as a lazy Dask array (token, d_model), float32 or as stored, or the values of a quantised form, float32.

        `chunks` is the number of tokens of a Dask chunk; by default, as many as a shard has. numpy sums float16 and bfloat16 in their own
        precision, which is silently wrong; hence float32 by default. The values of a quantised form differ from the exact ones by
        what `damage` tells, so they are given to who asks for them alone.

        Raises:
            NotFound: no site of that name, or it is not stored in that form.
            InvalidInput: another dtype, or no number of tokens.
        """
        source, as_dtype = self._site(name, dtype)
        return lazy(source, self.index, as_dtype, chunks)

    def _site(self, name: str, dtype: str) -> tuple[Source, np.dtype]:
        if dtype in KINDS:
            return self.source(name, dtype), numpy_dtype("float32")
        if dtype not in ("float32", "stored"):
            raise InvalidInput(f"dtype {dtype!r} is none of 'float32', 'stored', {', '.join(map(repr, KINDS))}")
        if name not in self.sites:
            raise self._no_site(name)
        source = self.source(name)
        return source, source.dtype if dtype == "stored" else numpy_dtype("float32")

    def _no_site(self, name: str) -> NotFound:
        if name in self.quantised:
            kinds = self.quantised[name]
            return NotFound(
                f"{self.url}: site {name!r} is stored in quantised form alone ({', '.join(kinds)}); "
                f"ds.site({name!r}, dtype={kinds[0]!r}) gives its values to within that damage"
            )
        sites = self.sites or list(self.quantised)
        near = ", ".join(sites[:4]) + (", …" if len(sites) > 4 else "")
        listed = "ds.sites" if self.sites else "ds.quantised"
        return NotFound(f"{self.url}: no site {name!r}; there is {near} ({listed} lists all)")

    def _index_of(self, source: Source) -> TokenIndex:
        """The view's tokens, of an array that is along the token axis."""
        if source.axes[0] != "token":
            raise NotFound(f"{self.url}: {source.name!r} is not along the token axis; ask the whole dataset for it")
        return self.index

    @property
    def residual_states(self) -> list[str]:
        """The sites that `resid` is made of, whether or not they are stored."""
        stream = residual_stream(self.model.n_layers)
        return [stream[layer] for layer in self.layers]

    @property
    def captured(self) -> list[str]:
        """Every site in any form; those stored as they are first."""
        return [*self.sites, *(site for site in self.quantised if site not in self.sites)]

    @property
    def resid(self) -> da.Array:
        """The residual stream as a lazy Dask array (layer, token, d_model), float32; index 0 is the embedding.

        Of a selection by layer, those layers.

        Raises:
            NotFound: the dataset lacks one of its states.
        """
        import dask.array as da

        wanted = self.residual_states
        missing = [site for site in wanted if site not in self.sites]
        if missing:
            if missing[0] in self.quantised:
                raise self._no_site(missing[0])
            raise NotFound(f"{self.url}: ds.resid needs every residual state, and {missing[0]!r} was not stored")
        stacked: da.Array = da.stack([self.site(site) for site in wanted])  # type: ignore[no-untyped-call]
        return stacked

    def rows(self, name: str, start: int, stop: int, quantised: str | None = None) -> np.ndarray:
        """Rows [start, stop) of an array at once, without Dask; in the stored dtype.

        With `quantised`, a kind, the values of that form of a site, float32.

        Raises:
            NotFound: no array of that name, or no such form of it.
            IndexError: the range is not within it.
        """
        source = self.source(name, quantised)
        index = self._index_of(source)
        if not 0 <= start <= stop <= len(index):
            raise IndexError(f"{name}: rows {start}:{stop} of {len(index)}")
        return read(source, index, start, stop)

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
        have = self.tokens.kept(field) if isinstance(self.tokens, Columns) else None
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
        return Selection(self, lambda: Listed(self.index.tokens(0, self.n_tokens)[wanted]), None)

    def to_xarray(self) -> xarray.Dataset:
        """The view as an xarray Dataset of lazy arrays, with coordinates. Needs the extra `xarray`.

        Variables: every site (token, d_model), float32; `resid` (layer, token, d_model), if all of it is there; `norm` (token, site); what
        else has one value or row a token (`loss`, …). Coordinates along `token`: `token_id`, `position`, `sequence`, `document`,
        `document_position`, `special`, lazy too; of a selection also `token`, the place on the dataset's token axis.
        """
        from actcache.clients.interop import to_xarray

        return to_xarray(self)

    def to_torch(self, name: str, dtype: Literal["float32", "stored", "int8", "fp8"] = "float32") -> torch.Tensor:
        """A site of all tokens of the view as one tensor (token, d_model) in memory, float32 or, exactly, as stored. Needs torch.

        Raises:
            NotFound, InvalidInput: as `site`.
        """
        from actcache.clients.interop import tensor

        source, as_dtype = self._site(name, dtype)
        return tensor(read(source, self.index, 0, self.n_tokens, as_dtype))


class Selection(View):
    """Some tokens of a dataset, or of another selection, and some layers. Made by `where`, `at`, `sequence` and `document`.

    `statistics` and `head` are those of the whole dataset.
    """

    def __init__(self, base: View, index: Callable[[], TokenIndex], layers: Sequence[int] | None) -> None:
        self._base = base
        self._make_index = index
        self._layers = base.layers if layers is None else layers
        self.url = base.url
        self.model = base.model
        self.d_model = base.d_model
        stream = residual_stream(base.model.n_layers)
        chosen = {stream[layer] for layer in self._layers}
        restricted = len(self._layers) < base.model.n_layers + 1
        self.sites = [site for site in base.sites if not restricted or site in chosen]
        self.quantised = {site: kinds for site, kinds in base.quantised.items() if not restricted or site in chosen}

    @cached_property
    def index(self) -> TokenIndex:
        """See `View`. Found when it is first asked for, and kept."""
        return self._make_index()

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
    def tokens(self) -> Mapping[str, np.ndarray]:
        """See `View`."""
        return Columns(f"{self.url}: no field", self.fields, lambda name: self.rows(name, 0, self.n_tokens))

    @cached_property
    def norm(self) -> Mapping[str, np.ndarray]:
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
            place = (self.tokens["document"] << PLACE_BITS) + self.tokens["document_position"]
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
        known = f"{self.n_tokens:,} tokens" if "index" in self.__dict__ else "tokens not looked at yet"
        return f"<actcache.Selection of {self.url}: {known}, {len(self.sites)} sites>"


def _selection(base: View, index: TokenIndex, layers: Sequence[int]) -> Selection:
    return Selection(base, lambda: index, layers)
