"""From what a user asks for to a plan: every choice made, every file hashed. No torch where the model is known: it must be quick."""

from __future__ import annotations

from dataclasses import dataclass
from glob import has_magic
from pathlib import Path

from actcache.jobs.anatomy import Studied, study
from actcache.jobs.checkpoint import Checkpoint, locate
from actcache.jobs.corpus import Corpus, open_corpus, printable
from actcache.schemas.dtypes import numpy_dtype
from actcache.schemas.errors import InvalidInput
from actcache.schemas.grid import Grid
from actcache.schemas.outputs import top_k
from actcache.schemas.plan import BatchRule, Labels, ModelShape, Plan
from actcache.schemas.quantised import Quantisation
from actcache.schemas.sites import expand
from actcache.schemas.spec import CAPTURE_VERSION, Execution, Layout, ResolvedSpec, Spec

DEFAULT_CONTEXT = 1024
SHARD_BYTES = 64 << 20
CHUNK_BYTES = 512 << 10
CONTEXTS_PER_BLOCK = 32
TOKENS_PER_BATCH = 8192
LABELS = 6


@dataclass(frozen=True)
class Chosen:
    """A plan, and the model's files that it stands for."""

    plan: Plan
    checkpoint: Checkpoint
    studied: Studied

    def check_model(self) -> None:
        """Check that the model's files are still those of the plan.

        Raises:
            InvalidInput: one has changed.
        """
        if self.checkpoint.identity() != self.plan.spec.model:
            raise InvalidInput(f"{self.checkpoint.folder}: a file changed since the build began; run the command again")


@dataclass(frozen=True)
class Resolved(Chosen):
    """A plan, and all local files that it stands for."""

    corpus: Corpus

    def check_tokenizer(self) -> None:
        """Check that the tokenizer's files are still those of the plan.

        Raises:
            InvalidInput: one has changed.
        """
        if self.checkpoint.tokenizer() != self.plan.spec.tokenizer:
            raise InvalidInput(f"{self.checkpoint.folder}: a file changed since the build began; run the command again")


def resolve(spec: Spec) -> Resolved:
    """Make the plan of a spec.

    Raises:
        InvalidInput: a part of the spec cannot be used.
        Unsupported: the model cannot be captured.
        StoreError: the model's hub failed.
    """
    checkpoint = locate(spec.model, spec.revision)
    corpus = open_corpus(spec.corpus, spec.text_field)
    compute_dtype = spec.compute_dtype or checkpoint.dtype()
    identity = checkpoint.identity()
    studied = study(checkpoint, identity, compute_dtype, spec.attention)
    anatomy = studied.anatomy
    shape = ModelShape(
        n_layers=anatomy.n_layers,
        d_model=anatomy.d_model,
        vocab_size=anatomy.vocab_size,
        max_context=anatomy.max_context,
    )
    context = _context(spec, shape)
    _check_outputs(spec, shape)
    sites = tuple(expand(spec.sites, anatomy.sites, anatomy.n_layers, anatomy.module_sites))
    stored_dtype = compute_dtype if spec.dtype == "auto" else spec.dtype
    batch_size = spec.batch_size or max(1, TOKENS_PER_BATCH // context)
    resolved = ResolvedSpec(
        capture=CAPTURE_VERSION,
        model=identity,
        tokenizer=checkpoint.tokenizer(),
        corpus=corpus.identity(),
        context=context,
        max_tokens=spec.max_tokens,
        sites=sites,
        outputs=spec.outputs,
        quantize=quantisation(spec),
        head=spec.head,
        stored_dtype=stored_dtype,
        execution=Execution(compute_dtype=compute_dtype, attention=anatomy.attention, batch_size=batch_size),
        layout=layout_of(spec, shape, context, stored_dtype),
    )
    plan = Plan(
        key=resolved.key(),
        tokens_key=resolved.tokens_key(),
        spec=resolved,
        labels=Labels(
            model=checkpoint.name,
            revision=checkpoint.revision,
            model_license=spec.model_license or checkpoint.license(),
            corpus=_corpus_labels(spec.corpus),
            corpus_license=spec.corpus_license,
        ),
        model=shape,
        widths={site: width for site in sites if (width := anatomy.width(site)) != anatomy.d_model},
        batches=BatchRule(size=batch_size),
        sources=corpus.sources,
    )
    check_layout(plan)
    return Resolved(plan, checkpoint, studied, corpus)


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


def _corpus_labels(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """What the corpus is called: files by name, globs with the folder before them; the first few of many."""
    names = ["/".join(pattern.split("/")[-2:]) if has_magic(pattern) else Path(pattern).name for pattern in patterns]
    names = [printable(name) for name in names]
    more = (f"and {len(names) - LABELS} more",) if len(names) > LABELS else ()
    return (*names[:LABELS], *more)


def _context(spec: Spec, shape: ModelShape) -> int:
    longest = shape.max_context
    if spec.context is None:
        return min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)
    if longest is not None and spec.context > longest:
        raise InvalidInput(f"--context {spec.context} is longer than the model's own context of {longest} tokens")
    return spec.context
