"""`build`: from a spec to a sealed dataset, from wherever an earlier run of it stopped."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from actcache.cache.added import tidy
from actcache.cache.location import Location
from actcache.cache.opening import SealedRoot, read_plan
from actcache.cache.publish import publish
from actcache.cache.roots import newest_root
from actcache.cache.store import Store, open_store
from actcache.jobs.adding import add
from actcache.jobs.progress import Reporter, Silent
from actcache.jobs.resolve import Resolved, resolve
from actcache.jobs.torch_half import torch_half
from actcache.schemas.errors import InvalidInput, NotFound, NotSealed, SpecMismatch, StoreError, Unsupported
from actcache.schemas.plan import PLAN_KEY, Plan
from actcache.schemas.root import RootAttributes
from actcache.schemas.spec import ResolvedSpec, Spec, difference

State = Literal["built", "already sealed", "sealed by another build", "tokenised"]
STAGES = ("tokenise", "all")


@dataclass(frozen=True)
class BuildResult:
    """What became of a build.

    `manifest` is the SHA-256 of the build's manifest, None before the seal; `sites` are all of the dataset's, `added` those
    that an added build found missing; `bytes_written` and `blocks_run` are this run's own.
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
    added: tuple[str, ...] = ()


def build(
    spec: Spec,
    url: str | Path | Location,
    *,
    add_sites: str | Iterable[str] | None = None,
    endpoint_url: str | None = None,
    profile: str | None = None,
    stage: str = "all",
    reporter: Reporter | None = None,
) -> BuildResult:
    """Run a model over a corpus and seal what its sites hold at a URL (a local path or `s3://`).

    Running it again resumes what was begun, or finds it sealed. `stage="tokenise"` stops when the tokens are stored.

    With `add_sites` (patterns of sites), those of them that a sealed dataset lacks are added to it, for the same tokens of the
    same model. Of the spec, the model is needed; its sites and head are not looked at, and what else it leaves open is as
    in the first build.

    Raises:
        InvalidInput: the spec cannot be used, or the URL holds something else.
        NotFound, NotSealed: there is no sealed dataset to add to.
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
    if add_sites is not None:
        return _add(store, spec, add_sites, stage, reporter or Silent())
    resolved = resolve(spec, endpoint_url, profile)
    sealed = _sealed(store)
    if sealed is not None:
        root, generation = sealed.attributes, sealed.attributes.generations[0]
        _same(store, "holds a sealed dataset", generation.provenance.spec, resolved.plan, _hint(root, resolved.plan))
        with suppress(StoreError):  # a courtesy: whoever sealed it may have died before it had tidied up
            tidy(store)
        return BuildResult(
            store.location.url,
            generation.key,
            "already sealed",
            generation.manifest,
            root.n_tokens,
            tuple(root.captured),
        )
    _place(store, resolved)
    outcome = torch_half("run").run_plan(store, resolved, reporter or Silent(), stage == "tokenise")
    if outcome.sealed is None:
        return BuildResult(store.location.url, resolved.plan.key, "tokenised", recomputed_fraction=outcome.recomputed)
    root = outcome.sealed.root.attributes
    return BuildResult(
        store.location.url,
        resolved.plan.key,
        "built" if outcome.sealed.by_us else "sealed by another build",
        root.generations[0].manifest,
        root.n_tokens,
        tuple(root.captured),
        outcome.blocks_run,
        outcome.bytes_written,
        outcome.recomputed,
    )


def _add(store: Store, spec: Spec, patterns: str | Iterable[str], stage: str, reporter: Reporter) -> BuildResult:
    if stage != "all":
        raise InvalidInput(f"{store.location}: the tokens are stored already; leave --stage out with --add-sites")
    added = add(store, spec, patterns, reporter)
    done = added.outcome
    return BuildResult(
        store.location.url,
        added.generation.key,
        "already sealed" if done is None else "built" if added.by_us else "sealed by another build",
        added.generation.manifest,
        added.root.n_tokens,
        tuple(added.root.captured),
        added=added.sites,
        blocks_run=done.blocks_run if done else 0,
        bytes_written=done.bytes_written if done else 0,
        recomputed_fraction=done.recomputed if done else 0.0,
    )


def _sealed(store: Store) -> SealedRoot | None:
    try:
        return newest_root(store)
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


def _hint(root: RootAttributes, asked: Plan) -> str:
    """Another way out, where what is asked for are more sites for the same tokens."""
    more = set(asked.spec.sites) - set(root.sites)
    return " or, for more sites, --add-sites" if more and root.tokens_key == asked.tokens_key else ""


def _same(store: Store, what: str, spec: ResolvedSpec, asked: Plan, hint: str = "") -> None:
    if spec.key() != asked.key:
        raise SpecMismatch(
            f"{store.location}: {what} with another spec ({'; '.join(difference(spec, asked.spec))}); "
            f"give another URL{hint}"
        )
