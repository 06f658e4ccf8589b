"""Massive activations: the few values that are thousands of times as large as the others of their layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from actcache.clients.geometry.candidates import Occurrences, occurrences
from actcache.clients.geometry.reading import UNIT, layers
from actcache.clients.results import Measure, Results
from actcache.clients.selection import Selectable
from actcache.clients.states import States, values_at
from actcache.schemas.errors import InvalidInput, NotFound, Unsupported

MOST_LISTED = 10
"""Dimensions, positions and tokens that are told apart, the most frequent."""


def massive(
    ds: Selectable | States,
    *,
    sites: Sequence[str] | None = None,
    max_tokens: int | None = None,
    absolute: float = 100.0,
    ratio: float = 1000.0,
    quantised: str | None = None,
) -> Results:
    """Which activations are massive (Sun et al. 2024, arXiv 2402.17762).

    One is, if its magnitude is larger than `absolute`, and than `ratio` times the median magnitude of its layer; the paper's thresholds
    are 100 and about 1000. The median is over all dimensions of all tokens that are read, from a histogram of float32's exponents and
    first 7 bits of the fraction, exact but for a relative 2^-7. Values are held against half the threshold while it is still being
    found, so that one pass is enough; where the median falls to less than half of what it was on the way, another follows (the fact
    `passes`).

    By layer, whether or not anything is massive: `median`, the median magnitude; `largest`, the largest magnitude; `largest_ratio`, the
    second over the first; `largest_dimension`, where that is; `tokens`, those with a massive activation.

    By dimension that has any, at most ten, the most frequent: `count` (layer, dimension), tokens; `value`, their mean, signed;
    `norm_share`, the mean share of the squared norm of their states (the last two NaN where there is none); `first_layer` and
    `last_layer` (dimension,), indices of the layers where it appears and is last seen. `at_position` (dimension, position) and
    `at_token` (dimension, token) count the tokens with it at the ten most frequent positions in the sequence and token ids, and
    `read_position`, `read_token` how many such tokens were read at all. `at_token` is there only if the dataset has token ids.

    Where nothing is massive these have no dimensions, and the fact `massive` is 0.

    Raises:
        NotFound: a site that is not stored, in the form asked for.
        InvalidInput: thresholds that are not above 0, or so low that more than ten million values are above them.
    """
    for name, threshold in (("absolute", absolute), ("ratio", ratio)):
        if not (np.isfinite(threshold) and threshold > 0):
            raise InvalidInput(f"{name}={threshold}: give a threshold above 0")
    read = layers(ds, sites, max_tokens, quantised)
    found = occurrences(read, absolute, ratio)
    dimensions = _frequent(found.dimension)
    labels: dict[str, Sequence[str]] = {"layer": read.labels, "dimension": [str(d) for d in dimensions]}
    measures = {**_by_layer(read, found), **_by_dimension(read, found, dimensions)}
    for name, (shown, at, of) in _by_place(read, found, dimensions).items():
        labels[name] = shown
        measures[f"at_{name}"] = Measure(at, "tokens", ("dimension", name))
        measures[f"read_{name}"] = Measure(of, "tokens", (name,))
    facts = {
        **read.facts(),
        "massive": len(found.token),
        "dimensions": len(np.unique(found.dimension)),
        "absolute": float(absolute),
        "ratio": float(ratio),
        "passes": found.passes,
    }
    return Results(measures, labels, facts)


def _frequent(values: np.ndarray) -> np.ndarray:
    """The most frequent values, the most frequent first."""
    kept, count = np.unique(values, return_counts=True)
    return np.asarray(kept[np.argsort(-count, kind="stable")][:MOST_LISTED])


def _by_layer(read: States, found: Occurrences) -> dict[str, Measure]:
    tokens = [len(np.unique(found.token[found.layer == layer])) for layer in range(read.n_layers)]
    return {
        "median": Measure(found.median, UNIT),
        "largest": Measure(found.largest, UNIT),
        "largest_ratio": Measure(found.largest / np.where(found.median > 0, found.median, np.nan), "1"),
        "largest_dimension": Measure(found.largest_dimension, "dimension"),
        "tokens": Measure(np.array(tokens), "tokens"),
    }


def _by_dimension(read: States, found: Occurrences, dimensions: np.ndarray) -> dict[str, Measure]:
    shape = (read.n_layers, len(dimensions))
    count, value, share = np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape)
    for place, dimension in enumerate(dimensions):
        here = found.dimension == dimension
        count[:, place] = np.bincount(found.layer[here], minlength=read.n_layers)
        value[:, place] = np.bincount(found.layer[here], found.value[here], read.n_layers)
        share[:, place] = np.bincount(found.layer[here], found.norm_share[here], read.n_layers)
    some = np.where(count > 0, count, np.nan)
    axes, there = ("layer", "dimension"), count > 0
    return {
        "count": Measure(count, "tokens", axes),
        "value": Measure(value / some, UNIT, axes),
        "norm_share": Measure(share / some, "share", axes),
        "first_layer": Measure(there.argmax(axis=0), "layer", ("dimension",)),
        "last_layer": Measure(read.n_layers - 1 - there[::-1].argmax(axis=0), "layer", ("dimension",)),
    }


def _by_place(
    read: States, found: Occurrences, dimensions: np.ndarray
) -> dict[str, tuple[list[str], np.ndarray, np.ndarray]]:
    """By position and by token id: names, the tokens with each massive dimension (dimension, place), and those read (place,)."""
    whole = read.ds
    tables = {}
    for name, field in (("position", "position"), ("token", "token_id")):
        try:
            of_all = values_at(whole, field, read.token).astype(np.int64)
        except NotFound:
            continue
        of_massive = of_all[np.searchsorted(read.token, np.unique(found.token))]
        places = _frequent(of_massive)
        at = np.zeros((len(dimensions), len(places)), np.int64)
        for row, dimension in enumerate(dimensions):
            tokens = np.unique(found.token[found.dimension == dimension])
            at[row] = (of_all[np.searchsorted(read.token, tokens)][:, None] == places).sum(axis=0)
        of = np.array([np.count_nonzero(of_all == place) for place in places], np.int64)
        tables[name] = (_strings(read, places) if name == "token" else [str(p) for p in places], at, of)
    return tables


def _strings(read: States, ids: np.ndarray) -> list[str]:
    """Token ids as text, quoted, where the dataset has a tokenizer that can be used; else the ids."""
    try:
        texts = read.ds.tokenizer.strings(ids)
    except (NotFound, Unsupported):
        return [str(number) for number in ids]
    return [f"{number} {text!r}" for number, text in zip(ids, texts, strict=True)]
