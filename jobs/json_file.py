"""JSON objects in files of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from actcache.schemas.errors import InvalidInput


def json_object(path: Path) -> dict[str, Any]:
    """The object that a file holds.

    Raises:
        InvalidInput: it cannot be read, or holds something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInput(f"{path}: {error}") from None
    if not isinstance(document, dict):
        raise InvalidInput(f"{path}: not a JSON object")
    return document
