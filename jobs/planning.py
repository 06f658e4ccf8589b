"""`plan`: what a build would take and give, before anything of it is stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from actcache.cache.location import Location
from actcache.cache.opening import read_plan, read_tokens
from actcache.cache.reader import ArrayReader
from actcache.cache.store import Store, open_store
from actcache.jobs.batching import AUTO
from actcache.jobs.corpora.corpus import Corpus
from actcache.jobs.forecast import Counted, Forecast, Sample, counted, forecast
from actcache.jobs.items import Items
from actcache.jobs.memory_plan import batch_positions
from actcache.jobs.prices import load_prices
from actcache.jobs.resolve import Resolved, resolve
from actcache.jobs.tokenizer_files import tokenizer_files
from actcache.jobs.torch_half import torch_half
from actcache.schemas.errors import InvalidInput, Unsupported
from actcache.schemas.grid import Grid
from actcache.schemas.plan import TokensRecord
from actcache.schemas.spec import Spec
from actcache.schemas.tokenizer import files_among

if TYPE_CHECKING:
    from actcache.jobs.token_estimate import TokenEstimate


def plan(
    spec: Spec,
    url: str | Path | Location | None = None,
    *,
    workers: int = 1,
    prices: str | Path | None = None,
    provider: str | None = None,
    endpoint_url: str | None = None,
    profile: str | None = None,
) -> Forecast:
    """Tell what building a spec would take and give, on `workers` workers like this process. Nothing is stored.

    The model is loaded and runs a batch of the corpus; tokens are counted, or estimated from the corpus's beginning. Where the URL has
    tokens of this very spec already, these are used. `prices` is a file like the one that comes with actcache
    (`jobs/prices.json`), `provider` one of those in it, by default the first.

    Raises:
        InvalidInput, Unsupported, ProofFailed, StoreError: as `build`.
    """
    if workers < 1:
        raise InvalidInput(f"--workers {workers}: give at least 1")
    prices_known = load_prices(prices)
    prices_known.provider(provider)  # a wrong name is told before the model runs
    store = None if url is None else open_store(url, endpoint_url=endpoint_url, profile=profile)
    if store is not None and store.location.scheme in ("http", "https"):
        raise Unsupported(f"{store.location}: http(s) is read-only; build into a local path or s3://")
    there = None if store is None else read_plan(store)
    found = there.spec.execution.batch_tokens if there is not None and spec.batch_tokens == AUTO else None
    resolved = resolve(spec, endpoint_url, profile, found)
    tokens = None
    if store is not None and there is not None and there.key == resolved.plan.key:
        tokens = read_tokens(store)
    if store is not None and tokens is not None:
        grid, known, sampled = _of_stored(store, resolved, tokens)
    elif isinstance(resolved.corpus, Corpus):
        grid, known, sampled = _of_corpus(resolved, resolved.corpus)
    else:
        grid, known, sampled = _of_items(resolved, resolved.corpus)
    return forecast(grid, known, sampled, workers, prices_known, provider)


def _of_stored(store: Store, resolved: Resolved, tokens: TokensRecord) -> tuple[Grid, Counted, Sample]:
    grid = Grid.of(resolved.plan, tokens)
    starts = ArrayReader(store, grid.token_arrays()["sequence_start"]).read()
    inputs = torch_half("loaded").inputs_of(store, grid, resolved)
    sizes = tuple(file.size for file in files_among(tokens.objects))
    return grid, counted(starts, sizes), _sampled(resolved, grid, starts, inputs)


def _of_items(resolved: Resolved, items: Items) -> tuple[Grid, Counted, Sample]:
    count = len(items.inputs)
    grid = Grid(resolved.plan, count * items.positions, count, count)
    starts = np.arange(count + 1) * items.positions
    known = Counted(np.full(count, items.positions), True, "counted: the module's own inputs")
    return grid, known, _sampled(resolved, grid, starts, items)


def _of_corpus(resolved: Resolved, corpus: Corpus) -> tuple[Grid, Counted, Sample]:
    tokenizer, files = None, {}
    if resolved.plan.spec.tokenizer is not None:
        tokenizer = torch_half("encode").load_tokenizer(resolved.source.folder)
        files = tokenizer_files(resolved.source.folder, tokenizer)
    found: TokenEstimate = torch_half("token_estimate").estimate_tokens(resolved.plan, corpus, tokenizer)
    grid = Grid(resolved.plan, found.n_tokens, found.n_sequences, found.n_documents)
    starts = np.concatenate([[0], np.cumsum([len(sequence) for sequence in found.sequences])])
    ids = np.concatenate(found.sequences)
    few = replace(grid, n_tokens=len(ids), n_sequences=len(found.sequences))
    sampled = _sampled(resolved, few, starts, lambda start, stop: ids[start:stop])
    sizes = tuple(map(len, files.values()))
    return grid, Counted(found.lengths, found.exact, found.basis, sizes), sampled


def _sampled(
    resolved: Resolved, grid: Grid, starts: np.ndarray, inputs: Items | Callable[[int, int], np.ndarray]
) -> Sample:
    """What a batch of full size of the first sequences takes here."""
    sampling = torch_half("sampling")
    small, some = sampling.first_sequences(grid, starts, batch_positions(resolved.plan))
    found: Sample = sampling.sample_here(resolved, small, some, inputs)
    return found
