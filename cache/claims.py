"""What added builds lay claim to: each has the `norm/<n>/zarr.json` that names its sites and outputs, and its key.

That one object is put create-only before anything else, under the first number that is free, by whoever has seen every
claim before it. So all of a build's names are claimed at once or not at all, and no two builds hold the same one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from actcache.cache.opening import SealedRoot, read_plan
from actcache.cache.publish import publish
from actcache.cache.roots import newest_root
from actcache.cache.store import Store
from actcache.schemas.array import ArrayLayout, check_name
from actcache.schemas.canonical import canonical, is_sha256
from actcache.schemas.errors import Corrupt, SpecMismatch, Unsupported
from actcache.schemas.grid import NORMS, Grid
from actcache.schemas.plan import Plan, TokensRecord, added_records, plan_key
from actcache.schemas.root import MAX_ROOT_BYTES
from actcache.schemas.spec import difference


@dataclass(frozen=True)
class Claim:
    """An added build that is not sealed: the number of its array of norms, its key, the arrays that it holds."""

    number: int
    key: str
    sites: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def names(self) -> set[str]:
        """Every array that no other build may store."""
        return {*self.sites, *self.outputs}

    @property
    def folders(self) -> tuple[str, ...]:
        """Where all that it stores lies, and nothing else does."""
        groups = [name.split("/")[0] for name in self.outputs]  # of `topk/logit` the whole of `topk`
        arrays = [*self.sites, *groups, *(f"statistics/{site}" for site in self.sites)]
        return (f"{NORMS}{self.number}/", added_records(self.key), *(f"{name}/" for name in arrays))


def open_claims(store: Store, root: SealedRoot) -> list[Claim]:
    """The added builds that were begun and are not in this root.

    Raises:
        Corrupt: a claim is damaged.
        Unsupported: the store has no listings (HTTP).
    """
    return _look(store, root)[0]


def begin(store: Store, plan: Plan, tokens: TokensRecord) -> Grid | None:
    """Claim every name of an added build and put its plan, or adopt the plan of an earlier run of it.

    Returns None where one of the names was sealed meanwhile: what is missing is to be asked anew.

    Raises:
        SpecMismatch: another added build, which is not finished, holds one of the names.
    """
    wanted = Grid.of(plan, tokens)
    names = {*plan.spec.sites, *wanted.quantised, *wanted.outputs}
    while True:
        root = newest_root(store)
        if names & set(root.attributes.arrays):
            return None
        claims, free = _look(store, root)
        held, theirs = _holder(store, plan, names, claims)
        if held is None:
            grid = Grid.of(plan, tokens, free)
            if publish(store, grid.norm.metadata_key, canonical(grid.norm.document())).other is None:
                return Grid.of(_put(store, plan), tokens, free)
        elif held.key == plan.key:
            return Grid.of(theirs or _put(store, plan), tokens, held.number)
        elif theirs is not None and theirs.spec.key() == plan.spec.key():
            return Grid.of(theirs, tokens, held.number)  # begun by another version, which hashed its spec otherwise
        elif held.key not in [generation.key for generation in newest_root(store).attributes.generations]:
            raise SpecMismatch(_held(store, held, min(names & held.names), plan, theirs))


def read_claim(store: Store, held: Claim) -> Plan | None:
    """The plan of an added build, or None where it was not put yet.

    Raises:
        Corrupt: it is not that build's plan.
    """
    records = added_records(held.key)
    plan = read_plan(store, records)
    if plan is not None and plan.key != held.key:
        raise Corrupt(f"{store.location.child(records)}: holds the plan of another build; remove this folder")
    return plan


def _holder(store: Store, plan: Plan, names: set[str], claims: list[Claim]) -> tuple[Claim | None, Plan | None]:
    """The claim that is this plan's own or holds one of its names, and the plan of it."""
    own = [held for held in claims if held.key == plan.key]
    for held in own or claims:
        if own or names & held.names:
            return held, read_claim(store, held)
    return None, None


def _put(store: Store, plan: Plan) -> Plan:
    """Put a plan, or adopt the one of other labels that is there."""
    key = plan_key(added_records(plan.key))
    published = publish(store, key, plan.to_bytes())
    if published.other is None:
        return plan
    return Plan.from_bytes(bytes(published.other), str(store.location.child(key)))


def _look(store: Store, root: SealedRoot) -> tuple[list[Claim], int]:
    """Every claim that is not in the root, and the first number that nobody has used."""
    folders, _ = store.children(NORMS)
    listed = {int(name) for name in folders if name.isdecimal() and len(name) < 10}
    free = 1
    while f"{NORMS}{free}" in root.layouts or _is_used(store, free):
        free += 1
    numbers = sorted({number for number in listed if number > free} | set(range(1, free)))
    found = (_read(store, number) for number in numbers if f"{NORMS}{number}" not in root.layouts)
    return [held for held in found if held is not None], free


def _is_used(store: Store, number: int) -> bool:
    """Whether there is a claim of this number, or what is left of a build whose claim was removed."""
    return bool(store.list(f"{NORMS}{number}/"))


def _read(store: Store, number: int) -> Claim | None:
    key = f"{NORMS}{number}/zarr.json"
    data = store.get_or_none(key, MAX_ROOT_BYTES)
    if data is None:
        return None
    where = str(store.location.child(key))
    try:
        attributes = ArrayLayout.parse(f"{NORMS}{number}", json.loads(bytes(data))).attributes
        sites, outputs, build = tuple(attributes["sites"]), tuple(attributes["outputs"]), attributes["build"]
        for name in (*sites, *outputs):
            check_name(name)
    except (ValueError, KeyError, TypeError, RecursionError, Unsupported):
        build = None
    if not is_sha256(build):
        raise Corrupt(f"{where}: not the norms of an added build; remove this folder, and what that build began")
    return Claim(number, build, sites, outputs)


def _held(store: Store, held: Claim, name: str, asked: Plan, theirs: Plan | None) -> str:
    how = f" ({'; '.join(difference(theirs.spec, asked.spec))})" if theirs is not None else ""
    return (
        f"{store.location}: {name} is held by added build {held.key[:12]}…, which has another spec and is not finished{how}; "
        "finish it with its own command, or remove what it began ('actcache verify --json' lists its folders)"
    )
