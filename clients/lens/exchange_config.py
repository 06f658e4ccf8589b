"""What `config.json` of the package tuned-lens tells of a lens."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from actcache.schemas.errors import InvalidInput, Unsupported

LENS_TYPE = "linear_tuned_lens"
MOST_CONFIG = 1 << 16
"""Bytes of a configuration that is read; the package's own has 300."""
_TEXT, _NUMBER, _NOTHING = (str,), (int,), (type(None),)
_TYPES: dict[str, tuple[type, ...]] = {
    "base_model_name_or_path": _TEXT,
    "d_model": _NUMBER,
    "num_hidden_layers": _NUMBER,
    "bias": (bool,),
    "base_model_revision": _TEXT + _NOTHING,
    "unembed_hash": _TEXT + _NOTHING,
    "lens_type": _TEXT,
}
_DEFAULTS = {"bias": True, "base_model_revision": None, "unembed_hash": None, "lens_type": LENS_TYPE}


def unembed_hash(weight: np.ndarray) -> str:
    """The package's hash of an unembedding (vocabulary, d): SHA-256 of its text in float32 with one decimal, as numpy abridges it.

    Of more than 1000 numbers, that text has the first and last three rows and columns.
    """
    with np.printoptions(
        precision=8,
        threshold=1000,
        edgeitems=3,
        linewidth=75,
        suppress=False,
        nanstr="nan",
        infstr="inf",
        formatter=None,
        sign="-",
        floatmode="maxprec",
        legacy=False,
    ):
        text = np.array_str(np.asarray(weight, np.float32), precision=1)
    return hashlib.sha256(text.encode()).hexdigest()


def read_config(path: Path) -> dict[str, Any]:
    """The fields of a configuration, with the package's defaults. Fields that it does not know are passed over, as the package does.

    Raises:
        InvalidInput: it is too long, or no such object.
        Unsupported: it is of a lens of another type.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(MOST_CONFIG + 1)
    if len(content) > MOST_CONFIG:
        raise InvalidInput(f"{path}: over {MOST_CONFIG:,} bytes, which the configuration of a lens never has")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise InvalidInput(f"{path}: no valid JSON") from None
    if not isinstance(found, dict):
        raise InvalidInput(f"{path}: no JSON object")
    found = {**_DEFAULTS, **found}
    for name, types in _TYPES.items():
        if name not in found:
            raise InvalidInput(f"{path}: lacks {name}")
        if type(found[name]) not in types or (types is _NUMBER and found[name] < 1):
            raise InvalidInput(f"{path}: {name} is {json.dumps(found[name])[:40]}")
    if found["lens_type"] != LENS_TYPE or not found["bias"]:
        raise Unsupported(
            f"{path}: lens_type {found['lens_type'][:40]!r}, bias {found['bias']}; there is {LENS_TYPE} with bias"
        )
    return found
