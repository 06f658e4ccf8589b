"""Tokens of a dataset with everything that is stored of them: what a whole dataset and a selection have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from actcache.clients.columns import Columns
from actcache.clients.lazy import lazy, lazy_stack
from actcache.clients.sources import Source, read
from actcache.clients.token_index import TokenIndex
from actcache.schemas.dtypes import numpy_dtype
from actcache.schemas.errors import InvalidInput, NotFound
from actcache.schemas.plan import ModelShape
from actcache.schemas.quantised import KINDS
from actcache.schemas.sites import residual_stream

if TYPE_CHECKING:
    import dask.array as da
    import datasets
    import torch
    import xarray

    from actcache.cache.head import Head
    from actcache.clients.text import Text


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
    def tokens(self) -> Columns:
        """The small arrays of the token axis by name, numpy, each read when it is first asked for."""

    @property
    @abstractmethod
    def norm(self) -> Columns:
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

    def __iter__(self) -> Iterator[str]:
        """The sites, in model order."""
        return iter(self.sites)

    def __contains__(self, name: object) -> bool:
        """Whether there is an array of that name."""
        try:
            self.source(str(name))
        except NotFound:
            return False
        return True

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
                f"ds.site({name!r}, dtype={kinds[0]!r}) gives its values to within that damage, and so does dtype={kinds[0]!r} of batches"
            )
        sites = self.sites or list(self.quantised)
        near = ", ".join(sites[:4]) + (", …" if len(sites) > 4 else "")
        listed = "ds.sites" if self.sites else "ds.quantised"
        return NotFound(f"{self.url}: no site {name!r}; there is {near} ({listed} lists all)")

    def field_source(self, name: str) -> Source:
        """Where an array of one number a token comes from.

        Raises:
            NotFound: no such array.
        """
        if name not in self.fields:
            raise NotFound(f"{self.url}: no field {name!r}; there is {', '.join(self.fields)}")
        return self.source(name)

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
        wanted = self.residual_states
        missing = [site for site in wanted if site not in self.sites]
        if missing:
            if missing[0] in self.quantised:
                raise self._no_site(missing[0])
            raise NotFound(f"{self.url}: ds.resid needs every residual state, and {missing[0]!r} was not stored")
        return lazy_stack("resid", [self.source(site) for site in wanted], self.index, numpy_dtype("float32"))

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
        from actcache.clients.torch_dataset import tensor

        source, as_dtype = self._site(name, dtype)
        return tensor(read(source, self.index, 0, self.n_tokens, as_dtype))

    def to_datasets(
        self,
        path: str | Path,
        sites: str | Sequence[str],
        columns: Sequence[str] = ("token_id", "document", "position"),
        dtype: Literal["float32", "stored"] = "float32",
    ) -> datasets.Dataset:
        """Write the view to an Arrow file, and open it as a memory-mapped dataset of Hugging Face. Needs the package `datasets`.

        A row is a token: the sites as lists of d_model numbers, `columns`, and `token`, the place on the dataset's token axis.
        It is written in pieces, so a view may be larger than memory.

        Raises:
            NotFound: no such site or field.
            InvalidInput: the file exists, or bfloat16 as stored, which Arrow does not have.
        """
        from actcache.clients.bridges import to_datasets

        asked = {name: self._site(name, dtype) for name in ([sites] if isinstance(sites, str) else sites)}
        return to_datasets(path, asked, {name: self.field_source(name) for name in columns}, self.index)
