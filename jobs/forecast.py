"""What a build will take and give: tokens, bytes, objects, memory, time and money, from a measured sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from actcache.jobs.cost import Cost, Quantities, cost
from actcache.jobs.grouping import padded_fraction, recomputed_fraction
from actcache.jobs.memory_plan import ALLOCATOR_BYTES, BLOCKS_AT_ONCE, batch_positions, pipeline_bytes, staging_bytes
from actcache.jobs.prices import Prices
from actcache.schemas.grid import Grid

METADATA_BYTES = 1500
"""About what an array's metadata has, and what the root says of it again."""
RECEIPT_BYTES = 260
"""About what a receipt and a manifest's line say of an object, together."""
TOKENS_RATIO, SCALARS_RATIO = 0.2, 0.9
"""About what compression leaves of the arrays that tell of tokens, and of norms and outputs."""
FIXED_REQUESTS = 20
"""Probes, leases, listings and what else a build asks of a store once."""
BLOCKS_LOOKED_AT = 64


@dataclass(frozen=True)
class Sample:
    """What running some tokens took. Seconds are those of one worker; bytes are of this process or of its GPU.

    Attributes:
        tokens: kept tokens that were run.
        seconds: from the first batch to the last encoded shard.
        forward_seconds: for which the model was busy.
        ratios: stored bytes of each array of a site for each raw byte.
        device, cores, on_gpu: what the model runs on; `cores` is 1 on a GPU.
        resident_bytes: of the process, model and libraries included, before the sample.
        model_bytes: weights and buffers.
        forward_bytes: most that the forward pass of a batch of full size takes beside the weights.
        proof_bytes: most that the proof took.
        head_objects, head_bytes: what is stored of the head, 0 where none is.
    """

    tokens: int
    seconds: float
    forward_seconds: float
    ratios: dict[str, float]
    device: str
    cores: int
    on_gpu: bool
    resident_bytes: int
    model_bytes: int
    forward_bytes: int
    proof_bytes: int
    head_objects: int
    head_bytes: int


@dataclass(frozen=True)
class Memory:
    """Most bytes of memory of a worker. `device` is that of its GPU, None without one."""

    peak: int
    resident: int
    model: int
    forward: int
    pipeline: int
    staging: int
    blocks_at_once: int
    device: int | None


@dataclass(frozen=True)
class Forecast:
    """What a build will take and give.

    Attributes:
        key: the dataset's key; of a build whose batch size is found by trial, the key if this trial's result is kept.
        n_tokens, n_sequences, n_documents: of the token axis; `exact` says whether they are counted, `basis` what they rest on.
        tokens_left: those that are to be run yet; requests, time and the cost of the build are for these.
        sites: how many are stored.
        blocks, block_tokens, chunk_tokens, batch_tokens: how the work is cut; `batch_tokens` counts pads.
        recomputed: tokens run twice since their sequence crosses blocks, a token.
        padded: positions run that hold pads, a position.
        raw_bytes, stored_bytes: before and after compression.
        objects: under the URL when it is sealed.
        put_requests: of the build. `get_requests`: of one pass over every site, a request a shard.
        memory: of a worker.
        tokens_per_second: of a worker, measured on `device`. `bytes_per_second`: what it sends to the store at that rate.
        workers, seconds: the block stage on so many such workers.
        cost: in `currency`, with the prices of `provider` as of `prices_as_of`.
    """

    key: str
    n_tokens: int
    tokens_left: int
    n_sequences: int
    n_documents: int
    exact: bool
    basis: str
    sites: int
    stored_as: str
    blocks: int
    block_tokens: int
    chunk_tokens: int
    batch_tokens: int
    recomputed: float
    padded: float
    raw_bytes: int
    stored_bytes: int
    objects: int
    put_requests: int
    get_requests: int
    memory: Memory
    device: str
    tokens_per_second: float
    bytes_per_second: float
    workers: int
    seconds: float
    currency: str
    provider: str
    prices_as_of: str
    compute: str | None
    cost: Cost


@dataclass(frozen=True)
class Counted:
    """The token axis as far as it is known: `lengths` (n,) are those of sequences that were looked at.

    `tokenizer` has the bytes of each file that is stored of the tokenizer.
    """

    lengths: np.ndarray
    exact: bool
    basis: str
    tokenizer: tuple[int, ...] = ()


def counted(sequence_start: np.ndarray, tokenizer: tuple[int, ...] = ()) -> Counted:
    """A token axis that is stored, by its row splits, and the sizes of its tokenizer's files."""
    return Counted(np.diff(sequence_start), True, "counted: the tokens are stored", tokenizer)


