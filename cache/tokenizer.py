"""The tokenizer's files as they are stored and read: plain objects, exactly as they lay beside the model."""

from __future__ import annotations

from collections.abc import Mapping

from actcache.cache.opening import SealedRoot
from actcache.cache.publish import publish_same
from actcache.cache.store import Store
from actcache.schemas.canonical import sha256
from actcache.schemas.errors import Corrupt, NotFound, Unsupported
from actcache.schemas.plan import StoredObject
from actcache.schemas.root_document import ADVICE
from actcache.schemas.tokenizer import TOKENIZER

OTHER_TOKENIZER = (
    "is another than this tokenizer's; another version of it began this build: use that one, or build into another URL"
)


def store_tokenizer(store: Store, files: Mapping[str, bytes]) -> list[StoredObject]:
    """Store files by name, or find them stored.

    Raises:
        SpecMismatch: another content lies there.
    """
    return [publish_same(store, TOKENIZER + name, data, OTHER_TOKENIZER) for name, data in files.items()]


def read_tokenizer(store: Store, root: SealedRoot) -> dict[str, bytes]:
    """The tokenizer's files by name, each checked against its SHA-256.

    Raises:
        NotFound: none is stored.
        Corrupt: one is missing or damaged.
    """
    attributes = root.attributes
    if not attributes.tokenizer:
        without = attributes.generations[0].provenance.spec.tokenizer is None
        why = "it was built without one" if without else "its files were not stored with it"
        raise NotFound(
            f"{store.location}: the dataset holds no tokenizer ({why}); decode ds.tokens['token_id'] with the one that made them, "
            "and see ds.provenance.labels for the model"
        )
    found = {}
    for file in attributes.tokenizer:
        where = store.location.child(file.key)
        try:
            data = bytes(store.get(file.key, file.size))
        except NotFound:
            raise Corrupt(f"{where}: is missing; {ADVICE}") from None
        except Unsupported:
            raise Corrupt(f"{where}: has more bytes than the root says; {ADVICE}") from None
        if sha256(data) != file.sha256:
            raise Corrupt(f"{where}: its bytes hash to {sha256(data)}; {ADVICE}")
        found[file.name] = data
    return found
