"""The roots of a dataset that grew: each claimed create-only under a number, then written over `zarr.json`.

The claims decide, so that two added builds that end at once both get in; `zarr.json` follows. A reader of an old one is
right: it is a whole dataset. Who was to write it over and died is helped by whoever next builds or seals here.
"""

from __future__ import annotations

import json

from actcache.cache.opening import SealedRoot, read_root
from actcache.cache.publish import publish
from actcache.cache.seal import SealedParts
from actcache.cache.store import Store
from actcache.schemas.errors import Corrupt, StoreError
from actcache.schemas.root import MAX_ROOT_BYTES, ROOT_KEY, RootAttributes, root_key
from actcache.schemas.root_document import parse_root, root_bytes

ATTEMPTS = 10  # at writing over; each but the first follows another writer, or a store that shows what it held before


def newest_root(store: Store) -> SealedRoot:
    """The root that counts: `zarr.json`, or what was claimed after it.

    Raises:
        NotFound, NotSealed, Corrupt, Unsupported: as `read_root`, or a claimed root does not go on from the one before.
    """
    return _walk(store)[0]


def finish_root(store: Store) -> SealedRoot:
    """Write the root that counts over `zarr.json` unless it is there.

    Looks again after each writing, for it may have been written over with a newer one meanwhile.

    Raises:
        StoreError: the store refused or failed.
    """
    for _ in range(ATTEMPTS):
        newest, ahead = _walk(store)
        if not ahead:
            return newest
        store.replace(ROOT_KEY, newest.data)
    raise StoreError(
        f"{store.location.child(ROOT_KEY)}: was written over {ATTEMPTS} times, and each time an older one was read back; "
        "'actcache seal' tries again"
    )


def claimed_root(store: Store, root: SealedRoot) -> SealedRoot | None:
    """The root that was claimed next after this one, or None.

    Raises:
        Corrupt: it is damaged, or does not go on from this one.
    """
    key = root_key(len(root.attributes.generations) + 1)
    found = store.get_or_none(key, MAX_ROOT_BYTES)
    if found is None:
        return None
    where = str(store.location.child(key))
    data = bytes(found)
    newer = SealedRoot(*parse_root(data, where), data)
    if not goes_on(root.attributes, newer.attributes):
        raise Corrupt(f"{where}: does not go on from the root before it; copy both again from where the dataset came")
    return newer


def goes_on(old: RootAttributes, new: RootAttributes) -> bool:
    """Whether a root has one more generation than another, and all of its."""
    before, after = ([(part.key, part.manifest) for part in root.generations] for root in (old, new))
    return before == after[:-1] and (old.tokens_key, old.n_tokens) == (new.tokens_key, new.n_tokens)


def add_generation(store: Store, sealed: SealedParts) -> tuple[SealedRoot, bool]:
    """Claim the next root, which has one more generation, unless the build is in the newest already.

    Whoever loses a claim to another added build goes on from that one's root. Returns the newest root, and whether this
    call put the build into it.

    Raises:
        Corrupt: the root would be one that nobody could read.
    """
    key, created = sealed.grid.plan.key, False
    root = newest_root(store)
    while key not in [generation.key for generation in root.attributes.generations]:
        data = _grown(root, sealed)
        name = root_key(len(root.attributes.generations) + 1)
        parse_root(data, f"{store.location.child(name)}, not written")
        created = publish(store, name, data).created
        root = newest_root(store)
    return root, created


def _grown(root: SealedRoot, sealed: SealedParts) -> bytes:
    """The root with one more generation. Whatever else is in it, of a later version say, stays."""
    document = json.loads(root.data)
    attributes = document["attributes"]["actcache"]
    number = len(attributes["generations"])
    attributes["generations"].append(sealed.generation)
    attributes["arrays"] |= sealed.roles(number)
    return root_bytes(attributes, document["consolidated_metadata"]["metadata"] | sealed.members)


def _walk(store: Store) -> tuple[SealedRoot, bool]:
    """The root that counts, and whether it is ahead of `zarr.json`."""
    root, ahead = read_root(store), False
    while (newer := claimed_root(store, root)) is not None:
        root, ahead = newer, True
    return root, ahead
