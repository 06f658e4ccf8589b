"""From what a user asks for to a plan: every choice made, every file hashed. No torch where the model is known: it must be quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from glob import has_magic
from pathlib import Path

from actcache.jobs.anatomy import Studied, study
from actcache.jobs.batching import limits_of_items, limits_of_tokens, rule_of
from actcache.jobs.corpora.corpus import Corpus, open_corpus
from actcache.jobs.corpora.files import printable
from actcache.jobs.corpora.remote import without_query
from actcache.jobs.items import Items
from actcache.jobs.sequences import cutting_of, selection_of
from actcache.jobs.source import ModelSource, source_of
from actcache.jobs.special_ids import special_ids
from actcache.jobs.torch_half import torch_half
from actcache.schemas.anatomy import Anatomy
from actcache.schemas.capturable import Capturable
from actcache.schemas.dtypes import ACTIVATION_DTYPES, numpy_dtype
from actcache.schemas.errors import InvalidInput
from actcache.schemas.grid import Grid
from actcache.schemas.outputs import top_k
from actcache.schemas.plan import Labels, ModelShape, Plan
from actcache.schemas.quantised import Quantisation
from actcache.schemas.sites import expand
from actcache.schemas.spec import CAPTURE_VERSION, Execution, Layout, ModelIdentity, ResolvedSpec, Spec

DEFAULT_CONTEXT = 1024
SHARD_BYTES = 64 << 20
CHUNK_BYTES = 512 << 10
CONTEXTS_PER_BLOCK = 32
LABELS = 6
ARRANGING = {
    *("pack", "long", "stride", "bos", "bos_id", "eos_id"),
    *("min_tokens", "max_document_tokens", "shuffle", "sample", "max_documents"),
}
"""What a spec says of the arrangement of a corpus's tokens."""
OF_ITEMS = {
    *("model", "sites", "dtype", "compute_dtype", "quantize", "only_quantized", "head"),
    *("batch_size", "block_tokens", "chunk_tokens", "model_license", "corpus_license"),
}
"""What a spec can say where a module has inputs of its own: there is no corpus, and there are no logits."""


@dataclass(frozen=True)
class Chosen:
    """A plan, and the model's files that it stands for."""

    plan: Plan
    source: ModelSource
    studied: Studied
    travelled: bool = field(default=False, kw_only=True)
    """Whether it came from the process that made the plan, with the user's own module if it is one."""

    def check_model(self) -> None:
        """Check that the model's files are still those of the plan.

        Raises:
            InvalidInput: one has changed.
        """
        if self.travelled and self.studied.model is not None:
            return  # the very module, whose source need not be readable here
        if self.source.identity() != self.plan.spec.model:
            raise InvalidInput(
                f"{self.source.name}: a file or a weight changed since the build began; run the command again"
            )


@dataclass(frozen=True)
class Resolved(Chosen):
    """A plan, and all that it stands for here: the model's origin, and the corpus or the items of a user's own."""

    corpus: Corpus | Items

    def check_tokenizer(self) -> None:
        """Check that the tokenizer's files are still those of the plan.

        Raises:
            InvalidInput: one has changed.
        """
        if self.source.tokenizer() != self.plan.spec.tokenizer:
            raise InvalidInput(f"{self.source.folder}: a file changed since the build began; run the command again")


