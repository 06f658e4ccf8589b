"""The dataset in the hands of other readers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actcache.cache.local_cache import CachedStore
from actcache.cache.local_store import LocalStore
from actcache.cache.remote_store import RemoteStore
from actcache.cache.store import Store
from actcache.schemas.errors import Unsupported

if TYPE_CHECKING:
    import zarr


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
