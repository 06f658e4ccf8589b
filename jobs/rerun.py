"""The half of `replay` that runs the model."""

from __future__ import annotations

import random
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actcache.cache.added import stored_tokens
from actcache.cache.opening import SealedRoot, read_plan
from actcache.cache.reader import ArrayReader
from actcache.cache.store import Store
from actcache.jobs.anatomy import Studied, study
from actcache.jobs.batches import Batch, touching
from actcache.jobs.capture import read_sites
from actcache.jobs.compiled import compile_blocks
from actcache.jobs.determinism import deterministic
from actcache.jobs.environment import device_name
from actcache.jobs.feeds import Feed, feed_of
from actcache.jobs.head import to_numpy
from actcache.jobs.loaded import inputs_of, loaded_parts
from actcache.jobs.parts import ModelParts
from actcache.jobs.proof import largest, relative_error
from actcache.jobs.replay import Form, forms_of, limit_of, receipts_of_tokens, wide
from actcache.jobs.replaying import Replayed, SiteReplay
from actcache.jobs.resolve import Chosen
from actcache.jobs.source import ModelSource, source_of
from actcache.schemas.capturable import Capturable
from actcache.schemas.errors import Corrupt, InvalidInput, SpecMismatch
from actcache.schemas.grid import Grid
from actcache.schemas.plan import Plan
from actcache.schemas.receipt import Receipt
from actcache.schemas.root import Generation, RootAttributes


@deterministic()
def rerun(store: Store, root: SealedRoot, count: int, model: str | Path | Capturable | None) -> Replayed:
    """Replay every generation of a dataset; see `actcache.jobs.replaying.replay`."""
    attributes = root.attributes
    rng = random.Random(f"{attributes.generations[0].key} {count}")
    drawn = sorted(rng.sample(range(attributes.n_sequences), min(count, attributes.n_sequences)))
    found = Replayed(str(store.location), drawn)
    tokens = stored_tokens(store, attributes)
    plans = [_plan(store, attributes, number) for number in range(len(attributes.generations))]
    source = _source(store, plans[0], model)
    sequence_start = ArrayReader(store, root.layouts["sequence_start"]).read()
    loaded: dict[tuple[str, ...], Studied] = {}
    for number, (plan, generation) in enumerate(zip(plans, attributes.generations, strict=True)):
        grid = Grid.of(plan, tokens, number)
        chosen = _chosen(store, plan, source, loaded)
        parts = ModelParts(chosen.studied.model, chosen.studied.anatomy)
        feed = feed_of(grid, inputs_of(store, grid, chosen), sequence_start, parts.device)
        _Comparison(store, grid, parts, feed, sequence_start).compare(drawn, found.arrays)
        found.differs |= _differences(generation, parts)
    return found


def _plan(store: Store, attributes: RootAttributes, number: int) -> Plan:
    plan = read_plan(store, attributes.records(number))
    if plan is None or plan.spec.model != attributes.generations[0].provenance.spec.model:
        raise Corrupt(
            f"{store.location}: the plan of generation {number} is missing, or of another model; copy the dataset again"
        )
    return plan


def _chosen(store: Store, plan: Plan, source: ModelSource, loaded: dict[tuple[str, ...], Studied]) -> Chosen:
    """A plan with its model, loaded once for all builds that ran it alike."""
    execution = plan.spec.execution
    alike = (execution.compute_dtype, execution.attention, str(execution.compile))
    if alike not in loaded:
        studied = study(source, plan.spec.model, execution.compute_dtype, execution.attention)
        parts = loaded_parts(Chosen(plan, source, studied))
        if execution.compile:
            compile_blocks(parts)
        loaded[alike] = Studied(studied.anatomy, parts.model)
    chosen = Chosen(plan, source, loaded[alike])
    _check_own(store, plan, chosen)
    return chosen


def _source(store: Store, plan: Plan, model: str | Path | Capturable | None) -> ModelSource:
    """The plan's model, found by its name or where the user says."""
    labels = plan.labels
    if model is None and labels.revision is None:
        raise InvalidInput(
            f"{store.location}: was built from {labels.model!r}, which is no model of a hub at a commit; "
            "say where it is with --model, or model=… in Python"
        )
    if model is None:
        source = source_of(labels.model, labels.revision)
    else:
        source = source_of(model if isinstance(model, Capturable) else str(model), None)
    if source.identity() != plan.spec.model:
        raise SpecMismatch(
            f"{store.location}: was built from {labels.model!r}, and {source.name!r} has other weights or another config; "
            "give the same model"
        )
    return source