def resolve(
    spec: Spec, endpoint_url: str | None = None, profile: str | None = None, batch_tokens: int | None = None
) -> Resolved:
    """Make the plan of a spec. `endpoint_url` and `profile` say how to reach a corpus on S3.

    `batch_tokens` is what an earlier run has found, for a spec that leaves it to a trial.

    Raises:
        InvalidInput: a part of the spec cannot be used.
        Unsupported: the model cannot be captured.
        StoreError: a hub or a corpus's server failed.
    """
    source = source_of(spec.model, spec.revision)
    items = source.items()
    if items is not None:
        _check_items(spec)
    corpus = open_corpus(spec, endpoint_url, profile) if items is None else items
    compute_dtype = _compute_dtype(spec, source)
    identity = source.identity()
    studied = study(source, identity, compute_dtype, spec.attention)
    anatomy = studied.anatomy
    shape = ModelShape(
        n_layers=anatomy.n_layers,
        d_model=anatomy.d_model,
        vocab_size=anatomy.vocab_size,
        max_context=anatomy.max_context,
    )
    if items is None:
        context = _context(spec, shape)
        _check_outputs(spec, shape)
    else:
        context = items.positions
    sites = tuple(expand(spec.sites, anatomy.sites, anatomy.n_layers, anatomy.module_sites))
    stored_dtype = compute_dtype if spec.dtype == "auto" else spec.dtype
    if items is None:
        limits = limits_of_tokens(
            spec, lambda: batch_tokens or find_batch_tokens(source, identity, studied, sites, compute_dtype, context)
        )
    else:
        limits = limits_of_items(spec, context)
    if spec.compile:
        _check_compilable(spec, anatomy, sites)
    execution = Execution(
        compute_dtype=compute_dtype, attention=anatomy.attention, compile=spec.compile or None, **limits
    )
    resolved = ResolvedSpec(
        capture=CAPTURE_VERSION,
        model=identity,
        tokenizer=source.tokenizer(),
        corpus=corpus.identity(),
        selection=selection_of(spec),
        context=context,
        packing="stream" if spec.pack else "document",
        cutting=cutting_of(spec, context, shape.vocab_size),
        max_tokens=spec.max_tokens,
        sites=sites,
        modules=anatomy.named_modules(sites),
        outputs=spec.outputs,
        quantize=quantisation(spec),
        head=spec.head and bool(anatomy.head),
        stored_dtype=stored_dtype,
        execution=execution,
        layout=layout_of(spec, shape, context, stored_dtype),
    )
    plan = Plan(
        key=resolved.key(),
        tokens_key=resolved.tokens_key(),
        spec=resolved,
        labels=Labels(
            model=source.name,
            revision=source.revision,
            model_license=spec.model_license or source.license(),
            corpus=_corpus_labels(spec.corpus) if items is None else (f"inputs of {items.name}",),
            corpus_revision=corpus.revision,
            corpus_license=spec.corpus_license,
        ),
        model=shape,
        widths={site: width for site in sites if (width := anatomy.width(site)) != anatomy.d_model},
        batches=rule_of(execution, shape.max_context),
        sources=corpus.sources,
    )
    check_layout(plan)
    if isinstance(corpus, Corpus):
        _check_tokenizer(plan, corpus, source)
    return Resolved(plan, source, studied, corpus)


def find_batch_tokens(
    source: ModelSource, identity: ModelIdentity, studied: Studied, sites: tuple[str, ...], dtype: str, context: int
) -> int:
    """How many tokens a batch may have on this machine, found by trial.

    Raises:
        InvalidInput: the model cannot be loaded, or not even one sequence fits.
    """
    model = studied.model
    if model is None:
        model, _ = torch_half("model").load_model(source.folder, identity.family, dtype, studied.anatomy.attention)
    found: int = torch_half("trial").batch_tokens(model, studied.anatomy, sites, context)
    return found


def _compute_dtype(spec: Spec, source: ModelSource) -> str:
    """The dtype of the forward pass."""
    own = source.dtype()
    if not isinstance(spec.model, Capturable):
        return spec.compute_dtype or own
    if own not in ACTIVATION_DTYPES or spec.compute_dtype not in (None, own):
        raise InvalidInput(
            f"{source.name}: the module computes in {own}; convert it, as with module.to(torch.float32), to compute in another"
        )
    return own


def _check_compilable(spec: Spec, anatomy: Anatomy, sites: tuple[str, ...]) -> None:
    """Refuse sites that are read within what would be compiled."""
    if isinstance(spec.model, Capturable):
        raise InvalidInput("--compile is for checkpoints; compile a module of your own yourself")
    inside = tuple(f"{path}." for path in anatomy.blocks)
    if within := [site for site in sites if anatomy.tap(site).module.startswith(inside)]:
        raise InvalidInput(
            f"--compile: {within[0]} is read inside a block, which is compiled as a whole; store sites between blocks alone, such as "
            "'resid', or leave --compile out"
        )


def _check_items(spec: Spec) -> None:
    """Refuse what has no meaning where a module has inputs of its own."""
    if given := sorted(spec.model_fields_set - OF_ITEMS):
        raise InvalidInput(f"the module has inputs of its own, so {', '.join(given)} has no meaning; leave it out")