def forecast(
    grid: Grid,
    counted: Counted,
    sample: Sample,
    workers: int,
    prices: Prices,
    provider: str | None = None,
    left: int | None = None,
) -> Forecast:
    """Put together what is known of a build of which `left` tokens are to be run yet, by default all.

    Raises:
        InvalidInput: no provider of that name.
    """
    plan, layout = grid.plan, grid.plan.spec.layout
    recomputed, padded = _waste(grid, counted.lengths)
    raw, stored = _bytes(grid, sample, sum(counted.tokenizer))
    objects, shards = count_objects(grid, sample, len(counted.tokenizer))
    rate = sample.tokens / sample.seconds
    left = grid.n_tokens if left is None else left
    run = left * (1 + recomputed)
    seller, compute = prices.provider(provider), prices.compute_of(sample.device if sample.on_gpu else "cpu")
    puts = FIXED_REQUESTS + grid.n_blocks // 1000 + objects * left // grid.n_tokens
    quantities = Quantities(
        bytes_stored=stored,
        put_requests=puts,
        get_requests=shards,
        bytes_read=stored,
        build_seconds=run / rate * sample.cores,
        recompute_seconds=grid.n_tokens * sample.forward_seconds / sample.tokens * sample.cores,
    )
    return Forecast(
        key=plan.key,
        n_tokens=grid.n_tokens,
        tokens_left=left,
        n_sequences=grid.n_sequences,
        n_documents=grid.n_documents,
        exact=counted.exact,
        basis=counted.basis,
        sites=len(plan.spec.sites),
        stored_as=plan.spec.stored_as,
        blocks=grid.n_blocks,
        block_tokens=layout.block_tokens,
        chunk_tokens=layout.chunk_tokens,
        batch_tokens=batch_positions(plan),
        recomputed=recomputed,
        padded=padded,
        raw_bytes=raw,
        stored_bytes=stored,
        objects=objects,
        put_requests=puts,
        get_requests=shards,
        memory=memory_of(grid, sample),
        device=sample.device,
        tokens_per_second=rate,
        bytes_per_second=rate * stored / grid.n_tokens,
        workers=workers,
        seconds=run / rate / workers,
        currency=prices.currency,
        provider=seller.name,
        prices_as_of=seller.as_of.isoformat(),
        compute=None if compute is None else f"{compute.machine}, {compute.hour:g} an hour as of {compute.as_of}",
        cost=cost(quantities, seller, compute),
    )


def memory_of(grid: Grid, sample: Sample) -> Memory:
    """The most memory that a worker takes: what it holds anyway, the larger of the proof and of the pipeline at work, and slack."""
    pipeline = pipeline_bytes(grid)
    if sample.on_gpu:
        staged = staging_bytes(grid)  # rows that are on their way from the GPU are there too
        device = sample.model_bytes + max(sample.proof_bytes, sample.forward_bytes + staged)
        peak = sample.resident_bytes + pipeline + ALLOCATOR_BYTES
    else:
        device = None
        peak = sample.resident_bytes + max(sample.proof_bytes, sample.forward_bytes + pipeline) + ALLOCATOR_BYTES
    return Memory(
        peak,
        sample.resident_bytes,
        sample.model_bytes,
        sample.forward_bytes,
        pipeline,
        staging_bytes(grid),
        BLOCKS_AT_ONCE,
        device,
    )


def count_objects(grid: Grid, sample: Sample, tokenizer_files: int) -> tuple[int, int]:
    """Objects under the URL when a build of this grid is sealed, and how many of them are shards of its sites.

    For an added build those that it adds, which stores no file of the tokenizer.
    """
    spec = grid.plan.spec
    arrays = list(grid.block_arrays())
    of_sites = sum(layout.n_shards for layout in arrays if layout.name in {*grid.exact_sites, *grid.quantised})
    objects = sum(1 + layout.n_shards for layout in arrays)
    objects += 2 * grid.n_blocks  # receipt and statistics of each block
    objects += 2 * len(spec.sites)  # each site's statistics: metadata and a shard
    objects += len({name.split("/")[0] for name in grid.outputs if "/" in name})
    objects += 2  # plan and manifest
    objects += tokenizer_files
    if grid.number == 0:
        objects += sum(1 + layout.n_shards for layout in grid.token_arrays().values())
        objects += 4  # tokens.json, the groups of norms and statistics, the root
        objects += sample.head_objects
    else:
        objects += 1  # the next root
    return objects, of_sites


def _bytes(grid: Grid, sample: Sample, tokenizer_bytes: int) -> tuple[int, int]:
    """Bytes of every array before and after compression, and of what lies beside them."""
    raw = sample.head_bytes + tokenizer_bytes
    stored = float(raw)
    for layout in grid.block_arrays():
        size = layout.row_bytes * grid.n_tokens
        raw += size
        stored += size * sample.ratios.get(layout.name, SCALARS_RATIO)
    statistics = sum(16 * width for width in grid.statistics().values())
    for layout in grid.token_arrays().values() if grid.number == 0 else ():
        size = layout.row_bytes * layout.shape[0]
        raw += size
        stored += size * TOKENS_RATIO
    arrays = len(list(grid.block_arrays())) + len(grid.statistics())
    beside = arrays * (METADATA_BYTES + grid.n_blocks * RECEIPT_BYTES) + statistics * (1 + grid.n_blocks)
    return raw, int(stored + beside)


def _waste(grid: Grid, lengths: np.ndarray) -> tuple[float, float]:
    """The parts of the work that are done twice, and for pads, of sequences of such lengths, repeated to fill some blocks."""
    wanted = BLOCKS_LOOKED_AT * grid.block_tokens
    repeated = np.tile(lengths, max(1, min(grid.n_tokens, wanted) // max(1, int(lengths.sum()))))
    starts = np.concatenate([[0], np.cumsum(repeated)])
    recomputed = recomputed_fraction(starts, int(starts[-1]), grid.block_tokens)
    one = repeated[: max(1, int(np.searchsorted(starts, grid.block_tokens, side="right")) - 1)]
    return recomputed, padded_fraction(grid.plan.batches, one)
