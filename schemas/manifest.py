"""The manifest: every object of a sealed dataset but the root and itself, one JSON line each, sorted by key."""

from __future__ import annotations

import re
from collections.abc import Iterable
from mmap import mmap

from pydantic import ValidationError

from actcache.schemas.canonical import is_sha256, sha256
from actcache.schemas.errors import Corrupt
from actcache.schemas.plan import RECORDS, StoredObject
from actcache.schemas.record import first_problem

MAX_MANIFEST_BYTES = 4 << 30
MAX_LINE_BYTES = 4096
_LINE = re.compile(rb'\{"key":"([\x21\x23-\x5b\x5d-\x7e]+)"')
_KEY = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.:\-]*(/[A-Za-z0-9_.][A-Za-z0-9_.:\-]*)*")


def manifest_bytes(objects: Iterable[StoredObject]) -> bytes:
    """The manifest of some objects. Nothing in it depends on when or where it was built."""
    return b"".join(entry.to_bytes() + b"\n" for entry in sorted(objects, key=lambda entry: entry.key))


def manifest_key(manifest_sha256: str, records: str = RECORDS) -> str:
    """Key of a build's manifest, named by the hash of its bytes."""
    return f"{records}manifest-{manifest_sha256}.jsonl"


def parse_manifest(data: bytes, manifest_sha256: str, records: str = RECORDS) -> list[StoredObject]:
    """Read a manifest.

    Raises:
        Corrupt: the bytes do not hash to the name, or a line is not an entry with a harmless key.
    """
    where = manifest_key(manifest_sha256, records)
    if sha256(data) != manifest_sha256:
        raise Corrupt(f"{where}: its bytes hash to {sha256(data)}; copy it again from where the dataset came")
    entries = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            entry = StoredObject.model_validate_json(line)
        except ValidationError as error:
            raise Corrupt(f"{where}, line {number}: {first_problem(error)}") from None
        if not safe_key(entry.key):
            raise Corrupt(f"{where}, line {number}: key {entry.key!r} is not allowed")
        entries.append(entry)
    return entries


def find_object(manifest: bytes | mmap, key: str, where: str) -> StoredObject | None:
    """What a manifest says of one key, by binary search over its lines, or None if it does not name the key.

    Its bytes must have been checked against its name.

    Raises:
        Corrupt: a line that the search met is not an entry, or its hash is none.
    """
    low, high = 0, len(manifest)
    while low < high:
        middle = (low + high) // 2
        begin = manifest.rfind(b"\n", low, middle) + 1 or low
        end = manifest.find(b"\n", middle, middle + MAX_LINE_BYTES)
        line = manifest[begin : end if end >= 0 else min(len(manifest), middle + MAX_LINE_BYTES)]
        match = _LINE.match(line)
        if match is None:
            raise Corrupt(
                f"{where}: the line at byte {begin} is not an entry; copy it again from where the dataset came"
            )
        found = match[1].decode("ascii")
        if found == key:
            return _entry(line, f"{where}, the line at byte {begin}")
        if found < key:
            low = begin + len(line) + 1
        else:
            high = begin
    return None


def _entry(line: bytes, where: str) -> StoredObject:
    try:
        entry = StoredObject.model_validate_json(line)
    except ValidationError as error:
        raise Corrupt(f"{where}: {first_problem(error)}") from None
    if not is_sha256(entry.sha256) or entry.size < 0:
        raise Corrupt(f"{where}: neither a SHA-256 nor a size; copy it again from where the dataset came")
    return entry


def safe_key(key: str) -> bool:
    """Whether a key is relative, short, free of `..` and of odd characters."""
    return len(key) <= 1024 and _KEY.fullmatch(key) is not None and ".." not in key.split("/")
