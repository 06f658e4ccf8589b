"""What a dataset must be read as, for ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import actcache as ac
from actcache.schemas.canonical import sha256


def describe(ds: ac.Dataset) -> dict[str, Any]:
    """Keys, manifests, sizes, of every array its shape, its dtype and the hash of its decoded bytes, and the tokenizer's hashes."""
    arrays = {}
    for path in sorted(Path(ds.url).rglob("c")):
        name = path.parent.relative_to(ds.url).as_posix()
        rows = ds.rows(name, 0, ds.zarr[name].shape[0])
        arrays[name] = [list(rows.shape), rows.dtype.name, sha256(rows.tobytes())]
    stored = ds.format != "1.0"
    return {
        "key": ds.key,
        "manifest": ds.manifest,
        "generations": [[generation.key, generation.manifest] for generation in ds.generations],
        "sites": ds.sites,
        "n_tokens": ds.n_tokens,
        "n_sequences": ds.n_sequences,
        "n_documents": ds.n_documents,
        "arrays": arrays,
        **({"tokenizer": {name: sha256(data) for name, data in ds.tokenizer.files.items()}} if stored else {}),
    }