def _check_own(store: Store, plan: Plan, chosen: Chosen) -> None:
    """Check that a user's own module has the inputs and the sites of the build."""
    if plan.spec.modules is None:
        return
    items = chosen.source.items()
    if items is None or items.identity() != plan.spec.corpus:
        raise SpecMismatch(
            f"{store.location}: was built from other inputs than {chosen.source.name!r} has; give the same"
        )
    taps = chosen.studied.anatomy.taps
    for site, path in plan.spec.modules.items():
        if site not in taps or taps[site].module != path:
            raise SpecMismatch(
                f"{store.location}: site {site!r} is the output of module {path!r}, and is not so in {chosen.source.name!r}; "
                f"describe it with sites={{{site!r}: {path!r}}}"
            )


class _Comparison:
    """Runs sequences in the batches of the build and compares them with every form in which their sites are stored."""

    def __init__(self, store: Store, grid: Grid, parts: ModelParts, feed: Feed, sequence_start: np.ndarray) -> None:
        self._store = store
        self._grid = grid
        self._parts = parts
        self._feed = feed
        self._sequence_start = sequence_start
        self._forms = forms_of(store, grid)

    def compare(self, sequences: list[int], found: dict[str, SiteReplay]) -> None:
        """Compare some sequences, block by block, since a block is what batches are made for."""
        grid, start = self._grid, self._sequence_start
        blocks = {
            block
            for sequence in sequences
            for block in range(start[sequence] // grid.block_tokens, (start[sequence + 1] - 1) // grid.block_tokens + 1)
        }
        for block in sorted(blocks):
            low, high = grid.block_range(block)
            wanted = set(sequences) & set(touching(start, low, high))
            receipts = receipts_of_tokens(self._store, grid, low, high)
            for batch in self._feed.batches(low, high):
                if mine := sorted(wanted & set(batch.sequences.tolist())):
                    self._batch(batch, mine, low, high, receipts, found)

    def _batch(
        self,
        batch: Batch,
        sequences: list[int],
        low: int,
        high: int,
        receipts: list[Receipt],
        found: dict[str, SiteReplay],
    ) -> None:
        states = read_sites(self._parts, self._feed.inputs(batch), self._grid.plan.spec.sites)
        for sequence in sequences:
            row = int(np.flatnonzero(batch.sequences == sequence)[0])
            start = max(int(self._sequence_start[sequence]), low)
            stop = min(int(self._sequence_start[sequence + 1]), high)
            offset = start - int(self._sequence_start[sequence])
            for form in self._forms:
                rows = states[form.site][row, offset : offset + stop - start]
                self._rows(form, rows, start, stop, receipts, found.setdefault(form.name, SiteReplay()))

    def _rows(
        self, form: Form, rows: torch.Tensor, start: int, stop: int, receipts: list[Receipt], found: SiteReplay
    ) -> None:
        there = form.reader.read(start, stop)
        if form.bound is None:  # as it would be stored: narrowed like what is there
            rows = rows.to(getattr(torch, self._grid.plan.spec.stored_dtype))
        computed = to_numpy(rows)
        a, b = wide(there).double(), wide(computed).double()
        found.equal = found.equal and there.dtype == computed.dtype and there.tobytes() == computed.tobytes()
        found.largest_difference = largest(found.largest_difference, float((a - b).abs().max()))
        found.relative_error = largest(found.relative_error, relative_error(a, b))
        found.tolerance = max(found.tolerance, limit_of(form, self._grid, receipts))


def _differences(generation: Generation, parts: ModelParts) -> dict[str, str]:
    """What this machine has in another version, or is, than where the generation was computed."""
    differs: dict[str, str] = {}
    device = device_name(parts)
    for environment in generation.provenance.environments:
        libraries = environment.get("libraries")
        for name, version in (libraries if isinstance(libraries, Mapping) else {}).items():
            here = _version(name)
            if here != version:
                differs[name] = f"{here} here, {version} there"
        if environment.get("device") != device:
            differs["device"] = f"{device} here, {environment.get('device')} there"
    return differs


def _version(name: Any) -> str | None:
    try:
        return metadata.version(str(name))
    except metadata.PackageNotFoundError:
        return None
