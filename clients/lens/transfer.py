"""How well the lens of one layer reads another: transfer penalties (Belrose et al. 2023, arXiv 2303.08112, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from actcache.clients.bootstrap import mean
from actcache.clients.evaluation import by_block, cross_entropy
from actcache.clients.lens.sampling import spaced
from actcache.clients.lens.translators import Lens, identity
from actcache.clients.lens.units import NATS_PER_BIT, UNIT, target_bytes
from actcache.clients.results import Measure, Results
from actcache.clients.selection import Selectable
from actcache.clients.states import Piece, States

MAX_TOKENS = 8192
"""How many tokens are read unless a number is given: each takes as many evaluations of the head as there are pairs of layers."""

AXES = ("lens", "layer")


def transfer(
    lens: Lens | None,
    ds: Selectable | States,
    max_tokens: int | None = MAX_TOKENS,
    quantised: str | None = None,
) -> Results:
    """What it costs to read each layer by the lens of each other one.

    Measures, (lens, layer) float64, for translator i on the state of layer j:

    - `loss`: its cross-entropy of the next token, in nats.
    - `penalty`: `loss[i, j] - loss[j, j]`, in nats: what is lost against the layer's own translator. 0 on the diagonal.
    - `penalty_bits_per_byte`: the same in bits for each byte of the text that is predicted, where the dataset has a tokenizer; see
      `facts` where it is missing. BOS and EOS have no bytes.

    The last layer's own translator is to read the state as it is, unless the lens looks ahead; that row is the logit lens. Rows of a
    shared translator are equal. Intervals are from resampled documents, in which both losses of a penalty come together.

    Args:
        lens: a lens, or None for the logit lens, whose rows are all equal.
        ds: a dataset, a selection, or states.
        max_tokens: about how many tokens to look at, in whole sequences that are evenly spaced; None for all. States are taken as they
            are.
        quantised: a kind (`int8`, `fp8`) to read each state in.

    Raises:
        SpecMismatch: the lens is another model's.
        NotFound: the dataset has no head, or lacks a state.
        InvalidInput: no token has a successor, or what the lens reads is not what is given.
    """
    read = spaced(ds, max_tokens, lens.offset if lens else 0, quantised)
    lens = identity(read) if lens is None else lens
    lens.check(read)
    distinct, row = distinct_translators(lens)
    sums = np.zeros((read.groups.count, len(distinct), read.n_layers))
    for piece in read.pieces():
        found = _of_piece(lens, distinct, read, piece)
        np.add.at(sums, read.groups.of[piece.low : piece.high], found.transpose(2, 0, 1).astype(np.float64))
    loss = sums[:, row]
    own = np.arange(read.n_layers)
    penalty = loss - loss[:, own, own][:, None, :]
    counts = np.bincount(read.groups.of, minlength=read.groups.count)
    measures = {"loss": mean(loss, counts, "nats", AXES), "penalty": mean(penalty, counts, "nats", AXES)}
    facts = {"lens": lens.kind, **read.facts()}
    if not isinstance(ds, States):
        facts["max_tokens"] = max_tokens
    facts |= add_bits_per_byte(measures, {"penalty": penalty}, read)
    return Results(measures, {"lens": read.labels, "layer": read.labels}, facts)


def add_bits_per_byte(measures: dict[str, Measure], sums: dict[str, np.ndarray], read: States) -> dict[str, str]:
    """Add measures in bits per byte, of sums in nats (group, …) by name; or tell, as a fact, why there are none."""
    counts = target_bytes(read)
    if isinstance(counts, str):
        return {"bits_per_byte": f"none: {counts}"}
    in_group = np.bincount(read.groups.of, counts, minlength=read.groups.count)
    for name, nats in sums.items():
        measures[f"{name}_bits_per_byte"] = mean(nats / NATS_PER_BIT, in_group, UNIT, measures[name].axes)
    return {}


def distinct_translators(lens: Lens) -> tuple[list[int], list[int]]:
    """Layers whose translators differ, and for each layer which of these has its own. All that change nothing are one."""
    first: dict[int | None, int] = {}
    row = []
    for layer in range(len(lens.sites)):
        number = lens.translator(layer)
        if number is not None and not (lens.weight[number].any() or lens.bias[number].any()):
            number = None
        first.setdefault(number, layer)
        row.append(list(first).index(number))
    return list(first.values()), row


def _of_piece(lens: Lens, distinct: Sequence[int], read: States, piece: Piece) -> np.ndarray:
    """Cross-entropies (translator, layer, n) float32."""
    target = read.target[piece.low : piece.high]
    out = np.empty((len(distinct), read.n_layers, len(target)), np.float32)

    def measure(rows: slice) -> None:
        for layer, state in enumerate(piece.states):
            for number, reader in enumerate(distinct):
                logits = lens.logits(read.head, reader, state[rows])
                out[number, layer, rows] = cross_entropy(logits, target[rows])

    by_block(len(target), read.vocabulary, measure)
    return out
