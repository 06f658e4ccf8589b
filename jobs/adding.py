"""Added builds: more sites for the tokens of a sealed dataset. No torch here: what is there already must be told at once."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actcache.cache.added import stored_tokens, tidy
from actcache.cache.claims import begin
from actcache.cache.opening import read_plan
from actcache.cache.roots import newest_root
from actcache.cache.store import Store
from actcache.jobs.anatomy import study
from actcache.jobs.batching import TOKENS_PER_BATCH, asked_limits, rule_of, with_limits
from actcache.jobs.corpora.corpus import open_corpus
from actcache.jobs.options import RunOptions
from actcache.jobs.progress import Reporter
from actcache.jobs.resolve import ARRANGING, Chosen, check_layout, layout_of, quantisation
from actcache.jobs.sequences import cutting_of, selection_of
from actcache.jobs.source import ModelSource, source_of
from actcache.jobs.torch_half import torch_half
from actcache.schemas.anatomy import Anatomy
from actcache.schemas.errors import Corrupt, InvalidInput, SpecMismatch, StoreError
from actcache.schemas.outputs import output_layouts
from actcache.schemas.plan import PLAN_KEY, ModelShape, Plan, added_records
from actcache.schemas.root import Generation, RootAttributes
from actcache.schemas.sites import expand
from actcache.schemas.spec import CAPTURE_VERSION, Execution, ResolvedSpec, Spec, difference

if TYPE_CHECKING:
    from actcache.jobs.run import Outcome


@dataclass(frozen=True)
class Added:
    """What became of an added build.

    `generation` has the sites asked for, the newest that has any of them, None where only a part was run; `sites` were missing;
    `by_us` says whether this run sealed them, `outcome` what else it did, None where there was nothing to do.
    """

    root: RootAttributes
    generation: Generation | None
    sites: tuple[str, ...] = ()
    by_us: bool = False
    outcome: Outcome | None = None


def add(store: Store, spec: Spec, patterns: str | Iterable[str], reporter: Reporter, options: RunOptions) -> Added:
    """Add the sites that patterns choose, and the spec's outputs, as far as the sealed dataset lacks them.

    The spec names the model. Whatever else it leaves open is as in the first build.

    Raises:
        NotFound, NotSealed: there is no sealed dataset.
        InvalidInput: the spec cannot be used.
        SpecMismatch: the tokens or the model are others, or an unfinished added build holds one of the sites.
    """
    root = newest_root(store).attributes
    source = source_of(spec.model, spec.revision)
    same = _same_tokens(store, spec, source, root)
    run_as = _execution(spec, same)
    studied = study(source, same.model, run_as.compute_dtype, run_as.attention)
    anatomy = studied.anatomy
    sites = expand(patterns, anatomy.sites, anatomy.n_layers, anatomy.module_sites)
    _check_modules(store, root, anatomy, sites)
    if inexact := [site for site in sites if site in root.captured and site not in root.sites]:
        reporter.note(
            f"{len(inexact)} of the sites are stored in quantised form alone ({inexact[0]} …); their exact values need another URL"
        )
    while True:
        missing = [site for site in sites if site not in root.captured]
        stored = {name for generation in root.generations for name in generation.provenance.spec.outputs}
        outputs = tuple(name for name in spec.outputs if name not in stored)
        if clash := set(output_layouts(outputs, 1, 1)) & set(root.arrays):
            raise SpecMismatch(
                f"{store.location}: holds {min(clash)} already, of another spec (outputs: {', '.join(sorted(stored))} here, "
                f"{', '.join(outputs)} asked for); leave it out of --with"
            )
        if not missing:
            return _nothing_to_do(store, spec, root, sites, outputs)
        wanted = same.model_copy(
            update={"sites": tuple(missing), "modules": anatomy.named_modules(missing), "outputs": outputs}
        )
        plan = _plan(store, spec, source, anatomy, wanted)
        store.probe_create_only(added_records(plan.key))
        grid = begin(store, plan, stored_tokens(store, root))
        if grid is not None:
            break
        root = newest_root(store).attributes
    if len(missing) < len(sites):
        reporter.note(f"{len(sites) - len(missing)} of the {len(sites)} sites are there already; the others are added")
    if same.quantize is not None and not spec.quantize:
        how = "in quantised form alone" if same.quantize.only else "quantised too"
        reporter.note(f"as in the first build, the added sites are stored {how} ({', '.join(same.quantize.kinds)})")
    store.clean_staging()
    outcome = torch_half("run").run_added(store, grid, Chosen(grid.plan, source, studied), reporter, options)
    if outcome.sealed is None:
        return Added(root, None, grid.plan.spec.sites, outcome=outcome)
    root = outcome.sealed.root.attributes
    (generation,) = (part for part in root.generations if part.key == grid.plan.key)
    return Added(root, generation, generation.captured, outcome.sealed.by_us, outcome)


def _same_tokens(store: Store, spec: Spec, source: ModelSource, root: RootAttributes) -> ResolvedSpec:
    """The spec of the first build with the model at hand, and with what the spec says of the tokens.

    The tokenizer is not looked at: the tokens are stored. Nor is the corpus, unless the spec has one.
    """
    here = root.generations[0].provenance.spec
    said: dict[str, Any] = {"capture": CAPTURE_VERSION, "model": source.identity()}
    said |= {name: value for name in ("context", "max_tokens") if (value := getattr(spec, name)) is not None}
    if (items := source.items()) is not None:
        said["corpus"] = items.identity()
    elif spec.corpus:
        said["corpus"] = open_corpus(spec, store.location.endpoint_url, store.location.profile).identity()
    if spec.model_fields_set & ARRANGING:
        context = spec.context or here.context
        said |= {
            "selection": selection_of(spec),
            "packing": "stream" if spec.pack else "document",
            "cutting": cutting_of(spec, context, root.generations[0].provenance.model.vocab_size),
        }
    asked = here.model_copy(update=said)
    if asked.tokens_key() != here.tokens_key():
        raise SpecMismatch(
            f"{store.location}: sites are added for the same tokens of the same model, and these are others "
            f"({'; '.join(difference(here, asked))}); give another URL"
        )
    return asked


def _check_modules(store: Store, root: RootAttributes, anatomy: Anatomy, sites: list[str]) -> None:
    """Refuse a site of a name that is stored already of another module."""
    asked = anatomy.named_modules(sites) or {}
    for generation in root.generations:
        for site, path in (generation.provenance.spec.modules or {}).items():
            if asked.get(site, path) != path:
                raise SpecMismatch(
                    f"{store.location}: site {site!r} is the output of module {path!r} here, not of {asked[site]!r}; "
                    "give the other another name"
                )


def _plan(store: Store, spec: Spec, source: ModelSource, anatomy: Anatomy, same: ResolvedSpec) -> Plan:
    """The plan of an added build. What it does not ask for is as in the first build, so that bits and blocks fit together."""
    first = read_plan(store)
    if first is None:
        raise Corrupt(f"{store.location.child(PLAN_KEY)}: missing; copy it again from where the dataset came")
    resolved = _asked(spec, first.model, same)
    plan = Plan(
        key=resolved.key(),
        tokens_key=resolved.tokens_key(),
        spec=resolved,
        labels=first.labels.model_copy(
            update={
                "model": source.name,
                "revision": source.revision,
                "model_license": spec.model_license or source.license() or first.labels.model_license,
                "corpus_license": spec.corpus_license or first.labels.corpus_license,
            }
        ),
        model=first.model,
        widths={site: width for site in same.sites if (width := anatomy.width(site)) != first.model.d_model},
        batches=rule_of(resolved.execution, first.model.max_context),
        sources=first.sources,
    )
    check_layout(plan)
    return plan


def _asked(spec: Spec, shape: ModelShape, base: ResolvedSpec) -> ResolvedSpec:
    """A resolved spec with whatever a spec says of stored dtype, quantising, execution and layout."""
    stored_dtype = base.stored_dtype if spec.dtype == "auto" else spec.dtype
    update: dict[str, Any] = {"stored_dtype": stored_dtype, "execution": _execution(spec, base)}
    if spec.quantize or spec.only_quantized:
        update["quantize"] = quantisation(spec)
    if spec.block_tokens is not None or spec.chunk_tokens is not None:
        block = spec.block_tokens or base.layout.block_tokens
        chunk = spec.chunk_tokens or (base.layout.chunk_tokens if block % base.layout.chunk_tokens == 0 else None)
        cut = spec.model_copy(update={"block_tokens": block, "chunk_tokens": chunk})
        update["layout"] = layout_of(cut, shape, base.context, stored_dtype)
    return base.model_copy(update=update)


def _execution(spec: Spec, base: ResolvedSpec) -> Execution:
    names = ("compute_dtype", "attention")
    if spec.compile:
        raise InvalidInput("--compile is for a dataset's first build; leave it out with --add-sites")
    execution = base.execution.model_copy(
        update={name: value for name in names if (value := getattr(spec, name)) is not None} | {"compile": None}
    )
    # what a trial found for the first build holds for an added one: it takes no more room
    found = base.execution.batch_tokens or TOKENS_PER_BATCH
    return with_limits(execution, asked_limits(spec, lambda: found))


def _nothing_to_do(store: Store, spec: Spec, root: RootAttributes, sites: list[str], outputs: tuple[str, ...]) -> Added:
    generation = next(part for part in reversed(root.generations) if set(part.captured) & set(sites))
    here = generation.provenance.spec
    if different := difference(here, _asked(spec, generation.provenance.model, here)):
        raise SpecMismatch(
            f"{store.location}: has every site asked for, of another spec ({'; '.join(different)}); "
            "leave those options out, or give another URL"
        )
    if outputs:
        raise InvalidInput(
            f"{store.location}: has every site asked for; {', '.join(outputs)} can be added with a site that it lacks alone"
        )
    with suppress(StoreError):  # a courtesy: whoever sealed it may have died before it had tidied up
        root = tidy(store).attributes
    return Added(root, generation)
