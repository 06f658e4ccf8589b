"""Checking a sealed dataset against its manifests."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial

from actcache.cache.claims import open_claims
from actcache.cache.opening import SealedRoot, read_root
from actcache.cache.roots import goes_on, newest_root
from actcache.cache.store import Store
from actcache.schemas.canonical import canonical, sha256
from actcache.schemas.errors import Corrupt, NotFound, Unsupported
from actcache.schemas.manifest import MAX_MANIFEST_BYTES, manifest_key, parse_manifest
from actcache.schemas.plan import PLAN_KEY, StoredObject
from actcache.schemas.root import MAX_ROOT_BYTES, ROOT_KEY, ROOTS, root_key
from actcache.schemas.root_document import parse_root

_SCAFFOLDING = re.compile(r"\.actcache/(staging|([0-9a-f]{64}/)?(leases|probes|environments))/")


@dataclass(frozen=True)
class Problem:
    """One object that is not as it should be."""

    key: str
    what: str


@dataclass(frozen=True)
class Unfinished:
    """Work on a dataset that is not sealed: what, and the folders where all that it stored lies."""

    what: str
    folders: tuple[str, ...] = ()


@dataclass
class Report:
    """What verifying found.

    `unexpected` objects belong to no manifest, `unfinished` is what added builds left half done; both are told, and are
    no damage.
    """

    url: str
    full: bool
    objects: int = 0
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    unfinished: list[Unfinished] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every object is as its manifest says."""
        return not self.problems


def verify(
    store: Store, pool: Executor, *, full: bool = False, progress: Callable[[int, int], None] | None = None
) -> Report:
    """Check a sealed dataset: keys and sizes, and with `full` the SHA-256 of every object.

    `progress` is called with the bytes checked so far and the bytes to check.

    Raises:
        NotFound, NotSealed, Unsupported: there is no sealed dataset of ours.
        StoreError: the store failed.
    """
    report = Report(str(store.location), full)
    try:
        root = read_root(store)
    except (Corrupt, Unsupported) as error:
        if isinstance(error, Unsupported) and store.get_or_none(PLAN_KEY) is None:
            raise  # never was a dataset of ours
        report.problems.append(Problem(ROOT_KEY, str(error)))
        return report
    report.objects, report.bytes = 1, len(root.data)
    expected: dict[str, StoredObject] = {}
    names = {ROOT_KEY}
    for number, generation in enumerate(root.attributes.generations):
        records = root.attributes.records(number)
        key = manifest_key(generation.manifest, records)
        names.add(key)
        try:
            data = bytes(store.get(key, MAX_MANIFEST_BYTES))
            entries = parse_manifest(data, generation.manifest, records)
        except NotFound:
            report.problems.append(Problem(key, "missing"))
            continue
        except Corrupt as error:
            report.problems.append(Problem(key, str(error)))
            continue
        report.objects += 1
        report.bytes += len(data)
        expected |= {entry.key: entry for entry in entries}
    if not report.problems:
        report.problems += _incomplete(root, expected)
    whole = all(problem.key not in names for problem in report.problems)
    _check_roots(store, root, report)
    sizes = _sizes(store, expected, pool)
    names |= {root_key(number) for number in range(2, len(root.attributes.generations) + 1)}
    if whole:
        others = set(sizes) - set(expected) - names
        report.unfinished = _unfinished(store, root, others)
        folders = tuple(folder for work in report.unfinished for folder in work.folders)
        others = {key for key in others if not key.startswith(folders)}
        if scaffolding := {key: match[0] for key in others if (match := _SCAFFOLDING.match(key))}:
            what = "scaffolding of a build that runs, or that was stopped and removes it when it runs again"
            report.unfinished.append(Unfinished(what, tuple(sorted(set(scaffolding.values())))))
        report.unexpected = sorted(others - set(scaffolding))
    _check_objects(store, pool, expected, sizes, report, progress)
    report.problems.sort(key=lambda problem: problem.key)
    return report


