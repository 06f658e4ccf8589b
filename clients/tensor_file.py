"""Arrays and facts in one safetensors file: what lenses and probes are kept in. Nothing of such a file is executed.

The file's metadata has one entry, `actcache`: JSON of `version` and `facts`, of which `kind` says what the file holds. Other
programs read the arrays with any safetensors library.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from actcache.schemas.errors import InvalidInput, NotFound, StoreError, Unsupported

KIND = "kind"
ENTRY = "actcache"
VERSION = 1
DTYPES = {"BOOL": "bool", "U8": "uint8", "I32": "int32", "I64": "int64", "F32": "float32", "F64": "float64"}
MOST_HEADER = 16 << 20
"""Bytes of a header that is read; a million times what a lens needs is not one of ours."""


def write(path: str | Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> Path:
    """Write arrays by name and facts, of which `kind` says what they are, as one file: whole, or not at all. Returns its path.

    The same arrays, and facts in the same order, make the same bytes. A file that is there is replaced.

    Raises:
        InvalidInput: facts without a kind, or that JSON does not take; an array of another dtype than those of `DTYPES`.
        StoreError: the file cannot be written.
    """
    path = Path(path)
    if not isinstance(facts.get(KIND), str):
        raise InvalidInput(f"{path}: facts[{KIND!r}] says what the file holds, such as 'lens'")
    try:
        header = json.dumps({"version": VERSION, "facts": dict(facts)}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"{path}: the facts are not plain JSON: {error}") from None
    if len(header) > MOST_HEADER // 2:
        raise InvalidInput(f"{path}: facts of {len(header):,} bytes; put what is large into an array")
    plain = {name: _plain(path, name, array) for name, array in arrays.items()}
    staged = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        try:
            staged.touch()
            usual = staged.stat().st_mode  # safetensors may make a file that nobody else can read
            save_file(plain, staged, {ENTRY: header})
            staged.chmod(usual)
            with staged.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(staged, path)
        finally:
            staged.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path}: cannot be written: {error}") from None
    return path


def read(path: str | Path, kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and facts of a file that `write` wrote. The header alone is read before it is known that the file is of that kind.

    Raises:
        NotFound: there is no such file.
        InvalidInput: it is no file of that kind.
        Unsupported: a later version wrote it.
        StoreError: it cannot be read.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise NotFound(f"{path}: no such file")
        if not path.is_file():
            raise InvalidInput(f"{path}: no file")
        _bounded(path, kind)
        with safe_open(path, "numpy") as file:
            facts = _facts(path, file.metadata() or {}, kind)
            return {name: _array(path, name, file) for name in file.keys()}, facts  # noqa: SIM118  # it is no mapping
    except SafetensorError as error:
        raise InvalidInput(f"{path}: no {kind}: not a whole safetensors file ({error})") from None
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path}: cannot be read: {error}") from None


def _bounded(path: Path, kind: str) -> None:
    """Refuse a header that is too long, before anything reads it."""
    with path.open("rb") as file:
        first = file.read(8)
    size = path.stat().st_size
    if len(first) < 8 or struct.unpack("<Q", first)[0] > min(MOST_HEADER, size - 8):
        raise InvalidInput(f"{path}: no {kind}: not a safetensors file")


def _facts(path: Path, metadata: Mapping[str, str], kind: str) -> dict[str, Any]:
    if ENTRY not in metadata:
        raise InvalidInput(f"{path}: no {kind}: a safetensors file that actcache did not write")
    try:
        found = json.loads(metadata[ENTRY], parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise InvalidInput(f"{path}: no {kind}: its facts are not valid JSON") from None
    version, facts = (found.get("version"), found.get("facts")) if isinstance(found, dict) else (None, None)
    if isinstance(version, int) and version > VERSION:
        raise Unsupported(f"{path}: of version {version}, and this reads {VERSION}; upgrade actcache")
    if version != VERSION or not isinstance(facts, dict):
        raise InvalidInput(f"{path}: no {kind}: a safetensors file that actcache did not write")
    if facts.get(KIND) != kind:
        raise InvalidInput(f"{path}: no {kind}, but {str(facts.get(KIND))[:40]!r}")
    return facts


def _no_number(name: str) -> float:
    raise ValueError(name)


def _plain(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    """The array as safetensors takes it, in C order."""
    array = np.asarray(array)
    if array.dtype.newbyteorder("=").name not in DTYPES.values():
        raise InvalidInput(f"{path}: {name!r} is {array.dtype}; there is {', '.join(DTYPES.values())}")
    return np.asarray(array, array.dtype.newbyteorder("="), order="C")


def _array(path: Path, name: str, file: Any) -> np.ndarray:
    stored = file.get_slice(name).get_dtype()
    if stored not in DTYPES:
        raise InvalidInput(f"{path}: {name!r} is stored as {str(stored)[:20]}; there is {', '.join(DTYPES)}")
    return np.asarray(file.get_tensor(name))
