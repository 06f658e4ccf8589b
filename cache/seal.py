"""The seal: the act that makes a dataset complete and visible."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from actcache.cache.damage import quantised_roles
from actcache.cache.lease import LEASES
from actcache.cache.opening import SealedRoot, read_plan, read_root
from actcache.cache.publish import publish, publish_array, publish_document
from actcache.cache.statistics import Moments, unpack
from actcache.cache.store import PROBES, Store
from actcache.schemas.array import ArrayLayout, group_document, head_group
from actcache.schemas.canonical import digest, sha256
from actcache.schemas.errors import Corrupt, NotFound, NotSealed, SpecMismatch
from actcache.schemas.grid import NORM, Grid, whole_layout, width_dimension
from actcache.schemas.manifest import manifest_bytes, manifest_key
from actcache.schemas.plan import FORMAT, PLAN_KEY, TOKENS_KEY, Plan, StoredObject, TokensRecord
from actcache.schemas.receipt import HEAD_RECEIPT, HeadReceipt, Receipt, receipt_key, statistics_key
from actcache.schemas.root import ROOT_KEY, ReplayResult
from actcache.schemas.root_document import root_bytes
from actcache.schemas.sites import site_meaning

ENVIRONMENTS = ".actcache/environments/"
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
        parts = _collect(store, plan, pool)
        members = _members(parts)
        objects = _objects(store, parts, members, pool)
        manifest = manifest_bytes(objects)
        name = sha256(manifest)
        publish(store, manifest_key(name), manifest)
        data = _root(parts, members, name, _environments(store), replay, began)
        by_us = publish(store, ROOT_KEY, data).created
    else:
        by_us = False
    root = read_root(store)
    if root.attributes.generations[0].key != plan.key:
        raise SpecMismatch(f"{store.location}: another build sealed a dataset of another spec here")
    remove_scaffolding(store)
    return Sealed(root, by_us)


def remove_scaffolding(store: Store) -> None:
    """Remove leases, probes, environments and dead staging: what only a build needs."""
    for prefix in (LEASES, PROBES, ENVIRONMENTS):
        for key in store.list(prefix):
            store.delete(key)
    store.clean_staging()


@dataclass(frozen=True)
class _Parts:
    plan: Plan
    tokens: TokensRecord
    grid: Grid
    receipts: list[Receipt]
    head: HeadReceipt | None
    moments: dict[str, Moments]
    records: list[StoredObject]


def _collect(store: Store, plan: Plan, pool: Executor) -> _Parts:
    """Read every record and check it against a listing."""
    data = store.get_or_none(TOKENS_KEY)
    if data is None:
        raise NotSealed(f"{store.location}: the corpus is not tokenised yet; run 'actcache build' to go on")
    tokens = TokensRecord.from_bytes(bytes(data), str(store.location.child(TOKENS_KEY)))
    grid = Grid.of(plan, tokens)
    listing = store.list()
    missing = [block for block in range(grid.n_blocks) if receipt_key(block) not in listing]
    if missing:
        raise NotSealed(
            f"{store.location}: {len(missing)} of {grid.n_blocks} blocks are missing (first: block {missing[0]}); "
            "run 'actcache build' to go on"
        )
    keys = [PLAN_KEY, TOKENS_KEY, *(receipt_key(block) for block in range(grid.n_blocks))]
    if plan.spec.head:
        if HEAD_RECEIPT not in listing:
            raise NotSealed(f"{store.location}: the head is not stored yet; run 'actcache build' to go on")
        keys.append(HEAD_RECEIPT)
    contents = dict(zip(keys, pool.map(lambda key: bytes(store.get(key)), keys), strict=True))
    records = [StoredObject(key=key, size=len(data), sha256=sha256(data)) for key, data in contents.items()]
    receipts = [
        Receipt.from_bytes(contents[receipt_key(block)], str(store.location.child(receipt_key(block))))
        for block in range(grid.n_blocks)
    ]
    head = None
    if plan.spec.head:
        head = HeadReceipt.from_bytes(contents[HEAD_RECEIPT], str(store.location.child(HEAD_RECEIPT)))
    for entry in [*tokens.objects, *(o for r in receipts for o in r.objects), *(head.objects if head else ())]:
        _check(store, entry, listing)
    return _Parts(plan, tokens, grid, receipts, head, _merge(store, grid, receipts, pool), records)


def _check(store: Store, entry: StoredObject, listing: dict[str, int]) -> None:
    if listing.get(entry.key) != entry.size:
        found = f"has {listing[entry.key]:,} bytes" if entry.key in listing else "is missing"
        raise Corrupt(
            f"{store.location.child(entry.key)}: {found}, its receipt says {entry.size:,}; "
            "remove that receipt under .actcache/receipts/ and run 'actcache build' again"
        )


def _merge(store: Store, grid: Grid, receipts: list[Receipt], pool: Executor) -> dict[str, Moments]:
    widths = grid.statistics()
    total = {site: Moments.empty(width) for site, width in widths.items()}
    keys = [statistics_key(receipt.block) for receipt in receipts]
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


def _members(parts: _Parts) -> dict[str, dict[str, Any]]:
    """Metadata of every array and group below the root, by name."""
    layouts = [*parts.grid.token_arrays().values(), *parts.grid.block_arrays()]
    d_model = parts.plan.model.d_model
    layouts += [_statistics_layout(site, moments, d_model) for site, moments in parts.moments.items()]
    members = {"norm": group_document(), "statistics": group_document()}
    members |= {name.split("/")[0]: group_document() for name in parts.grid.outputs if "/" in name}
    if parts.head is not None:
        layouts += [head_layout(name, array.shape, array.dtype) for name, array in parts.head.arrays.items()]
        members["head"] = head_group(parts.head.operations)
    return members | {layout.name: layout.document() for layout in layouts}


def _objects(store: Store, parts: _Parts, members: dict[str, dict[str, Any]], pool: Executor) -> Iterable[StoredObject]:
    """Everything for the manifest; writes the statistics and the groups' metadata."""
    objects = {entry.key: entry for entry in [*parts.records, *parts.tokens.objects]}
    for receipt in parts.receipts:
        objects |= {entry.key: entry for entry in receipt.objects}
    objects |= {entry.key: entry for entry in (parts.head.objects if parts.head else ())}
    for site, moments in parts.moments.items():
        rows = np.stack([moments.mean, moments.variance])
        layout = _statistics_layout(site, moments, parts.plan.model.d_model)
        objects |= {entry.key: entry for entry in publish_array(store, layout, rows, pool)}
    for name, document in members.items():
        key = f"{name}/zarr.json"
        if key not in objects:
            objects[key] = publish_document(store, key, document)
    return objects.values()


