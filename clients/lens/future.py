"""What a state says about tokens further ahead than the next one: the future lens, with what it would say of nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from actcache.clients.buffered import Batch
from actcache.clients.evaluation import Prediction, by_block
from actcache.clients.field import TOKEN
from actcache.clients.lens.fitting import fit
from actcache.clients.lens.lagged import reaches
from actcache.clients.lens.sampling import Others, spaced
from actcache.clients.lens.tally import Tally
from actcache.clients.lens.translators import Lens
from actcache.clients.results import Measure, Results
from actcache.clients.selection import Selectable
from actcache.clients.states import Piece, States
from actcache.schemas.errors import InvalidInput

MAX_TOKENS = 40_000
OFFSETS = (0, 1, 2, 3)
OWN = {"loss": "nats", "kl": "nats", "agreement": "share", "accuracy": "share"}
GAINS = {
    "gain_over_first": "nats",
    "gain_over_unigram": "nats",
    "accuracy_over_first": "share",
    "accuracy_over_unigram": "share",
}
UNITS = {**OWN, **{f"{name}_shuffled": unit for name, unit in OWN.items()}, **GAINS}


def future(
    ds: Selectable | States,
    offsets: Sequence[int] = OFFSETS,
    kind: Literal["ridge", "tuned"] = "ridge",
    max_tokens: int | None = MAX_TOKENS,
    held_out: float = 0.2,
    seed: int = 0,
    **options: Any,
) -> Results:
    """What the state at token t says of token t + 1 + k, for each offset k (Pal et al. 2023, arXiv 2311.04897); 0 is the next token.

    For each offset a lens is fitted from every state at t to the final one at t + k, and tried on documents held out. All offsets look
    at the same tokens. Measures by state and offset, (layer, offset):

    - `loss` (nats) and `accuracy` (share), of the token that came; `kl` (nats) and `agreement` (share; Pal et al.'s precision@1), with
      the model's own prediction at t + k.
    - `loss_shuffled` and so on: of a lens fitted on pairs that do not belong together, each state with the final state of a random
      token. NaN for a last state that is read as it is.
    - `gain_over_first`, `accuracy_over_first`: loss of the first state less loss, accuracy less that of the first state. The embedding
      tells of the present token alone, and of its position.
    - `gain_over_unigram`, `accuracy_over_unigram`: the same over the frequencies of tokens, of which `loss_unigram` and
      `accuracy_unigram`, (offset,), are the measures themselves.

    A gain is one if both are above 0: a ridge lens is not fitted to the loss, and may do worse than frequencies.

    Args:
        ds: a dataset, tokens selected from one, or `states(…)` with offset=0.
        offsets: each at least 0.
        kind: how the lenses are fitted; `tuned` needs torch.
        max_tokens: how many tokens, of evenly spaced sequences; None for all.
        held_out: the share of tokens, in whole documents, on which everything is measured.
        seed: of the division and of the control.
        **options: others of `fit`.

    Raises:
        NotFound: the dataset has no head, or lacks a state.
        InvalidInput: no token has one so much later in its sequence, or arguments that make no sense.
        Unsupported: `tuned` without torch.
    """
    offsets = tuple(offsets)
    if not offsets or min(offsets) < 0 or len(set(offsets)) < len(offsets):
        raise InvalidInput(f"offsets={offsets}: give different numbers of tokens, each at least 0")
    read = spaced(ds, max_tokens)
    if read.offset:
        raise InvalidInput(f"the states look {read.offset} tokens ahead; give some with offset=0, and offsets=")
    last = np.flatnonzero(reaches(read, max(offsets)))
    if not len(last):
        raise InvalidInput(f"{read.ds.url}: no token has one {max(offsets)} tokens later in its sequence")
    every = read.only(last - max(offsets))
    found: list[dict[str, Measure]] = []
    unigram: list[dict[str, Measure]] = []
    for offset in offsets:
        ahead = _ahead(read, every, offset)
        fitted, held = ahead.split(held_out, seed)
        lens, null = (
            fit(each, kind, target_offset=offset, held_out=held_out, seed=seed, **options)
            for each in (ahead, _mispaired(ahead, seed))
        )
        frequent = _Unigram.of(fitted.target, read.vocabulary)
        tally = Tally(UNITS, held.groups, (read.n_layers,))
        for piece in held.pieces():
            tally.add(piece.low, _of_piece(lens, null, frequent, held, piece))
        found.append(tally.measures(("layer",)))
        unigram.append(frequent.measures(held))
    told = {name: fact for name, fact in every.facts().items() if name != "intervals"}
    facts = {"lens": kind, **told, **held.intervals, "held_out_tokens": len(held)}
    facts |= {f"held_out_{held.groups.by}s": held.groups.count, "seed": seed}
    measures = _side_by_side(found, ("layer", "offset")) | _side_by_side(unigram, ("offset",))
    return Results(measures, {"layer": read.labels, "offset": [str(offset) for offset in offsets]}, facts)


def _ahead(read: States, part: States, offset: int) -> States:
    """Some tokens of all that are read, with the prediction that is made so many tokens later."""
    later = np.searchsorted(read.token, part.token) + offset
    return replace(part, offset=offset, target=read.target[later])


@dataclass(frozen=True, eq=False, repr=False)
class _Mispaired(States):
    """States that are to be translated into the final state of a random token, of `pool` (token, d)."""

    pool: np.ndarray | None = None
    seed: int = 0

    def final(self, batch: Batch) -> np.ndarray:
        """See `States`."""
        if self.pool is None:
            raise InvalidInput("final states of random tokens were not given")
        generator = np.random.default_rng([self.seed, 2, int(batch[TOKEN][0])])
        return self.pool[generator.integers(len(self.pool), size=len(batch[TOKEN]))]


def _mispaired(read: States, seed: int) -> States:
    fields = {name: getattr(read, name) for name in States.__dataclass_fields__}
    targets = np.random.default_rng([seed, 3]).permutation(read.target)
    return _Mispaired(**{**fields, "target": targets}, pool=Others.of(read, seed).final, seed=seed)


@dataclass(frozen=True)
class _Unigram:
    """How often tokens come: logarithms of probabilities, (vocabulary,)."""

    log: np.ndarray

    @classmethod
    def of(cls, seen: np.ndarray, vocabulary: int) -> _Unigram:
        """By those seen, each counted once more than it was (Laplace)."""
        counts = np.bincount(seen, minlength=vocabulary) + 1.0
        return cls(np.log(counts / counts.sum()))

    def scores(self, target: np.ndarray) -> np.ndarray:
        """Cross-entropy, nats, and whether the most frequent token is the one that came: (2, n)."""
        return np.stack([-self.log[target], target == self.log.argmax()])

    def measures(self, read: States) -> dict[str, Measure]:
        """Their means over some tokens."""
        tally = Tally({"loss_unigram": "nats", "accuracy_unigram": "share"}, read.groups, ())
        tally.add(0, self.scores(read.target))
        return tally.measures(())


def _of_piece(lens: Lens, null: Lens, frequent: _Unigram, read: States, piece: Piece) -> np.ndarray:
    """Those of `UNITS` of held-out tokens, (measure, layer, n) float32."""
    target = read.target[piece.low : piece.high]
    out = np.empty((len(UNITS), read.n_layers, len(target)), np.float32)

    def measure(rows: slice) -> None:
        final = Prediction.of(read.head.logits(piece.final[rows]))
        for layer, state in enumerate(piece.states):
            out[: len(OWN), layer, rows] = _own(lens, read, layer, state[rows], final, target[rows])
            if lens.translator(layer) is None:
                out[len(OWN) : 2 * len(OWN), layer, rows] = np.nan
            else:
                out[len(OWN) : 2 * len(OWN), layer, rows] = _own(null, read, layer, state[rows], final, target[rows])
        loss, accuracy = (out[list(OWN).index(name), :, rows] for name in ("loss", "accuracy"))
        by_count, right = frequent.scores(target[rows])
        out[-len(GAINS) :, :, rows] = loss[0] - loss, by_count - loss, accuracy - accuracy[0], accuracy - right

    by_block(len(target), read.vocabulary, measure)
    return out


def _own(lens: Lens, read: States, layer: int, h: np.ndarray, final: Prediction, target: np.ndarray) -> np.ndarray:
    """Those of `OWN` of a lens, (measure, n)."""
    found = Prediction.of(lens.logits(read.head, layer, h))
    best = found.best
    return np.stack([found.loss(target), final.kl(found), best == final.best, best == target])


def _side_by_side(found: Sequence[dict[str, Measure]], axes: tuple[str, ...]) -> dict[str, Measure]:
    """The measures of each offset along a last axis."""

    def joined(ends: Sequence[np.ndarray | None]) -> np.ndarray | None:
        there = [end for end in ends if end is not None]
        return np.stack(there, axis=-1) if len(there) == len(ends) else None

    return {
        name: Measure(
            np.stack([each[name].value for each in found], axis=-1),
            first.unit,
            axes,
            joined([each[name].low for each in found]),
            joined([each[name].high for each in found]),
        )
        for name, first in found[0].items()
    }
