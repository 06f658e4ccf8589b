"""How well each layer predicts, read by a lens: loss, KL, entropy and agreement."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from actcache.clients.bootstrap import mean
from actcache.clients.evaluation import MEASURES, Prediction, by_block
from actcache.clients.lens.translators import Lens, identity
from actcache.clients.results import Results
from actcache.clients.selection import Selectable
from actcache.clients.states import Piece, States, states


def logit(ds: Selectable | States, max_tokens: int | None = None, quantised: str | None = None) -> Results:
    """The logit lens (nostalgebraist 2020): each residual state read by the final norm and unembedding.

    Returns what `evaluate` does. `quantised`, a kind (`int8`, `fp8`), reads that form of each state, which differs from the exact
    one by `ds.damage`.

    Raises:
        NotFound: the dataset has no head, or lacks, in the form asked for, a state of the residual stream.
        InvalidInput: no token has a successor.
    """
    read = states(ds, max_tokens=max_tokens, quantised=quantised)
    return evaluate(identity(read), read)


def evaluate(lens: Lens | None, ds: Selectable | States, max_tokens: int | None = None) -> Results:
    """How well each layer predicts when a lens reads it, from the first state to the last. None is the logit lens.

    Goes over every token that has a successor in its sequence, or those among the first `max_tokens`. Each measure is (layer,),
    float64: `loss`, the cross-entropy of the next token in nats; `kl`, KL(final ‖ layer) in nats; `entropy` of the layer's prediction
    in nats; `agreement`, the share of tokens whose most probable next token is the final one's. Intervals are from resampled documents.

    Raises:
        SpecMismatch: the lens is another model's.
        NotFound: the dataset has no head, or lacks a state.
        InvalidInput: no token has a successor, or what the lens reads is not what is given.
    """
    read = states(ds, offset=lens.offset if lens else 0, max_tokens=max_tokens)
    lens = identity(read) if lens is None else lens
    lens.check(read)
    sums = np.zeros((len(MEASURES), read.groups.count, read.n_layers))
    for low, found in token_measures(lens, read):
        owner = read.groups.of[low : low + found.shape[2]]
        for number in range(len(MEASURES)):
            np.add.at(sums[number], owner, found[number].T.astype(np.float64))
    counts = np.bincount(read.groups.of, minlength=read.groups.count)
    measures = {name: mean(sums[number], counts, unit) for number, (name, unit) in enumerate(MEASURES.items())}
    return Results(measures, {"layer": read.labels}, {"lens": lens.kind, **read.facts()})


def token_measures(lens: Lens, read: States) -> Iterator[tuple[int, np.ndarray]]:
    """Those of `MEASURES` of every token, some thousand tokens at a time: the first one's place, and (measure, layer, n) float32."""
    for piece in read.pieces():
        yield piece.low, _of_piece(lens, read, piece)


def _of_piece(lens: Lens, read: States, piece: Piece) -> np.ndarray:
    target = read.target[piece.low : piece.high]
    out = np.empty((len(MEASURES), read.n_layers, len(target)), np.float32)

    def measure(rows: slice) -> None:
        final = Prediction.of(read.head.logits(piece.final[rows]))
        for layer, state in enumerate(piece.states):
            exact = lens.translator(layer) is None
            found = final if exact else Prediction.of(lens.logits(read.head, layer, state[rows]))
            out[:, layer, rows] = found.measures(final, target[rows])

    by_block(len(target), read.vocabulary, measure)
    return out
