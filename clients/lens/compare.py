"""Two lenses on the same tokens."""

from __future__ import annotations

import numpy as np

from actcache.clients.bootstrap import mean
from actcache.clients.evaluation import Prediction, by_block
from actcache.clients.lens.transfer import add_bits_per_byte
from actcache.clients.lens.translators import Lens, identity
from actcache.clients.results import Results
from actcache.clients.selection import Selectable
from actcache.clients.states import Piece, States, states
from actcache.schemas.errors import InvalidInput

MEASURES = ("loss_difference", "kl_difference")


def compare(
    a: Lens | None,
    b: Lens | None,
    ds: Selectable | States,
    max_tokens: int | None = None,
    quantised: str | None = None,
) -> Results:
    """How much worse lens a reads each layer than lens b, on the same tokens.

    Measures, (layer,) float64: `loss_difference`, the cross-entropy of the next token by a less that by b, in nats, and
    `loss_difference_bits_per_byte` where the dataset has a tokenizer; `kl_difference`, the same of KL(final ‖ layer), in nats. Intervals
    are paired: from resampled documents, in which both lenses' numbers come together. With one shared translator as a and a translator a
    layer as b it is what sharing costs.

    Args:
        a: a lens, or None for the logit lens.
        b: another one, that looks equally far ahead.
        ds: a dataset, a selection, or states.
        max_tokens: how many tokens to look at, the first of them.
        quantised: a kind (`int8`, `fp8`) to read each state in.

    Raises:
        SpecMismatch: a lens is another model's.
        NotFound: the dataset has no head, or lacks a state.
        InvalidInput: the lenses look at different distances, no token has a successor, or what a lens reads is not what is given.
    """
    given = [lens.offset for lens in (a, b) if lens is not None]
    if len(set(given)) > 1:
        raise InvalidInput(
            f"one lens looks {given[0]} tokens ahead and the other {given[1]}: they are measured against different predictions"
        )
    read = states(ds, offset=given[0] if given else 0, max_tokens=max_tokens, quantised=quantised)
    pair = tuple(identity(read) if lens is None else lens for lens in (a, b))
    for lens in pair:
        lens.check(read)
    sums = np.zeros((len(MEASURES), read.groups.count, read.n_layers))
    for piece in read.pieces():
        found = _of_piece(pair, read, piece)
        owner = read.groups.of[piece.low : piece.high]
        for number in range(len(MEASURES)):
            np.add.at(sums[number], owner, found[number].T.astype(np.float64))
    counts = np.bincount(read.groups.of, minlength=read.groups.count)
    measures = {name: mean(sums[number], counts, "nats") for number, name in enumerate(MEASURES)}
    facts = {"a": _named(pair[0]), "b": _named(pair[1]), **read.facts()}
    facts |= add_bits_per_byte(measures, {MEASURES[0]: sums[0]}, read)
    return Results(measures, {"layer": read.labels}, facts)


def _of_piece(pair: tuple[Lens, ...], read: States, piece: Piece) -> np.ndarray:
    """Loss and KL of the first lens less those of the second, (measure, layer, n) float32. Where both read a state as it is, 0."""
    target = read.target[piece.low : piece.high]
    out = np.zeros((len(MEASURES), read.n_layers, len(target)), np.float32)

    def measure(rows: slice) -> None:
        final = Prediction.of(read.head.logits(piece.final[rows]))
        for layer, state in enumerate(piece.states):
            if all(lens.translator(layer) is None for lens in pair):
                continue
            first, second = (Prediction.of(lens.logits(read.head, layer, state[rows])) for lens in pair)
            out[0, layer, rows] = first.loss(target[rows]) - second.loss(target[rows])
            out[1, layer, rows] = final.kl(first) - final.kl(second)

    by_block(len(target), read.vocabulary, measure)
    return out


def _named(lens: Lens) -> str:
    return f"{lens.kind}, shared" if lens.shared else lens.kind
