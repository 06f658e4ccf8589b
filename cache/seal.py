"""The seal: the act that makes a dataset complete and visible."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from actcache.cache.damage import quantised_roles
from actcache.cache.lease import LEASES
from actcache.cache.opening import SealedRoot, read_plan, read_root, read_tokens
from actcache.cache.publish import publish, publish_array, publish_document
from actcache.cache.statistics import Moments, unpack
from actcache.cache.store import PROBES, Store
from actcache.schemas.array import ArrayLayout, group_document, head_group
from actcache.schemas.canonical import digest, sha256
from actcache.schemas.errors import Corrupt, NotFound, NotSealed, SpecMismatch
from actcache.schemas.grid import Grid, whole_layout, width_dimension
from actcache.schemas.manifest import manifest_bytes, manifest_key
from actcache.schemas.part import parts_of, parts_with
from actcache.schemas.plan import FORMAT, RECORDS, TOKENS_KEY, StoredObject, TokensRecord, plan_key
from actcache.schemas.receipt import HEAD_RECEIPT, HeadReceipt, Receipt, receipt_key, statistics_key
from actcache.schemas.root import ROOT_KEY, ReplayResult
from actcache.schemas.root_document import root_bytes
from actcache.schemas.sites import site_meaning
from actcache.schemas.tokenizer import files_among

ENVIRONMENTS = f"{RECORDS}environments/"
PARTS_NAMED = 20
NOT_REPLAYED = ReplayResult(status="not replayed")


@dataclass(frozen=True)
class Sealed:
    """A sealed dataset, and whether this call or another build sealed it."""

    root: SealedRoot
    by_us: bool


def seal(store: Store, pool: Executor, replay: ReplayResult = NOT_REPLAYED, began: datetime | None = None) -> Sealed:
    """Check that every part is there, write statistics, manifest and root, and remove what only the build needed.

    Raises:
        NotFound: no build was begun here.
        NotSealed: parts are missing; the message says how many.
        Corrupt: a stored part is not what its receipt says.
        SpecMismatch: another spec was sealed here meanwhile.
    """
    plan = read_plan(store)
    if plan is None:
        raise NotFound(f"{store.location}: no build was begun here")
    if store.get_or_none(ROOT_KEY) is None:
        tokens = read_tokens(store)
        if tokens is None:
            raise NotSealed(f"{store.location}: the corpus is not tokenised yet; run 'actcache build' to go on")
        parts = collect(store, Grid.of(plan, tokens), tokens, pool)
        by_us = publish(store, ROOT_KEY, _root(seal_parts(store, parts, pool, replay, began), tokens)).created
    else:
        by_us = False
    root = read_root(store)
    if root.attributes.generations[0].key != plan.key:
        raise SpecMismatch(f"{store.location}: another build sealed a dataset of another spec here")
    remove_scaffolding(store)
    return Sealed(root, by_us)


def environments_of(records: str) -> str:
    """Folder where the builds of these records tell where they ran."""
    return f"{records}environments/"


def remove_scaffolding(store: Store, records: str = RECORDS) -> None:
    """Remove leases, probes, environments and dead staging: what only the build of these records needs."""
    for prefix in (LEASES, PROBES, ENVIRONMENTS, parts_of()):
        for key in store.list(f"{records}{prefix.removeprefix(RECORDS)}"):
            store.delete(key)
    store.clean_staging()


@dataclass(frozen=True)
class Parts:
    """Everything that a build stored. `tokens` is None for an added build, which found them stored."""

    grid: Grid
    tokens: TokensRecord | None
    receipts: list[Receipt]
    head: HeadReceipt | None
    moments: dict[str, Moments]
    records: list[StoredObject]


@dataclass(frozen=True)
class SealedParts:
    """What a build gives to the root: its generation, what its arrays are for, and all metadata by name."""

    grid: Grid
    generation: dict[str, Any]
    arrays: dict[str, dict[str, Any]]
    members: dict[str, dict[str, Any]]

    def roles(self, generation: int) -> dict[str, dict[str, Any]]:
        """What each array is for, and that it belongs to this generation."""
        return {name: {**role, "generation": generation} for name, role in self.arrays.items()}


def collect(store: Store, grid: Grid, tokens: TokensRecord | None, pool: Executor) -> Parts:
    """Read every record of a build and check it against a listing; `tokens` if the build stored them.

    Raises:
        NotSealed: parts are missing; the message says how many.
        Corrupt: a stored part is not what its receipt says.
    """
    blocks, has_head = range(grid.n_blocks), grid.plan.spec.head and tokens is not None
    command = "'actcache build'" if tokens else "the same 'actcache build --add-sites'"
    receipts_at = [receipt_key(block, grid.records) for block in blocks]
    listing = store.list()
    missing = [block for block in blocks if receipts_at[block] not in listing]
    if missing:
        raise NotSealed(
            f"{store.location}: {len(missing)} of {grid.n_blocks} blocks are missing (first: block {missing[0]}); "
            f"run {command} to go on{_missing_parts(listing, grid, missing)}"
        )
    keys = [plan_key(grid.records), *((TOKENS_KEY,) if tokens else ()), *receipts_at]
    if has_head:
        if HEAD_RECEIPT not in listing:
            raise NotSealed(f"{store.location}: the head is not stored yet; run 'actcache build' to go on")
        keys.append(HEAD_RECEIPT)
    contents = dict(zip(keys, pool.map(lambda key: bytes(store.get(key)), keys), strict=True))
    records = [StoredObject(key=key, size=len(data), sha256=sha256(data)) for key, data in contents.items()]
    receipts = [Receipt.from_bytes(contents[key], str(store.location.child(key))) for key in receipts_at]
    head = None
    if has_head:
        head = HeadReceipt.from_bytes(contents[HEAD_RECEIPT], str(store.location.child(HEAD_RECEIPT)))
    parts = Parts(grid, tokens, receipts, head, _merge(store, grid, receipts, pool), records)
    for entry in _stored(parts):
        _check(store, entry, listing, grid.records)
    return parts


def _missing_parts(listing: dict[str, int], grid: Grid, missing: list[int]) -> str:
    """Which parts the missing blocks are of, where the build is run in parts."""
    folder = parts_of(grid.records)
    names = [key.removeprefix(folder).removesuffix(".json") for key in listing if key.startswith(folder)]
    told = ""
    for of in sorted(int(name) for name in names if name.isdecimal()):
        parts = parts_with(set(missing), grid.n_blocks, of)
        more = f" and {len(parts) - PARTS_NAMED} more" if len(parts) > PARTS_NAMED else ""
        told += f", or --part {', '.join(str(part) for part in parts[:PARTS_NAMED])}{more}"
    return told


def _stored(parts: Parts) -> Iterator[StoredObject]:
    """Every object that a record names."""
    for record in (parts.tokens, *parts.receipts, parts.head):
        if record is not None:
            yield from record.objects


def _check(store: Store, entry: StoredObject, listing: dict[str, int], records: str) -> None:
    if listing.get(entry.key) != entry.size:
        found = f"has {listing[entry.key]:,} bytes" if entry.key in listing else "is missing"
        raise Corrupt(
            f"{store.location.child(entry.key)}: {found}, its receipt says {entry.size:,}; "
            f"remove that receipt under {records}receipts/ and run 'actcache build' again"
        )


def _merge(store: Store, grid: Grid, receipts: list[Receipt], pool: Executor) -> dict[str, Moments]:
    widths = grid.statistics()
    total = {site: Moments.empty(width) for site, width in widths.items()}
    keys = [statistics_key(receipt.block, grid.records) for receipt in receipts]
    for receipt, key, data in zip(receipts, keys, pool.map(store.get, keys), strict=True):
        stated = next((entry.sha256 for entry in receipt.objects if entry.key == key), None)
        if sha256(data) != stated:
            raise Corrupt(f"{store.location.child(key)}: is not what its receipt says")
        parts = unpack(data, list(widths.values()), receipt.stop - receipt.start)
        for site, part in zip(widths, parts, strict=True):
            total[site] = total[site].merge(part)
    return total


def _statistics_layout(site: str, moments: Moments, d_model: int) -> ArrayLayout:
    return whole_layout(
        f"statistics/{site}",
        (2, len(moments.mean)),
        "float64",
        ("moment", width_dimension(len(moments.mean), d_model)),
        count=moments.count,
        moments=["mean", "variance"],
    )


def head_layout(name: str, shape: tuple[int, ...], dtype: str) -> ArrayLayout:
    """The array of one part of the head."""
    return whole_layout(f"head/{name}", shape, dtype, tuple(f"{name}_{axis}" for axis in range(len(shape))))


def _members(parts: Parts) -> dict[str, dict[str, Any]]:
    """Metadata of every array and group that the build wrote below the root, by name."""
    layouts = [*parts.grid.block_arrays()]
    d_model = parts.grid.plan.model.d_model
    layouts += [_statistics_layout(site, moments, d_model) for site, moments in parts.moments.items()]
    members = {name.split("/")[0]: group_document() for name in parts.grid.outputs if "/" in name}
    if parts.tokens is not None:
        layouts += parts.grid.token_arrays().values()
        members |= {"norm": group_document(), "statistics": group_document()}
    if parts.head is not None:
        layouts += [head_layout(name, array.shape, array.dtype) for name, array in parts.head.arrays.items()]
        members["head"] = head_group(parts.head.operations)
    return members | {layout.name: layout.document() for layout in layouts}


def _objects(store: Store, parts: Parts, members: dict[str, dict[str, Any]], pool: Executor) -> dict[str, StoredObject]:
    """Everything for the manifest; writes the statistics and the groups' metadata."""
    objects = {entry.key: entry for entry in [*parts.records, *_stored(parts)]}
    for site, moments in parts.moments.items():
        rows = np.stack([moments.mean, moments.variance])
        layout = _statistics_layout(site, moments, parts.grid.plan.model.d_model)
        objects |= {entry.key: entry for entry in publish_array(store, layout, rows, pool)}
    for name, document in members.items():
        key = f"{name}/zarr.json"
        if key not in objects:
            objects[key] = publish_document(store, key, document)
    return objects


