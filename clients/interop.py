"""A view in the hands of other libraries: zarr-python, xarray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.cache.local_cache import CachedStore
from actcache.cache.local_store import LocalStore
from actcache.cache.remote_store import RemoteStore
from actcache.cache.store import Store
from actcache.clients.lazy import lazy
from actcache.clients.sources import Column
from actcache.clients.token_index import Span
from actcache.schemas.errors import Unsupported
from actcache.schemas.grid import TOKEN_DTYPES

if TYPE_CHECKING:
    import dask.array as da
    import xarray
    import zarr

    from actcache.clients.view import View


PLACES = "token"
"""The coordinate that says where tokens stand on the dataset's token axis."""


def zarr_group(store: Store) -> zarr.Group:
    """A dataset as a zarr-python group, read-only, over the same connection, and past a local cache.

    Raises:
        Unsupported: the store has no zarr-python counterpart.
    """
    import zarr
    from zarr.storage import LocalStore as ZarrLocalStore
    from zarr.storage import ObjectStore

    if isinstance(store, CachedStore):
        store = store.remote
    if isinstance(store, LocalStore):
        return zarr.open_group(ZarrLocalStore(store.root, read_only=True), mode="r")
    if isinstance(store, RemoteStore):
        return zarr.open_group(ObjectStore(store.objects, read_only=True), mode="r")
    raise Unsupported(f"{store.location}: zarr-python has no store of this kind")


def to_xarray(view: View) -> xarray.Dataset:
    """See `View.to_xarray`."""
    import xarray

    names = [name for name in view.fields if name in TOKEN_DTYPES]
    coordinates: dict[str, Any] = {name: xarray.Variable(("token",), _unread(view, name)) for name in names}
    if not (isinstance(view.index, Span) and view.index.start == 0):
        coordinates["token"] = xarray.Variable(("token",), _unread(view, PLACES))
    variables: dict[str, Any] = {name: (("token",), view[name]) for name in view.fields if name not in names}
    for site in view.sites:
        source = view.source(site)
        variables[site] = (source.axes, view.site(site))
    if all(site in view.sites for site in view.residual_states):
        variables["resid"] = (("layer", "token", "d_model"), view.resid)
        coordinates["layer"] = (("layer",), np.array(view.layers))
        coordinates["state"] = (("layer",), np.array(view.residual_states))
    if view.captured:
        variables["norm"] = (("token", "site"), _norms(view))
        coordinates["site"] = (("site",), np.array(view.captured))
    return xarray.Dataset(variables, coordinates, {"url": view.url})


def _norms(view: View) -> da.Array:
    """The norms of all sites, (token, site): an array that has just these as it is, else column by column."""
    import dask.array as da

    columns = [view.norm_source(site) for site in view.captured]
    first = columns[0]
    if isinstance(first, Column):
        there = [
            column.column for column in columns if isinstance(column, Column) and column.base.key == first.base.key
        ]
        if there == list(range(first.base.shape[1])) and len(there) == len(columns):
            return lazy(first.base, view.index, first.dtype)
    norms = [lazy(column, view.index, column.dtype) for column in columns]
    stacked: da.Array = da.stack(norms, axis=1)  # type: ignore[no-untyped-call]
    return stacked


def _unread(view: View, name: str) -> Any:
    """A field as an array that xarray reads when it first looks at it, as it reads those of a file: then it is numpy's."""
    from xarray.core import indexing

    return indexing.LazilyIndexedArray(_field(view, name))


def _field(view: View, name: str) -> Any:
    from xarray.backends import BackendArray
    from xarray.core import indexing

    class Field(BackendArray):
        shape = (view.n_tokens,)
        dtype = np.dtype(np.int64) if name == PLACES else view.source(name).dtype

        def __getitem__(self, key: Any) -> np.ndarray:
            support = indexing.IndexingSupport.OUTER_1VECTOR
            found = indexing.explicit_indexing_adapter(key, self.shape, support, lambda rows: self._all()[rows])
            return np.asarray(found)

        def _all(self) -> np.ndarray:
            return view.index.tokens(0, view.n_tokens) if name == PLACES else view.tokens[name]

        def __reduce__(self) -> tuple[Any, ...]:
            return _field, (view, name)  # the class is made here, since xarray need not be installed

    return Field()
