"""Listing the datasets under a prefix."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from actcache.cache.location import Location
from actcache.cache.opening import read_plan, read_root
from actcache.cache.store import Store, open_store
from actcache.schemas.errors import ActcacheError, NotSealed, Unsupported
from actcache.schemas.plan import PLAN_KEY, Plan
from actcache.schemas.root import ROOT_KEY

State = Literal["sealed", "building", "unreadable"]


@dataclass(frozen=True)
class Entry:
    """One dataset under a prefix. Sizes are known once it is sealed; `problem` says why one is unreadable."""

    url: str
    state: State
    model: str | None = None
    corpus: tuple[str, ...] = ()
    dtype: str | None = None
    sites: tuple[str, ...] = ()
    n_tokens: int | None = None
    key: str | None = None
    problem: str | None = None


def catalog(
    prefix: str | Path | Location,
    pool: Executor,
    *,
    endpoint_url: str | None = None,
    profile: str | None = None,
    anonymous: bool = False,
) -> list[Entry]:
    """Every dataset under a prefix (local or `s3://`), sealed or being built, sorted by URL.

    Raises:
        Unsupported: the store has no listings (HTTP).
        StoreError: the store failed.
    """
    location = Location.of(prefix, endpoint_url=endpoint_url, profile=profile, anonymous=anonymous)
    store = open_store(location)
    if location.scheme in ("http", "https"):
        raise Unsupported(f"{location}: http(s) has no listings; give a dataset's own URL to 'actcache info'")
    names = sorted(_dataset_prefixes(store))
    return list(pool.map(lambda name: _entry(location.child(name) if name else location), names))


def _dataset_prefixes(store: Store) -> Iterator[str]:
    """Prefixes that hold a dataset. A folder with a `zarr.json` or a `.actcache` is not descended into."""
    folders = [""]
    while folders:
        prefix = folders.pop()
        below, names = store.children(prefix)
        if ".actcache" in below and (ROOT_KEY in names or _has_plan(store, prefix)):
            yield prefix.rstrip("/")
        elif ROOT_KEY not in names:
            folders += [f"{prefix}{name}/" for name in below - {".actcache"}]


def _has_plan(store: Store, prefix: str) -> bool:
    folder, _, name = PLAN_KEY.rpartition("/")
    return name in store.children(f"{prefix}{folder}/")[1]


def _entry(location: Location) -> Entry:
    url = location.url
    try:
        store = open_store(location)
        try:
            root = read_root(store)
        except NotSealed:
            plan = read_plan(store)
            assert plan is not None
            return _described(url, "building", plan)
        generation = root.attributes.generations[0]
        labels = generation.provenance.labels
        stored_as = dict.fromkeys(part.provenance.spec.stored_as for part in root.attributes.generations)
        return Entry(
            url,
            "sealed",
            labels.model,
            labels.corpus,
            ", ".join(stored_as),
            tuple(root.attributes.captured),
            root.attributes.n_tokens,
            generation.key,
        )
    except ActcacheError as error:
        return Entry(url, "unreadable", problem=str(error))


def _described(url: str, state: State, plan: Plan) -> Entry:
    spec = plan.spec
    return Entry(url, state, plan.labels.model, plan.labels.corpus, spec.stored_as, spec.sites, None, plan.key)
