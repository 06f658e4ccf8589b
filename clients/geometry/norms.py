"""How the norm of the states grows from layer to layer, and what each block adds to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from actcache.cache.threads import spread
from actcache.clients.bootstrap import mean
from actcache.clients.geometry.histogram import Magnitudes
from actcache.clients.geometry.influence import Z, dealt, standard_error
from actcache.clients.geometry.reading import UNIT, layers, widths
from actcache.clients.loader import Batches
from actcache.clients.results import Measure, Results
from actcache.clients.selection import Selectable
from actcache.clients.states import States
from actcache.clients.token_index import Masked
from actcache.schemas.errors import InvalidInput

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
BITS = 10
"""Percentiles are exact but for a relative 2^-10."""
ROWS = 1 << 16
UPDATES = ("cosine", "update_cosine", "update_size", "update_share")


def norms(
    ds: Selectable | States,
    *,
    sites: Sequence[str] | None = None,
    max_tokens: int | None = None,
    updates: bool = False,
    quantised: str | None = None,
) -> Results:
    """L2 norms of the states by layer, from the stored norms: no activation is read, unless `updates` are asked for.

    - `norm` (layer, percentile): percentiles of the norm over tokens, from a histogram, exact but for a relative 2^-10.
    - `median` (layer,): the 50th, with the interval of Woodruff (1952, JASA 47): that of the share of tokens below it, by documents.
    - `growth` (layer,): the geometric mean over tokens of this layer's norm over the one's before; NaN at the first. Tokens whose norm
      is 0 at either are left out.

    With `updates`, for the states before, h, and after, h + u, of each layer but the first, means over tokens:

    - `cosine`: of h and h + u.
    - `update_cosine`: of h and u: above 0 where a block lengthens what is there, below 0 where it takes some of it back.
    - `update_size`: ‖u‖ / ‖h + u‖.
    - `update_share`: u · (h + u) / ‖h + u‖², the share of the new squared norm that is the update's; the rest is h's. It can be below 0.

    Norms are in the units of the states, all else is without a unit; intervals of means resample documents.

    Raises:
        NotFound: a site that is not stored, in the form asked for.
        InvalidInput: `updates` of sites of different widths, or arguments that do not fit the dataset.
    """
    read = layers(ds, sites, max_tokens, quantised)
    if updates and len(set(widths(read))) > 1:
        raise InvalidInput(f"{read.ds.url}: updates are differences of states, and these sites differ in width")
    counts, growth, told = _first_pass(read)
    percentiles = np.array([[each.quantile(p / 100) for p in PERCENTILES] for each in counts])
    measures = {
        "norm": Measure(percentiles, UNIT, ("layer", "percentile")),
        "median": _median(read, counts),
        "growth": growth if told is None else Measure(np.exp(growth.value), "1", growth.axes, *told),
        **(_updates(read) if updates else {}),
    }
    labels = {"layer": read.labels, "percentile": [str(p) for p in PERCENTILES]}
    return Results(measures, labels, read.facts())


def _stored(read: States) -> Iterator[tuple[int, list[np.ndarray]]]:
    """The norms of some tokens at a time: the first one's place, and by layer (n,) float32."""
    bits = Masked.empty(read.ds.n_tokens)
    Masked.mark(bits, read.token)
    low = 0
    for batch in Batches({site: read.ds.norm_source(site) for site in read.sites}, Masked(bits), ROWS):
        found = [batch[site] for site in read.sites]
        yield low, found
        low += len(found[0])


def _first_pass(read: States) -> tuple[list[Magnitudes], Measure, tuple[np.ndarray, np.ndarray] | None]:
    """The histograms, the mean logarithm of growth, and the interval of the growth."""
    counts = [Magnitudes(BITS) for _ in read.sites]
    logs = np.zeros((read.groups.count, read.n_layers))
    tokens = np.zeros_like(logs)
    for low, found in _stored(read):
        owner = read.groups.of[low : low + len(found[0])]
        for layer, norm in enumerate(found):
            counts[layer].add(norm)
            if layer:
                before, after = found[layer - 1].astype(np.float64), norm.astype(np.float64)
                real = (before > 0) & (after > 0)
                log = np.log(np.divide(after, before, out=np.ones_like(after), where=real))
                logs[:, layer] += np.bincount(owner, log, read.groups.count)
                tokens[:, layer] += np.bincount(owner, real, read.groups.count)
    growth = mean(logs, tokens, "1")
    if growth.low is None or growth.high is None:
        return counts, Measure(np.exp(growth.value), "1"), None
    return counts, growth, (np.exp(growth.low), np.exp(growth.high))


def _median(read: States, counts: Sequence[Magnitudes]) -> Measure:
    """Medians with Woodruff's interval, which a second pass over the norms finds."""
    value = np.array([each.quantile(0.5) for each in counts])
    groups = dealt(read.groups)
    if groups.count < 2:
        return Measure(value, UNIT)
    below = np.zeros((groups.count, read.n_layers))
    for low, found in _stored(read):
        owner = groups.of[low : low + len(found[0])]
        for layer, norm in enumerate(found):
            below[:, layer] += np.bincount(owner, norm <= value[layer], groups.count)
    size = np.bincount(groups.of, minlength=groups.count)[:, None]
    half = Z * standard_error((below - size * below.sum(axis=0) / len(read)) / len(read))
    ends = [[each.quantile(0.5 + sign * h) for each, h in zip(counts, half, strict=True)] for sign in (-1, 1)]
    return Measure(value, UNIT, ("layer",), *map(np.array, ends))


def _updates(read: States) -> dict[str, Measure]:
    """One pass over the states."""
    sums = np.zeros((len(UPDATES), read.groups.count, read.n_layers))
    tokens = np.zeros_like(sums)
    for piece in read.pieces():
        groups = read.groups.of[piece.low : piece.high]

        def of_layer(layer: int, states: Sequence[np.ndarray] = piece.states, owner: np.ndarray = groups) -> None:
            for number, values in enumerate(_of_rows(states[layer - 1], states[layer])):
                real = np.isfinite(values)
                sums[number, :, layer] += np.bincount(owner[real], values[real], read.groups.count)
                tokens[number, :, layer] += np.bincount(owner[real], minlength=read.groups.count)

        spread(of_layer, range(1, read.n_layers))
    return {name: mean(sums[number], tokens[number], "1") for number, name in enumerate(UPDATES)}


def _of_rows(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Those of `UPDATES` of rows (n, d), (4, n) float64; NaN where a norm of 0 leaves one undefined."""
    update = after - before

    def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.asarray(np.einsum("ij,ij->i", a, b)).astype(np.float64)

    old, new, size = (np.sqrt(dot(each, each)) for each in (before, after, update))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.stack(
            [
                dot(before, after) / (old * new),
                dot(before, update) / (old * size),
                size / np.where(new > 0, new, np.nan),
                dot(update, after) / new**2,
            ]
        )
