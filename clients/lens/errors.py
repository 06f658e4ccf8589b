"""Whether blocks write the prediction errors of earlier tokens: how well these predict an update, linearly, and what else does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from threadpoolctl import threadpool_limits

from actcache.cache.threads import spread
from actcache.clients.bootstrap import mean
from actcache.clients.lens.lagged import (
    CAME,
    CURRENT,
    EARLIER,
    ERROR,
    EXPECTED,
    PREDICTORS,
    SHUFFLED,
    TOLD,
    Window,
    reaches,
    windows,
)
from actcache.clients.lens.regression import Fit, Moments, ridge
from actcache.clients.lens.sampling import spaced
from actcache.clients.lens.translators import Lens, identity
from actcache.clients.results import Measure, Results
from actcache.clients.selection import Selectable
from actcache.clients.states import States
from actcache.schemas.errors import InvalidInput

MAX_TOKENS = 40_000
LAGS = (1, 2, 4, 8)
MOMENT_BYTES = 512 << 20
"""Sums of products that are held at once: beyond that, the data is gone over again for other blocks and lags."""
STATES = (EARLIER, CAME, CURRENT)
REGRESSIONS = {
    "errors": (ERROR,),
    "errors_shuffled": (SHUFFLED,),
    "earlier_state": (EARLIER,),
    "states": STATES,
    "states_and_errors": (*STATES, ERROR),
    "states_and_expected": (*STATES, EXPECTED),
    "states_and_told": (*STATES, TOLD),
    "states_and_shuffled": (*STATES, SHUFFLED),
}
INCREMENTS = {
    "increment": "states_and_errors",
    "increment_expected": "states_and_expected",
    "increment_told": "states_and_told",
    "increment_shuffled": "states_and_shuffled",
}

Pair = tuple[int, int]
"""A block and a lag."""


def error_prediction(
    lens: Lens,
    ds: Selectable | States,
    lags: Sequence[int] = LAGS,
    max_tokens: int | None = MAX_TOKENS,
    held_out: float = 0.2,
    seed: int = 0,
) -> Results:
    """How well the update of a block at token t is predicted, linearly, from the prediction error at token t - k.

    In predictive coding (Rao & Ballard 1999; Millidge et al. 2021, arXiv 2107.12979) what is passed on is prediction errors. The error
    at a token, in the block's own input state h, is e = ∇_h CE(next token, q) = J^T (q - onehot(next token)), with q = lens(h) and J the
    Jacobian of the logits, (d,). e at t - k is about token t - k + 1, which is known at t. Both tokens are of one sequence.

    Each measure is a share of the variance of Δh, (block, lag): R² on documents that the ridge regression was not fitted on,
    1 - Σ|Δh - prediction|² / Σ|Δh - mean|², summed over dimensions; below 0 where it predicts worse than the mean does.

    - `errors`: from e at t - k. `errors_shuffled`: from e at a random token of another document, whose R² is 0 but for what fitting costs.
    - `earlier_state`: from h at t - k.
    - `states`: from h at t - k, which made the prediction; at t - k + 1, the token that came; and at t, where the update is made.
    - `increment`: what e adds to these: e holds the identity of a token, and so do states. `increment_shuffled`: what a random e adds.
      `increment_expected`: what J^T q adds, which is a prediction and no error, but as little linear in the state. `increment_told`:
      what J^T onehot(next token) adds, which is what came, whether or not it was predicted.
    - `excess`: `increment` less the largest of these three, in each block and lag: the number to read.

    Args:
        lens: what reads the states, or None for the logit lens.
        ds: a dataset, tokens selected from one, or `states(…)`.
        lags: how many tokens earlier, each at least 1.
        max_tokens: how many tokens, of evenly spaced sequences; None for all.
        held_out: share of the tokens, of whole documents, on which R² is measured.
        seed: of the division and of the control.

    Raises:
        SpecMismatch: the lens is another model's.
        NotFound: the dataset has no head, or lacks a state.
        InvalidInput: no token has a successor; what the lens reads is not what is given; a lag without two tokens so far apart.
    """
    lags = tuple(lags)
    if not lags or min(lags) < 1 or len(set(lags)) < len(lags):
        raise InvalidInput(f"lags={lags}: give different numbers of tokens, each at least 1")
    if lens is not None and lens.offset:
        raise InvalidInput(f"the lens looks {lens.offset} tokens ahead; errors at the next token ask for offset=0")
    read = spaced(ds, max_tokens)
    lens = identity(read) if lens is None else lens
    lens.check(read)
    fitted, held = read.split(held_out, seed)
    for name, part in (("to fit on", fitted), ("held out", held)):
        for lag in lags:
            if not reaches(part, lag).any():
                raise InvalidInput(f"{read.ds.url}: no two tokens {lag} apart are in one sequence of the part {name}")
    pairs = [(block, lag) for block in range(read.n_layers - 1) for lag in lags]
    shape = (held.groups.count, read.n_layers - 1, len(lags))
    explained = {name: np.zeros((held.groups.count, len(pairs))) for name in REGRESSIONS}
    total = np.zeros((held.groups.count, len(pairs)))
    for some in _at_once(pairs, read.width):
        fits = _fit(lens, fitted, some, seed)
        for pair, gained, around in _squares(lens, held, fits, seed):
            number = pairs.index(pair)
            total[:, number] += around
            for name, sums in gained.items():
                explained[name][:, number] += sums
    measures = _measures({name: found.reshape(shape) for name, found in explained.items()}, total.reshape(shape))
    told = {name: fact for name, fact in read.facts().items() if name != "intervals"}
    facts = {"lens": lens.kind, **told, **held.intervals, "held_out_tokens": len(held)}
    facts |= {f"held_out_{held.groups.by}s": held.groups.count, "seed": seed}
    return Results(measures, {"block": read.labels[1:], "lag": [str(lag) for lag in lags]}, facts)


def _at_once(pairs: Sequence[Pair], width: int) -> Iterator[Sequence[Pair]]:
    """The pairs whose sums of products fit the memory together."""
    number = max(1, MOMENT_BYTES // (8 * PREDICTORS * (PREDICTORS + 1) * width**2))
    for first in range(0, len(pairs), number):
        yield pairs[first : first + number]


def _fit(lens: Lens, read: States, pairs: Sequence[Pair], seed: int) -> dict[Pair, dict[str, Fit]]:
    """The regressions of each pair, in one pass."""
    moments = {pair: Moments.empty(PREDICTORS * read.width, read.width) for pair in pairs}
    for window in windows(lens, read, *_blocks_and_lags(pairs), seed):

        def count(pair: Pair, window: Window = window) -> None:
            rows = window.rows(*pair)
            moments[pair].add(rows.x, rows.y)

        _spread(count, pairs)
    found: dict[Pair, dict[str, Fit]] = {}

    def solve(pair: Pair) -> None:
        found[pair] = {
            name: ridge(moments[pair], _columns(which, pair[1], read.width)) for name, which in REGRESSIONS.items()
        }

    _spread(solve, pairs)
    return found


def _squares(
    lens: Lens, read: States, fits: dict[Pair, dict[str, Fit]], seed: int
) -> Iterator[tuple[Pair, dict[str, np.ndarray], np.ndarray]]:
    """By pair and piece: how much of the sum of squares around the mean each regression explains, by document, and that sum."""
    pairs = list(fits)
    for window in windows(lens, read, *_blocks_and_lags(pairs), seed):
        found: dict[Pair, tuple[dict[str, np.ndarray], np.ndarray]] = {}

        def measure(
            pair: Pair, window: Window = window, found: dict[Pair, tuple[dict[str, np.ndarray], np.ndarray]] = found
        ) -> None:
            rows = window.rows(*pair)
            around = _by_document(rows.y - fits[pair]["errors"].mean, rows.document, read.groups.count)
            gained = {
                name: around - _by_document(rows.y - fit.predict(rows.x), rows.document, read.groups.count)
                for name, fit in fits[pair].items()
            }
            found[pair] = gained, around

        _spread(measure, pairs)
        for pair, (gained, around) in found.items():
            yield pair, gained, around


def _measures(explained: dict[str, np.ndarray], total: np.ndarray) -> dict[str, Measure]:
    """R² of each regression and the increments, from sums of squares by document, (document, block, lag)."""
    sums = {name: found for name, found in explained.items() if name not in INCREMENTS.values()}
    sums |= {name: explained[more] - explained["states"] for name, more in INCREMENTS.items()}
    controls = np.stack([sums[name] for name in INCREMENTS if name != "increment"])
    largest = controls.sum(axis=1).argmax(axis=0)
    sums["excess"] = sums["increment"] - np.take_along_axis(controls, largest[None, None], 0)[0]
    return {name: mean(found, total, "share", ("block", "lag")) for name, found in sums.items()}


def _by_document(rest: np.ndarray, document: np.ndarray, count: int) -> np.ndarray:
    """Sums of squares of rows (n, d) by document, (document,) float64."""
    return np.bincount(document, np.square(rest).sum(axis=1, dtype=np.float64), count)


def _columns(which: Sequence[int], lag: int, width: int) -> np.ndarray:
    """The columns of some predictors. At lag 1 the token that came is the current one, and counts once."""
    return np.concatenate(
        [np.arange(part * width, (part + 1) * width) for part in which if not (lag == 1 and part == CURRENT)]
    )


def _blocks_and_lags(pairs: Sequence[Pair]) -> tuple[list[int], list[int]]:
    return sorted({block for block, _ in pairs}), sorted({lag for _, lag in pairs})


def _spread(work: Callable[[Pair], object], pairs: Sequence[Pair]) -> None:
    """Work on all cores, each with one thread of BLAS."""
    with threadpool_limits(1, user_api="blas"):
        spread(work, pairs)
