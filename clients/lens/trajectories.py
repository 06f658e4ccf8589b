"""How the prediction changes from layer to layer: prediction depth, and what the token that came is given on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from actcache.clients.bootstrap import Groups, mean
from actcache.clients.evaluation import Prediction, by_block
from actcache.clients.lens.sampling import Others, spaced
from actcache.clients.lens.tally import Tally
from actcache.clients.lens.translators import Lens, identity
from actcache.clients.results import Measure, Results
from actcache.clients.selection import Selectable
from actcache.clients.states import States
from actcache.schemas.errors import InvalidInput

MAX_TOKENS = 20_000
QUANTILES = 4
UNITS = {"target_probability": "1", "target_rank": "rank", "target_reciprocal_rank": "1"}


@dataclass(frozen=True, repr=False, kw_only=True)
class Trajectories(Results):
    """Results, and what each token's trajectory is.

    Attributes:
        token: places on the token axis, (token,) int64.
        depth: prediction depth of each, (token,) int64: the number of a state, 0 being the first.
        loss: cross-entropy of the final prediction, (token,) float32, nats.
    """

    token: np.ndarray
    depth: np.ndarray
    loss: np.ndarray


def trajectories(
    lens: Lens, ds: Selectable | States, max_tokens: int | None = MAX_TOKENS, seed: int = 0
) -> Trajectories:
    """From which layer on each token's most probable next token is the final one.

    The prediction depth of a token is the first state from which on every state, read by the lens, has the final state's most probable
    token (Baldock et al. 2021, arXiv 2106.09647, of classifiers; Belrose et al. 2023, arXiv 2303.08112, of language models). 0 is the
    first state; the number of the last one says that only it has it.

    Measures by state (layer): `share`, of the tokens whose depth it is; `target_probability`, `target_rank` (1 is the most probable;
    the most probable tokens of a tie have the same) and `target_reciprocal_rank`, means of what the lens gives the token that came.
    `depth` is the mean; `depth_by_loss` that of each quarter of the tokens by loss of the final prediction.

    Control: `share_shuffled`, `depth_shuffled` and `depth_by_loss_shuffled` are of trajectories whose state at each layer but the last
    is that of a random token of another document, another one at each layer: as deep as the agreement by chance makes them.

    Args:
        lens: what reads the states, or None for the logit lens.
        ds: a dataset, tokens selected from one, or `states(…)`.
        max_tokens: how many tokens, of evenly spaced sequences; None for all.
        seed: of the control.

    Raises:
        SpecMismatch: the lens is another model's.
        NotFound: the dataset has no head, or lacks a state.
        InvalidInput: no token has a successor; a lens that looks ahead; what the lens reads is not what is given.
    """
    if lens is not None and lens.offset:
        raise InvalidInput(f"the lens looks {lens.offset} tokens ahead; prediction depth asks for one with offset=0")
    read = spaced(ds, max_tokens)
    lens = identity(read) if lens is None else lens
    lens.check(read)
    others = Others.of(read, seed)
    chance = _best(lens, others.read, others.states)
    groups, n = read.groups, len(read)
    depth, shuffled, loss = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.float32)
    tally = Tally(UNITS, groups, (read.n_layers,))
    for piece in read.pieces():
        here = slice(piece.low, piece.high)
        best, ways, loss[here] = _of_piece(lens, read, piece.states, read.target[here])
        tally.add(piece.low, ways)
        depth[here] = depths(best)
        generator = np.random.default_rng([seed, 2, piece.low])
        mixed = [found[others.draw(groups.of[here], generator)] for found in chance[:-1]]
        shuffled[here] = depths(np.stack([*mixed, best[-1]]))
    edges = np.quantile(loss, np.linspace(0, 1, QUANTILES + 1))
    quarter = np.clip(np.searchsorted(edges[1:-1], loss, side="right"), 0, QUANTILES - 1)
    measures: dict[str, Measure] = {}
    for suffix, found in (("", depth), ("_shuffled", shuffled)):
        measures[f"share{suffix}"] = _shares(groups, found, read.n_layers)
        measures[f"depth{suffix}"] = mean(groups.sums(found), _counts(groups), "layers", ())
        measures[f"depth_by_loss{suffix}"] = _by_quantile(groups, found, quarter)
    labels: dict[str, Sequence[str]] = {
        "layer": read.labels,
        "loss": [f"{low:.2f}–{high:.2f} nats" for low, high in pairwise(edges)],
    }
    facts = {"lens": lens.kind, **read.facts(), "seed": seed}
    return Trajectories(measures | tally.measures(("layer",)), labels, facts, token=read.token, depth=depth, loss=loss)


def depths(best: np.ndarray) -> np.ndarray:
    """Prediction depth (token,) of the most probable ids by layer, (layer, token): from there on all are the last one's."""
    settled = np.logical_and.accumulate(best[::-1] == best[-1])
    return np.asarray(len(best) - settled.sum(axis=0))


def _of_piece(
    lens: Lens, read: States, held: Sequence[np.ndarray], target: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of tokens: the most probable ids (layer, n), those of `UNITS` (measure, layer, n), and the final loss (n,)."""
    n = len(target)
    best = np.empty((read.n_layers, n), np.int64)
    ways = np.empty((len(UNITS), read.n_layers, n), np.float32)
    loss = np.empty(n, np.float32)

    def look(rows: slice) -> None:
        at = np.arange(rows.stop - rows.start), target[rows]
        for layer, state in enumerate(held):
            found = Prediction.of(lens.logits(read.head, layer, state[rows]))
            rank = 1 + (found.log > found.log[at][:, None]).sum(axis=1)
            best[layer, rows] = found.best
            ways[:, layer, rows] = found.probability[at], rank, 1 / rank
        loss[rows] = found.loss(target[rows])

    by_block(n, read.vocabulary, look)
    return best, ways, loss


def _best(lens: Lens, read: States, held: np.ndarray) -> np.ndarray:
    """The most probable ids, (layer, token), of states (layer, token, d)."""
    best = np.empty(held.shape[:2], np.int64)

    def look(rows: slice) -> None:
        for layer, state in enumerate(held):
            best[layer, rows] = lens.logits(read.head, layer, state[rows]).argmax(axis=-1)

    by_block(held.shape[1], read.vocabulary, look)
    return best


def _counts(groups: Groups) -> np.ndarray:
    return np.bincount(groups.of, minlength=groups.count)


def _shares(groups: Groups, depth: np.ndarray, layers: int) -> Measure:
    """Which share of the tokens has each depth."""
    sums = np.bincount(groups.of * layers + depth, minlength=groups.count * layers).reshape(groups.count, layers)
    return mean(sums.astype(np.float64), _counts(groups), "share")


def _by_quantile(groups: Groups, depth: np.ndarray, quantile: np.ndarray) -> Measure:
    """The mean depth in each quantile."""
    at, size = groups.of * QUANTILES + quantile, groups.count * QUANTILES
    sums, counts = np.bincount(at, depth, size), np.bincount(at, minlength=size)
    return mean(sums.reshape(-1, QUANTILES), counts.reshape(-1, QUANTILES), "layers", ("loss",))
