"""Datasets to read, made from the sealed one by writing its root anew: as wide as GPT-2, or as large as a billion tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from actcache.cache.encoder import encode_shard
from actcache.cache.store import Store, open_store
from actcache.schemas.array import ArrayLayout
from actcache.schemas.root import ROOT_KEY
from actcache.schemas.root_document import root_bytes
from actcache.schemas.sites import residual_stream
from benchmarks.material import SITES, THREADS, Material, default_cut, layout

STORED = SITES[0]
"""The site that a wide dataset has shards of; the folders of its other sites lead to them."""
GONE = ("head", "statistics")
LARGE_TOKENS = 1_000_000_000
LARGE_LAYERS = 32


def wide(material: Material, dtype: str, chunk_bytes: int | None = None) -> Path:
    """A dataset of 262,144 tokens, in memory, whose sites are as wide as GPT-2: six real sites side by side.

    Chunks are those of a build, or have about so many bytes.
    """
    folder = material.in_memory / f"wide-{dtype}-{chunk_bytes or 'default'}"
    if folder.is_dir():
        return folder
    width = material.widths[1]
    root = json.loads((material.sealed / ROOT_KEY).read_bytes())
    tokens = root["attributes"]["actcache"]["n_tokens"]
    chunk, shard = default_cut(width, dtype)
    rows = material.activations(width, dtype, tokens)
    if chunk_bytes is not None:
        chunk = max(1, chunk_bytes // rows[0].nbytes)
        shard = max(chunk, shard // chunk * chunk)
    array = layout(rows, chunk, shard, STORED)
    arrays = {site: layout(rows, chunk, shard, site) for site in SITES}
    shutil.copytree(material.sealed, folder, ignore=lambda _, names: [name for name in names if name in SITES])
    store = open_store(folder)
    with ThreadPoolExecutor(THREADS) as pool:
        for number in range(array.n_shards):
            low, high = array.shard_range(number)
            store.put_new(array.shard_key(number), encode_shard(array, rows[low:high], pool))
        rows = rows.astype("float32")
        measured = np.stack([rows.mean(0, np.float64), rows.var(0, np.float64)])
        for site in SITES:
            statistics = _statistics(site, width)
            store.put_new(statistics.shard_key(0), encode_shard(statistics, measured, pool))
    for site, each in arrays.items():
        if site != STORED:
            (folder / site).mkdir()
            (folder / site / "c").symlink_to(folder / STORED / "c")
        store.put_new(each.metadata_key, json.dumps(each.document()).encode())
    _write_root(folder, root, tokens, width, arrays)
    return folder


def large(material: Material, width: int) -> Path:
    """The root of a dataset of a billion tokens and 33 sites, bfloat16. It has no shards."""
    folder = material.folder / f"large-{width}"
    if folder.is_dir():
        return folder
    root = json.loads((material.sealed / ROOT_KEY).read_bytes())
    chunk, shard = default_cut(width, "bfloat16")
    arrays = {
        site: ArrayLayout(site, (LARGE_TOKENS, width), "bfloat16", shard, chunk, ("token", "d_model"))
        for site in residual_stream(LARGE_LAYERS)
    }
    folder.mkdir()
    _write_root(folder, root, LARGE_TOKENS, width, arrays)
    return folder


def copy(folder: Path, store: Store, keys: list[str]) -> int:
    """Copy objects of a dataset in a folder to a store. Returns the bytes of the shards among them."""
    local, size = open_store(folder), 0
    for key in keys:
        data = bytes(local.get(key))
        store.put_new(key, data)
        size += 0 if key.endswith(".json") else len(data)
    return size


def stored_bytes(folder: Path, array: ArrayLayout) -> int:
    """Bytes of all shards of an array of a dataset in a folder."""
    return sum((folder / key).stat().st_size for key in array.shard_keys())


def layout_of(folder: Path, name: str) -> ArrayLayout:
    """The layout of an array of a dataset in a folder."""
    return ArrayLayout.parse(
        name, json.loads((folder / ROOT_KEY).read_bytes())["consolidated_metadata"]["metadata"][name]
    )


def _write_root(folder: Path, root: dict[str, Any], tokens: int, width: int, sites: Mapping[str, ArrayLayout]) -> None:
    """Write a root that has other sites, so many tokens and no head."""
    attributes = root["attributes"]["actcache"]
    members = root["consolidated_metadata"]["metadata"]
    (generation,) = attributes["generations"]
    old = [ArrayLayout.parse(name, members[name]) for name in attributes["arrays"] if name not in generation["sites"]]
    kept = [
        _resized(each, attributes["n_tokens"], tokens, len(sites))
        for each in old
        if each.name.split("/")[0] not in GONE
    ]
    statistics = [_statistics(site, width) for site in sites]
    arrays = {each.name: each for each in (*kept, *statistics, *sites.values())}
    roles = attributes["arrays"]
    attributes["arrays"] = {name: roles.get(name, {"role": _role(name), "generation": 0}) for name in arrays}
    attributes |= {"n_tokens": tokens, "d_model": width}
    del attributes["digest"]
    generation["sites"] = list(sites)
    provenance = generation["provenance"]
    provenance["site_meaning"] = dict.fromkeys(sites, "residual stream")
    provenance["model"] |= {"d_model": width, "n_layers": max(len(sites) - 1, provenance["model"]["n_layers"])}
    (folder / ROOT_KEY).unlink(missing_ok=True)
    (folder / ROOT_KEY).write_bytes(root_bytes(attributes, {name: each.document() for name, each in arrays.items()}))


def _statistics(site: str, width: int) -> ArrayLayout:
    """The layout of the mean and variance of a site."""
    return ArrayLayout(f"statistics/{site}", (2, width), "float64", 2, 2, ("statistic", "d_model"))


def _role(name: str) -> str:
    return "statistics" if name.startswith("statistics/") else "site"


def _resized(array: ArrayLayout, old_tokens: int, tokens: int, n_sites: int) -> ArrayLayout:
    rows = tokens if array.rows == old_tokens else array.rows
    columns = (n_sites,) if array.name.startswith("norm/") else array.row_shape
    return replace(array, shape=(rows, *columns))
