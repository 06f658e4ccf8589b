"""The seal of an added build: checked like a first one, then one more generation in the dataset's root."""

from __future__ import annotations

from concurrent.futures import Executor
from datetime import datetime

from actcache.cache.claims import Claim, open_claims, read_claim
from actcache.cache.opening import SealedRoot, read_tokens
from actcache.cache.roots import add_generation, finish_root, newest_root
from actcache.cache.seal import NOT_REPLAYED, Sealed, collect, remove_scaffolding, seal_parts
from actcache.cache.store import Store
from actcache.schemas.errors import Corrupt, NotSealed
from actcache.schemas.grid import Grid
from actcache.schemas.plan import TOKENS_KEY, TokensRecord
from actcache.schemas.root import Generation, ReplayResult, RootAttributes


def seal_added(
    store: Store, pool: Executor, grid: Grid, replay: ReplayResult = NOT_REPLAYED, began: datetime | None = None
) -> Sealed:
    """Check that every part of an added build is there, write statistics and manifest, and give the dataset its next root.

    Raises:
        NotSealed: parts are missing; the message says how many.
        Corrupt: a stored part is not what its receipt says.
    """
    by_us = False
    if generation_of(newest_root(store).attributes, grid.plan.key) is None:
        sealed = seal_parts(store, collect(store, grid, None, pool), pool, replay, began)
        _, by_us = add_generation(store, sealed)
    root = finish_root(store)
    remove_scaffolding(store, grid.records)
    return Sealed(root, by_us)


def tidy(store: Store) -> SealedRoot:
    """Do what whoever sealed a dataset may have died before: write the newest root over, remove what only builds need.

    Raises:
        StoreError: the store refused or failed.
    """
    root = finish_root(store)
    for number in range(len(root.attributes.generations)):
        remove_scaffolding(store, root.attributes.records(number))
    return root


def seal_finished(store: Store, pool: Executor) -> tuple[list[Generation], list[NotSealed]]:
    """Seal every added build whose blocks are all stored. Returns their generations, and why the others are not sealed."""
    root = tidy(store)
    sealed, unfinished = [], []
    for held in open_claims(store, root):
        try:
            grid = _grid(store, held)
            root = seal_added(store, pool, grid).root
            generation = generation_of(root.attributes, grid.plan.key)
            assert generation is not None
            sealed.append(generation)
        except NotSealed as error:
            unfinished.append(error)
    return sealed, unfinished


def generation_of(root: RootAttributes, key: str) -> Generation | None:
    """The generation of a build, or None."""
    return next((generation for generation in root.generations if generation.key == key), None)


def stored_tokens(store: Store, root: RootAttributes) -> TokensRecord:
    """The record of a sealed dataset's tokens.

    Raises:
        Corrupt: it is missing, or is that of other tokens.
    """
    tokens = read_tokens(store)
    counts = (root.n_tokens, root.n_sequences, root.n_documents)
    if tokens is None or (tokens.n_tokens, tokens.n_sequences, tokens.n_documents) != counts:
        raise Corrupt(
            f"{store.location.child(TOKENS_KEY)}: missing, or of other tokens; copy it again from where the dataset came"
        )
    return tokens


def _grid(store: Store, held: Claim) -> Grid:
    plan = read_claim(store, held)
    if plan is None:
        raise NotSealed(
            f"{store.location}: added build {held.key[:12]}… has no plan yet; run the same 'actcache build --add-sites' to go on"
        )
    return Grid.of(plan, stored_tokens(store, newest_root(store).attributes), held.number)
