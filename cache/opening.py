"""Finding and reading a dataset's root and its small parts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from actcache.cache.head import Head
from actcache.cache.reader import ArrayReader
from actcache.cache.store import Store
from actcache.schemas.array import ArrayLayout
from actcache.schemas.errors import Corrupt, NotFound, NotSealed
from actcache.schemas.plan import PLAN_KEY, RECORDS, TOKENS_KEY, Plan, TokensRecord, plan_key
from actcache.schemas.root import MAX_ROOT_BYTES, ROOT_KEY, RootAttributes
from actcache.schemas.root_document import parse_root

HEAD = "head/"


@dataclass(frozen=True)
class SealedRoot:
    """A dataset's root: its attributes, the layout of every array, the head's operations, and its bytes."""

    attributes: RootAttributes
    layouts: dict[str, ArrayLayout]
    operations: tuple[dict[str, str | float], ...]
    data: bytes


def read_root(store: Store) -> SealedRoot:
    """Read the root of a sealed dataset: one GET.

    Raises:
        NotFound: there is no dataset.
        NotSealed: a build was begun here and is not finished.
        Corrupt, Unsupported: the root is damaged, foreign or newer than this version.
    """
    where = str(store.location.child(ROOT_KEY))
    found = store.get_or_none(ROOT_KEY, MAX_ROOT_BYTES)
    if found is None:
        if store.get_or_none(PLAN_KEY) is not None:
            raise NotSealed(
                f"{store.location}: a build was begun here and is not finished; run the same 'actcache build' again to resume it"
            )
        raise NotFound(f"{store.location}: there is no dataset here; 'actcache ls' lists those under a prefix")
    data = bytes(found)
    return SealedRoot(*parse_root(data, where), data)


def read_plan(store: Store, records: str = RECORDS) -> Plan | None:
    """The plan of a build by the folder of its records, or None where none was begun.

    Raises:
        Corrupt: it is not a plan.
    """
    key = plan_key(records)
    data = store.get_or_none(key)
    return None if data is None else Plan.from_bytes(bytes(data), str(store.location.child(key)))


def read_tokens(store: Store) -> TokensRecord | None:
    """The record of the stored tokens, or None where they are not stored yet.

    Raises:
        Corrupt: it is not such a record.
    """
    data = store.get_or_none(TOKENS_KEY)
    return None if data is None else TokensRecord.from_bytes(bytes(data), str(store.location.child(TOKENS_KEY)))


def read_head(store: Store, root: SealedRoot) -> Head:
    """The stored head, its arrays as float32.

    Raises:
        NotFound: the dataset was built without a head.
        Corrupt: a part of it is missing or damaged.
    """
    names = [name for name, role in root.attributes.arrays.items() if role.role == "head"]
    if not names:
        raise NotFound(f"{store.location}: the dataset was built without a head (--no-head)")
    arrays = {
        name.removeprefix(HEAD): ArrayReader(store, root.layouts[name]).read().astype(np.float32) for name in names
    }
    if not root.operations:
        raise Corrupt(f"{store.location.child(ROOT_KEY)}: the head declares no operations")
    head = Head(root.operations, arrays)
    head.check(root.attributes.d_model)
    return head
