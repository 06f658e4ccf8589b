"""The files of a dataset's tokenizer: where they lie, and what the root says of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from actcache.schemas.canonical import is_sha256
from actcache.schemas.plan import RECORDS, StoredObject
from actcache.schemas.record import Record

TOKENIZER = f"{RECORDS}tokenizer/"
"""Folder of the files, which are no Zarr arrays and so lie where no Zarr reader looks."""
TOKENIZER_JSON = "tokenizer.json"
BACKEND_JSON = "tokenizer.backend.json"
"""The tokenizer as it was used, in the format of `tokenizer.json`, where that file alone would make other text of some ids."""
MAX_FILES = 16
MAX_FILE_BYTES = 64 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}")


class TokenizerFile(Record):
    """One file of the tokenizer, stored as it was."""

    name: str
    size: int
    sha256: str

    @property
    def key(self) -> str:
        """Its key."""
        return TOKENIZER + self.name

    def stored(self) -> StoredObject:
        """What the manifest says of it."""
        return StoredObject(key=self.key, size=self.size, sha256=self.sha256)


def files_among(objects: Sequence[StoredObject]) -> list[TokenizerFile]:
    """The tokenizer's files among stored objects, by name."""
    found = (entry for entry in objects if entry.key.startswith(TOKENIZER))
    files = [TokenizerFile(name=o.key.removeprefix(TOKENIZER), size=o.size, sha256=o.sha256) for o in found]
    return sorted(files, key=lambda file: file.name)


def tokenizer_problems(files: Sequence[TokenizerFile]) -> Iterator[str]:
    """What is wrong with the files that a root names: a stranger's may name anything."""
    if len(files) > MAX_FILES:
        yield f"{len(files)} tokenizer files are more than there may be ({MAX_FILES})"
    if len({file.name for file in files}) != len(files):
        yield "a tokenizer file is named twice"
    for file in files:
        if _NAME.fullmatch(file.name) is None:
            yield f"{file.name[:40]!r} is no name of a tokenizer file"
        elif not 0 <= file.size <= MAX_FILE_BYTES:
            yield f"tokenizer file {file.name!r} has {file.size:,} bytes, not 0 to {MAX_FILE_BYTES:,}"
        elif not is_sha256(file.sha256):
            yield f"the hash of tokenizer file {file.name!r} is no SHA-256"
