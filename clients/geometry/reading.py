"""Which states the geometry is measured of: every token of a dataset or selection, whether or not anything comes after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from actcache.cache.head import Head
from actcache.clients.bootstrap import Groups
from actcache.clients.selection import Selectable
from actcache.clients.states import States, chosen_tokens, numbered, whole_of
from actcache.schemas.errors import InvalidInput, NotFound
from actcache.schemas.quantised import KINDS, Kind
from actcache.schemas.sites import residual_stream

UNIT = "units of the states"
"""Of norms and magnitudes."""
MEMORY = 2 << 30
"""Bytes that sums of products may take, unless asked otherwise: what does not fit is left to further passes over the data."""


def layers(
    ds: Selectable | States,
    sites: Sequence[str] | None = None,
    max_tokens: int | None = None,
    quantised: str | None = None,
) -> States:
    """The states of every token of a dataset or selection, or of the first `max_tokens`; they predict nothing, so no head is read.

    `sites` are, unless given, the states of the residual stream that are stored, or every site where none is. They may differ in
    width. States that `lens.states` made are taken as they are.

    Raises:
        NotFound: a site that is not stored, in the form asked for.
        InvalidInput: no site, one named twice, no token, or no such quantised form.
    """
    if isinstance(ds, States):
        if sites is not None or max_tokens is not None or quantised is not None:
            raise InvalidInput("states that are chosen already: give sites, max_tokens and quantised to lens.states")
        return ds
    if quantised is not None and quantised not in KINDS:
        raise InvalidInput(f"quantised={quantised!r}: there is {', '.join(KINDS)}")
    kind: Kind | None = quantised
    whole = whole_of(ds)
    there = ds.sites if kind is None else [site for site, kinds in ds.quantised.items() if kind in kinds]
    names = tuple(([s for s in ds.residual_states if s in there] or there) if sites is None else sites)
    if not names and kind is None and (kinds := sorted({each for some in ds.quantised.values() for each in some})):
        raise NotFound(
            f"{ds.url}: sites are stored in quantised form alone; read one of {', '.join(kinds)} (quantised=, --quantized)"
        )
    if not names or len(set(names)) < len(names):
        raise InvalidInput(f"{ds.url}: sites, each once, are asked for; there is {', '.join(there) or 'none'}")
    for name in names:
        ds.source(name, kind)
    token = chosen_tokens(ds, max_tokens)
    if not len(token):
        raise InvalidInput(f"{ds.url}: no token is selected")
    document, count = numbered(whole, "document", token)
    target = np.full(len(token), -1)
    labels = _labels(names, ds.model.n_layers) if sites is None else names
    return States(whole, names, labels, Head([], {}), token, target, Groups(document, count, "document"), 0, kind)


def _labels(names: tuple[str, ...], n_layers: int) -> tuple[str, ...]:
    """A state of the residual stream by its block's number, what is before the first `embed`; another site by its name."""
    stream = residual_stream(n_layers)
    found = {site: "embed" if layer == 0 else str(layer - 1) for layer, site in enumerate(stream)}
    return tuple(found.get(name, name) for name in names)


def only_sites(read: States, numbers: Sequence[int]) -> States:
    """The same tokens at some of the sites."""
    return replace(read, sites=tuple(read.sites[i] for i in numbers), labels=tuple(read.labels[i] for i in numbers))


def widths(read: States) -> list[int]:
    """The width of each site."""
    return [int(read.ds.source(site, read.kind).shape[1]) for site in read.sites]


def kept_dimensions(read: States, without: Sequence[int]) -> list[np.ndarray]:
    """The dimensions of each site that are looked at, all but those left out.

    Raises:
        InvalidInput: no such dimension, or none is left.
    """
    left_out = np.unique(np.asarray(without, np.int64)) if len(without) else np.empty(0, np.int64)
    least = min(widths(read))
    if len(left_out) and not 0 <= left_out[0] <= left_out[-1] < least:
        raise InvalidInput(f"without={list(without)}: dimensions are from 0 to {least - 1}")
    if len(left_out) == least:
        raise InvalidInput(f"without={list(without)}: no dimension is left")
    return [np.setdiff1d(np.arange(width), left_out) for width in widths(read)]


def by_group(owner: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each group that some tokens are of, (n,), and the places of its tokens."""
    order = np.argsort(owner, kind="stable")
    cuts = np.flatnonzero(np.diff(owner[order])) + 1
    for places in np.split(order, cuts):
        yield int(owner[places[0]]), places