def seal_parts(store: Store, parts: Parts, pool: Executor, replay: ReplayResult, began: datetime | None) -> SealedParts:
    """Write statistics and manifest; what remains is the root.

    Raises:
        SpecMismatch: another build holds a name of this one's.
    """
    grid = parts.grid
    members = _members(parts)
    manifest = manifest_bytes(_objects(store, parts, members, pool).values())
    publish(store, manifest_key(sha256(manifest), grid.records), manifest)
    spec = grid.plan.spec
    generation = {
        "key": grid.plan.key,
        "manifest": sha256(manifest),
        "sites": list(grid.exact_sites),
        "only_quantised": [site for site in spec.sites if site not in grid.exact_sites],
        "provenance": _provenance(parts, _environments(store, grid.records), replay, began),
    }
    names = dict.fromkeys(grid.token_arrays() if parts.tokens else (), "token")
    names |= dict.fromkeys(grid.exact_sites, "site") | {grid.norm.name: "norm"}
    names |= dict.fromkeys(grid.outputs, "output")
    names |= {f"statistics/{site}": "statistics" for site in spec.sites}
    names |= {f"head/{name}": "head" for name in (parts.head.arrays if parts.head else ())}
    roles = {name: {"role": role} for name, role in names.items()} | quantised_roles(grid, parts.receipts)
    return SealedParts(grid, generation, roles, members)


