"""`build`: from a spec to a sealed dataset, from wherever an earlier run of it stopped."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from actcache.cache.added import tidy
from actcache.cache.location import Location
from actcache.cache.opening import SealedRoot, read_plan
from actcache.cache.publish import publish
from actcache.cache.roots import newest_root
from actcache.cache.store import Store, open_store
from actcache.jobs.adding import add
from actcache.jobs.batching import AUTO
from actcache.jobs.options import RETRIES, ClusterOptions, RunOptions
from actcache.jobs.progress import Reporter, Silent
from actcache.jobs.resolve import Resolved, resolve
from actcache.jobs.torch_half import torch_half
from actcache.schemas.errors import InvalidInput, NotFound, NotSealed, SpecMismatch, StoreError, Unsupported
from actcache.schemas.part import Part
from actcache.schemas.plan import PLAN_KEY, Plan
from actcache.schemas.root import RootAttributes
from actcache.schemas.spec import ResolvedSpec, Spec, difference

if TYPE_CHECKING:
    from actcache.jobs.run import Outcome

State = Literal["built", "already sealed", "sealed by another build", "tokenised", "part stored"]


@dataclass(frozen=True)
class BuildResult:
    """What became of a build.

    `manifest` is the SHA-256 of the build's manifest, None before the seal; `sites` are all of the dataset's, `added` those
    that an added build found missing; `bytes_written` and `blocks_run` are this run's own. `blocks` are the first and the end of
    a part's.
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
    blocks: tuple[int, int] | None = None


def build(
    spec: Spec,
    url: str | Path | Location,
    *,
    add_sites: str | Iterable[str] | None = None,
    endpoint_url: str | None = None,
    profile: str | None = None,
    stage: str = "all",
    part: str | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    scheduler_file: str | Path | None = None,
    gpus_per_worker: int | None = None,
    retries: int = RETRIES,
    reporter: Reporter | None = None,
) -> BuildResult:
    """Run a model over a corpus and seal what its sites hold at a URL (a local path or `s3://`).

    Running it again resumes what was begun, or finds it sealed. `stage="tokenise"` stops when the tokens are stored.
    `part="i/n"` runs the i-th of n parts of the blocks, here or anywhere else at any time, and seals nothing: `actcache seal`, or a
    build without a part, does once all are stored.

    Blocks are run in this process; with `workers`, by so many processes of this machine; with `scheduler` (an address) or
    `scheduler_file`, by the workers of that Dask cluster, each of which needs actcache, the model and access to the URL.
    `gpus_per_worker` gives each local worker so many GPUs of its own, and asks for the resource "GPU" of any worker. A block
    that fails on a cluster is tried `retries` more times. None of that changes what is stored.

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
        StoreError: the store refused or failed, or the cluster is gone.
    """
    cluster = ClusterOptions(workers, scheduler, scheduler_file, gpus_per_worker, retries)
    options = RunOptions(stage, None if part is None else Part.parse(part), cluster)
    store = open_store(url, endpoint_url=endpoint_url, profile=profile)
    if store.location.scheme in ("http", "https"):
        raise Unsupported(f"{store.location}: http(s) is read-only; build into a local path or s3://")
    if store.location.scheme == "memory" and cluster.wanted:
        raise InvalidInput(f"{store.location}: is in this process alone; other workers need a path or s3://")
    if add_sites is not None:
        return _add(store, spec, add_sites, options, reporter or Silent())
    resolved, sealed = _resolved(store, spec)
    if sealed is not None:
        generation = sealed.attributes.generations[0]
        with suppress(StoreError):  # a courtesy: whoever sealed it may have died before it had tidied up
            tidy(store)
        return BuildResult(
            store.location.url,
            generation.key,
            "already sealed",
            generation.manifest,
            sealed.attributes.n_tokens,
            tuple(sealed.attributes.captured),
        )
    outcome = torch_half("run").run_plan(store, resolved, reporter or Silent(), options)
    return _result(store, outcome, options)


def _resolved(store: Store, spec: Spec) -> tuple[Resolved, SealedRoot | None]:
    """The plan of a spec, in place at the URL, and the dataset if it is sealed already."""
    try:
        return _placed(store, spec)
    except SpecMismatch:
        if spec.batch_tokens != AUTO:
            raise
        return _placed(store, spec)  # somebody else's trial, which ended first, found another number: it is the plan's


def _placed(store: Store, spec: Spec) -> tuple[Resolved, SealedRoot | None]:
    sealed = _sealed(store)
    found = _found_before(store, sealed) if spec.batch_tokens == AUTO else None
    resolved = resolve(spec, store.location.endpoint_url, store.location.profile, found)
    if sealed is None:
        sealed = _sealed(store)
    if sealed is None:
        _place(store, resolved)
        return resolved, None
    here = sealed.attributes.generations[0].provenance.spec
    _same(store, "holds a sealed dataset", here, resolved.plan, _hint(sealed.attributes, resolved.plan))
    return resolved, sealed


def _found_before(store: Store, sealed: SealedRoot | None) -> int | None:
    """The tokens of a batch that the planner of what is there found by trial."""
    if sealed is not None:
        return sealed.attributes.generations[0].provenance.spec.execution.batch_tokens
    plan = read_plan(store)
    return None if plan is None else plan.spec.execution.batch_tokens


def _result(store: Store, outcome: Outcome, options: RunOptions) -> BuildResult:
    result = BuildResult(
        store.location.url,
        outcome.key,
        "tokenised",
        blocks_run=outcome.blocks_run,
        bytes_written=outcome.bytes_written,
        recomputed_fraction=outcome.recomputed,
    )
    if options.part is not None:
        return replace(result, state="part stored", blocks=(outcome.blocks.start, outcome.blocks.stop))
    if outcome.sealed is None:
        return result
    root = outcome.sealed.root.attributes
    return replace(
        result,
        state="built" if outcome.sealed.by_us else "sealed by another build",
        manifest=root.generations[0].manifest,
        n_tokens=root.n_tokens,
        sites=tuple(root.captured),
    )


def _add(
    store: Store, spec: Spec, patterns: str | Iterable[str], options: RunOptions, reporter: Reporter
) -> BuildResult:
    if options.stop_after != "all":
        raise InvalidInput(f"{store.location}: the tokens are stored already; leave --stage out with --add-sites")
    added = add(store, spec, patterns, reporter, options)
    done = added.outcome
    if added.generation is None:
        assert done is not None
        return replace(_result(store, done, options), added=added.sites)
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