def _incomplete(root: SealedRoot, expected: dict[str, StoredObject]) -> Iterable[Problem]:
    """Keys that follow from the root and that no manifest names, and metadata that differs from the root's copy."""
    members = _consolidated(root)
    for name, layout in root.layouts.items():
        for key in layout.shard_keys():
            if key not in expected:
                yield Problem(key, "not in the manifest")
        entry = expected.get(layout.metadata_key)
        if entry is None:
            yield Problem(layout.metadata_key, "not in the manifest")
        elif entry.sha256 != sha256(canonical(members[name])):
            yield Problem(layout.metadata_key, "differs from the copy in the root")
    for file in root.attributes.tokenizer:
        if expected.get(file.key) != file.stored():
            yield Problem(file.key, "is not in the manifest as the root names it")


def _check_roots(store: Store, root: SealedRoot, report: Report) -> None:
    """Every root after the first was claimed under its number: the last is the one in place, each goes on from the one before."""
    newer = root.attributes
    for number in range(len(root.attributes.generations), 1, -1):
        key = root_key(number)
        try:
            data = bytes(store.get(key, MAX_ROOT_BYTES))
            older = parse_root(data, key).attributes
        except NotFound:
            report.problems.append(Problem(key, "missing"))
            return
        except (Corrupt, Unsupported) as error:
            report.problems.append(Problem(key, str(error)))
            return
        report.objects += 1
        report.bytes += len(data)
        newest = number == len(root.attributes.generations)
        if not (data == root.data if newest else goes_on(older, newer)):
            report.problems.append(Problem(key, f"is not the root that {ROOT_KEY} goes back to"))
            return
        newer = older


def _unfinished(store: Store, root: SealedRoot, others: set[str]) -> list[Unfinished]:
    """What added builds began here, as far as the objects that no manifest names tell."""
    found, sealed = [], set()
    if root_key(len(root.attributes.generations) + 1) in others:
        try:
            sealed = {generation.key for generation in newest_root(store).attributes.generations}
            found.append(
                Unfinished(f"{ROOT_KEY} is older than what {ROOTS} holds; 'actcache seal' renews it", (ROOTS,))
            )
        except (Corrupt, Unsupported) as error:
            found.append(Unfinished(str(error)))
    try:
        claims = open_claims(store, root) if others else []
    except (Corrupt, Unsupported) as error:
        return [*found, Unfinished(str(error))]
    for held in claims:
        state = "sealed" if held.key in sealed else "not finished; run its 'actcache build --add-sites' again"
        shown = f"{held.sites[0]} …" if len(held.sites) > 1 else " ".join(held.sites)
        what = f"added build {held.key[:12]}… ({len(held.sites)} sites: {shown}) is {state}"
        found.append(Unfinished(what, held.folders))
    return found


def _consolidated(root: SealedRoot) -> dict[str, object]:
    members: dict[str, object] = json.loads(root.data)["consolidated_metadata"]["metadata"]
    return members


def _sizes(store: Store, expected: dict[str, StoredObject], pool: Executor) -> dict[str, int]:
    try:
        return store.list()
    except Unsupported:
        return {key: size for key, size in pool.map(partial(_size, store), expected) if size is not None}


def _size(store: Store, key: str) -> tuple[str, int | None]:
    try:
        return key, store.size(key)
    except NotFound:
        return key, None


def _check_objects(
    store: Store,
    pool: Executor,
    expected: dict[str, StoredObject],
    sizes: dict[str, int],
    report: Report,
    progress: Callable[[int, int], None] | None,
) -> None:
    total = sum(entry.size for entry in expected.values())
    done = 0
    check = partial(_check, store, sizes, report.full)
    for entry, problem in zip(expected.values(), pool.map(check, expected.values()), strict=True):
        report.objects += 1
        done += entry.size
        if problem is not None:
            report.problems.append(problem)
        if progress is not None:
            progress(done, total)
    report.bytes += done


def _check(store: Store, sizes: dict[str, int], full: bool, entry: StoredObject) -> Problem | None:
    if entry.key not in sizes:
        return Problem(entry.key, "missing")
    if sizes[entry.key] != entry.size:
        return Problem(entry.key, f"has {sizes[entry.key]:,} bytes, not {entry.size:,}")
    if full:
        try:
            found = sha256(store.get(entry.key))
        except NotFound:
            return Problem(entry.key, "missing")
        if found != entry.sha256:
            return Problem(entry.key, f"sha256 is {found}, not {entry.sha256}")
    return None
