"""`build`: from a spec to a sealed dataset, from wherever an earlier run of it stopped."""

from __future__ import annotations

import importlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from actcache.cache.location import Location
from actcache.cache.opening import SealedRoot, read_plan, read_root
from actcache.cache.publish import publish
from actcache.cache.seal import remove_scaffolding
from actcache.cache.store import Store, open_store
from actcache.jobs.progress import Reporter, Silent
from actcache.jobs.resolve import Resolved, resolve
from actcache.schemas.errors import InvalidInput, NotFound, NotSealed, SpecMismatch, StoreError, Unsupported
from actcache.schemas.plan import PLAN_KEY, Plan
from actcache.schemas.spec import ResolvedSpec, Spec, difference

State = Literal["built", "already sealed", "sealed by another build", "tokenised"]
STAGES = ("tokenise", "all")


@dataclass(frozen=True)
class BuildResult:
    """What became of a build.

    `manifest` is the SHA-256 of the manifest, None before the seal; `bytes_written` and `blocks_run` are this run's own.
    """

    url: str
    key: str
    state: State
    manifest: str | None = None
    n_tokens: int | None = None
    sites: tuple[str, ...] = ()
    blocks_run: int = 0
    bytes_written: int = 0
    recomputed_fraction: float = 0.0


def build(
    spec: Spec,
    url: str | Path | Location,
    *,
    endpoint_url: str | None = None,
    profile: str | None = None,
    stage: str = "all",
    reporter: Reporter | None = None,
) -> BuildResult:
    """Run a model over a corpus and seal what its sites hold at a URL (a local path or `s3://`).

    Running it again resumes what was begun, or finds it sealed. `stage="tokenise"` stops when the tokens are stored.

    Raises:
        InvalidInput: the spec cannot be used, or the URL holds something else.
        SpecMismatch: another spec is built or sealed there; the message shows the difference.
        Unsupported: the model's family, or the store, cannot be handled.
        ProofFailed: the captured tensors would not be what the model computes.
        OutOfRange: a value does not fit the stored dtype.
        StoreError: the store refused or failed.
    """
    if stage not in STAGES:
        raise InvalidInput(f"stage {stage!r} is not one of {', '.join(STAGES)}")
    store = open_store(url, endpoint_url=endpoint_url, profile=profile)
    if store.location.scheme in ("http", "https"):
        raise Unsupported(f"{store.location}: http(s) is read-only; build into a local path or s3://")
    resolved = resolve(spec, endpoint_url, profile)
    sealed = _sealed(store)
    if sealed is not None:
        root, generation = sealed.attributes, sealed.attributes.generations[0]
        _same(store, "holds a sealed dataset", generation.provenance.spec, resolved.plan)
        with suppress(StoreError):  # a courtesy: whoever sealed it may have died before it had tidied up
            remove_scaffolding(store)
        return BuildResult(
            store.location.url, generation.key, "already sealed", generation.manifest, root.n_tokens, tuple(root.sites)
        )
    _place(store, resolved)
    outcome = _runner().run_plan(store, resolved, reporter or Silent(), stage == "tokenise")
    if outcome.sealed is None:
        return BuildResult(store.location.url, resolved.plan.key, "tokenised", recomputed_fraction=outcome.recomputed)
    root = outcome.sealed.root.attributes
    return BuildResult(
        store.location.url,
        resolved.plan.key,
        "built" if outcome.sealed.by_us else "sealed by another build",
        root.generations[0].manifest,
        root.n_tokens,
        tuple(root.sites),
        outcome.blocks_run,
        outcome.bytes_written,
        outcome.recomputed,
    )


def _runner() -> Any:
    """The half that needs torch, which a run that has nothing to do must not wait for."""
    try:
        return importlib.import_module("actcache.jobs.run")
    except ModuleNotFoundError as error:
        raise Unsupported(f"building needs {error.name}; pip install 'actcache[jobs]'") from None


def _sealed(store: Store) -> SealedRoot | None:
    try:
        return read_root(store)
    except (NotFound, NotSealed):
        return None


def _place(store: Store, resolved: Resolved) -> None:
    """Put the plan in place, or find that the same one is."""
    there = read_plan(store)
    if there is None:
        folders, names = store.children("")
        if others := (folders - {".actcache"}) | names:
            there = read_plan(store)  # another build may have begun since the first look
            if there is None:
                raise InvalidInput(
                    f"{store.location}: not empty (there is {min(others)!r}); give a URL of its own to the dataset"
                )
    if there is None:
        store.probe_create_only()
        published = publish(store, PLAN_KEY, resolved.plan.to_bytes())
        if published.other is not None:
            there = Plan.from_bytes(bytes(published.other), str(store.location.child(PLAN_KEY)))
    if there is not None:
        _same(store, "a build was begun here", there.spec, resolved.plan)
    store.clean_staging()


def _same(store: Store, what: str, spec: ResolvedSpec, asked: Plan) -> None:
    if spec.key() != asked.key:
        raise SpecMismatch(
            f"{store.location}: {what} with another spec ({'; '.join(difference(spec, asked.spec))}); give another URL"
        )