def _root(
    parts: _Parts,
    members: dict[str, dict[str, Any]],
    manifest: str,
    environments: list[dict[str, Any]],
    replay: ReplayResult,
    began: datetime | None,
) -> bytes:
    plan, tokens = parts.plan, parts.tokens
    provenance = {
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
    roles: dict[str, dict[str, Any]] = {name: {"role": "token"} for name in parts.grid.token_arrays()}
    roles |= {site: {"role": "site", "generation": 0} for site in parts.grid.exact_sites}
    roles |= quantised_roles(parts.grid, parts.receipts)
    roles[NORM] = {"role": "norm", "generation": 0}
    roles |= {name: {"role": "output", "generation": 0} for name in parts.grid.outputs}
    roles |= {f"statistics/{site}": {"role": "statistics", "generation": 0} for site in plan.spec.sites}
    roles |= {f"head/{name}": {"role": "head"} for name in (parts.head.arrays if parts.head else ())}
    attributes = {
        "format": FORMAT,
        "tokens_key": plan.tokens_key,
        "n_tokens": tokens.n_tokens,
        "n_sequences": tokens.n_sequences,
        "n_documents": tokens.n_documents,
        "d_model": plan.model.d_model,
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "generations": [
            {
                "key": plan.key,
                "manifest": manifest,
                "sites": list(parts.grid.exact_sites),
                "only_quantised": [site for site in plan.spec.sites if site not in parts.grid.exact_sites],
                "provenance": provenance,
            }
        ],
        "arrays": roles,
    }
    return root_bytes(attributes, members)


def _environments(store: Store) -> list[dict[str, Any]]:
    found = [store.get_or_none(key) for key in sorted(store.list(ENVIRONMENTS))]
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
