"""Finding and reading a dataset's root and its small parts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from actcache.cache.head import Head
from actcache.cache.reader import ArrayReader
from actcache.cache.store import Store
from actcache.schemas.array import ArrayLayout
from actcache.schemas.errors import Corrupt, NotFound, NotSealed, Unsupported
from actcache.schemas.plan import PLAN_KEY, Plan
from actcache.schemas.receipt import HEAD_RECEIPT, HeadReceipt
from actcache.schemas.root import ROOT_KEY, RootAttributes, parse_root

HEAD = "head/"


@dataclass(frozen=True)
class SealedRoot:
    """A dataset's root: its attributes, and the layout of every array."""

    attributes: RootAttributes
    layouts: dict[str, ArrayLayout]
    data: bytes


def read_root(store: Store) -> SealedRoot:
    """Read the root of a sealed dataset: one GET.

    Raises:
        NotFound: there is no dataset.
        NotSealed: a build was begun here and is not finished.
        Corrupt, Unsupported: the root is damaged, foreign or newer than this version.
    """
    where = str(store.location.child(ROOT_KEY))
    found = store.get_or_none(ROOT_KEY)
    if found is None:
        if store.get_or_none(PLAN_KEY) is not None:
            raise NotSealed(
                f"{store.location}: a build was begun here and is not finished; run the same 'actcache build' again to resume it"
            )
        raise NotFound(f"{store.location}: there is no dataset here; 'actcache ls' lists those under a prefix")
    data = bytes(found)
    attributes, layouts = parse_root(data, where)
    return SealedRoot(attributes, layouts, data)


def read_plan(store: Store) -> Plan | None:
    """The plan of a build, or None where none was begun.

    Raises:
        Corrupt: it is not a plan.
    """
    data = store.get_or_none(PLAN_KEY)
    return None if data is None else Plan.from_bytes(bytes(data), str(store.location.child(PLAN_KEY)))


def read_head(store: Store, root: SealedRoot) -> Head:
    """The stored head, its arrays as float32.

    Raises:
        NotFound: the dataset was built without a head.
        Corrupt: a part of it is missing or damaged.
        Unsupported: an array with an operation that this version does not know.
    """
    names = [name for name, role in root.attributes.arrays.items() if role.role == "head"]
    if not names:
        raise NotFound(f"{store.location}: the dataset was built without a head (--no-head)")
    try:
        receipt = HeadReceipt.from_bytes(bytes(store.get(HEAD_RECEIPT)), str(store.location.child(HEAD_RECEIPT)))
    except NotFound:
        raise Corrupt(f"{store.location.child(HEAD_RECEIPT)}: the object is missing") from None
    arrays: dict[str, np.ndarray] = {}
    for name in receipt.arrays:
        if HEAD + name not in root.layouts:
            raise Unsupported(f"{store.location}: the head names an array {name!r} that the dataset lacks")
        arrays[name] = ArrayReader(store, root.layouts[HEAD + name]).read().astype(np.float32)
    return Head(receipt.operations, arrays)