def layout_of(spec: Spec, shape: ModelShape, context: int, stored_dtype: str) -> Layout:
    """How to cut the token axis: shards of about 64 MiB and at least 32 contexts, chunks of 512 KiB, not compressed.

    Raises:
        InvalidInput: the block asked for is no whole number of the chunks asked for.
    """
    row = shape.d_model * numpy_dtype(stored_dtype).itemsize
    chunk = spec.chunk_tokens or max(1, CHUNK_BYTES // row)
    block = spec.block_tokens
    if block is None:
        least = max(CONTEXTS_PER_BLOCK * context, SHARD_BYTES // row)
        block = (
            max(1, SHARD_BYTES // row // chunk) * chunk if least == SHARD_BYTES // row else -(-least // chunk) * chunk
        )
    elif spec.chunk_tokens is None:
        chunk = next(size for size in range(min(chunk, block), 0, -1) if block % size == 0)
    if block % chunk:
        raise InvalidInput(f"--block-tokens {block} is no whole number of chunks of --chunk-tokens {chunk}")
    return Layout(block_tokens=block, chunk_tokens=chunk)


def check_layout(plan: Plan) -> None:
    """Check, before anything is stored, that readers will accept the layout.

    Raises:
        InvalidInput: an array's shards or chunks are beyond all bounds.
    """
    try:
        names = [layout.name for layout in Grid(plan, 1, 1, 1).block_arrays()]
    except InvalidInput as error:
        raise InvalidInput(f"--block-tokens, --chunk-tokens: {error}") from None
    if twice := [name for name in names if names.count(name) > 1]:
        raise InvalidInput(f"two arrays would be called {twice[0]!r}; leave one of these sites out")


def quantisation(spec: Spec) -> Quantisation | None:
    """In which kinds a spec wants its sites quantised.

    Raises:
        InvalidInput: nothing would be stored, or nothing in the dtype that is asked for.
    """
    if spec.only_quantized and not spec.quantize:
        raise InvalidInput(
            "--only-quantized leaves out the exact arrays: say with --quantize int8 or fp8 what to store"
        )
    if spec.only_quantized and spec.dtype != "auto":
        raise InvalidInput(
            f"--dtype {spec.dtype} is how exact arrays are stored, and --only-quantized stores none; leave one out"
        )
    return Quantisation(kinds=spec.quantize, only=spec.only_quantized) if spec.quantize else None


def _check_outputs(spec: Spec, shape: ModelShape) -> None:
    k = top_k(spec.outputs)
    if k is not None and k > shape.vocab_size:
        raise InvalidInput(
            f"--with topk={k} asks for more logits than the model's vocabulary of {shape.vocab_size} has"
        )


def _check_tokenizer(plan: Plan, corpus: Corpus, source: ModelSource) -> None:
    """Refuse, before anything is stored, what cannot be done without a tokenizer where there is none."""
    if plan.spec.tokenizer is not None:
        return
    if corpus.holds != "tokens":
        raise InvalidInput(
            f"{source.folder}: no tokenizer (tokenizer.json and its kin) beside the model; "
            "put its files there, or give a corpus that is tokenised already (.npy, .bin, --tokens-field)"
        )
    special_ids(plan.spec, corpus, None)


def _corpus_labels(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """What the corpus is called: files by name, globs with the folder before them; the first few of many."""
    names = [_corpus_label(without_query(pattern)) for pattern in patterns]
    names = [printable(name) for name in names]
    more = (f"and {len(names) - LABELS} more",) if len(names) > LABELS else ()
    return (*names[:LABELS], *more)


def _corpus_label(pattern: str) -> str:
    if pattern.startswith("hf://"):
        return pattern
    return "/".join(pattern.split("/")[-2:]) if has_magic(pattern) else Path(pattern).name


def _context(spec: Spec, shape: ModelShape) -> int:
    longest = shape.max_context
    if spec.context is None:
        return min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)
    if longest is not None and spec.context > longest:
        raise InvalidInput(f"--context {spec.context} is longer than the model's own context of {longest} tokens")
    return spec.context