def _provenance(
    parts: Parts, environments: list[dict[str, Any]], replay: ReplayResult, began: datetime | None
) -> dict[str, Any]:
    plan = parts.grid.plan
    return {
        "spec": plan.spec.document(),
        "labels": plan.labels.document(),
        "model": plan.model.document(),
        "site_meaning": {site: site_meaning(site) for site in plan.spec.sites},
        "software": software(),
        "environments": environments,
        "mixed_environments": len({digest(_hardware(environment)) for environment in environments}) > 1,
        "mixed_attempts": sorted({key for receipt in parts.receipts for key in receipt.mixed_attempts}),
        "replay": replay.document(),
        "began": began.isoformat(timespec="seconds") if began else None,
        "sealed": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _root(sealed: SealedParts, tokens: TokensRecord) -> bytes:
    """The first root: that of one generation."""
    plan = sealed.grid.plan
    attributes = {
        "format": FORMAT,
        "tokens_key": plan.tokens_key,
        "n_tokens": tokens.n_tokens,
        "n_sequences": tokens.n_sequences,
        "n_documents": tokens.n_documents,
        "d_model": plan.model.d_model,
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "generations": [sealed.generation],
        "arrays": sealed.roles(0),
        "tokenizer": [file.document() for file in files_among(tokens.objects)],
    }
    return root_bytes(attributes, sealed.members)


def _environments(store: Store, records: str) -> list[dict[str, Any]]:
    found = [store.get_or_none(key) for key in sorted(store.list(environments_of(records)))]
    return [json.loads(bytes(data)) for data in found if data is not None]  # another build's seal may just remove them


def _hardware(environment: dict[str, Any]) -> dict[str, Any]:
    """An environment but for the errors of its proof, which may differ in their last bits on one machine."""
    return {name: value for name, value in environment.items() if name != "proof"}


def software() -> dict[str, str | None]:
    """Version of actcache, and its git commit where it runs from a checkout of its own."""
    folder = Path(os.path.realpath(__file__)).parent.parent
    commit = None
    if (folder / ".git").exists():
        asked = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
        commit = asked.stdout.strip() or None
    return {"actcache": metadata.version("actcache"), "git_commit": commit}
