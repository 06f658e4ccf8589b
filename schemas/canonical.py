"""One serialisation for every JSON record, so that equal content has equal bytes and equal hashes."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

_SHA256 = re.compile(r"[0-9a-f]{64}")


def canonical(document: Any) -> bytes:
    """The canonical JSON of a document: sorted keys, no spaces, UTF-8, no NaN.

    Raises:
        ValueError: the document holds a NaN or an infinity.
    """
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def is_sha256(text: object) -> bool:
    """Whether something is 64 hexadecimal digits, and so harmless in a key."""
    return isinstance(text, str) and _SHA256.fullmatch(text) is not None


def sha256(data: bytes | bytearray | memoryview) -> str:
    """The SHA-256 of some bytes, as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def digest(document: Any) -> str:
    """The SHA-256 of a document's canonical JSON."""
    return sha256(canonical(document))
