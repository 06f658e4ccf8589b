"""Whether a block moves the state as gradient descent would: its update against the gradient of the loss there."""

from __future__ import annotations

import numpy as np

from actcache.clients.covariance import centres
from actcache.clients.evaluation import Prediction, by_block
from actcache.clients.lens.gradient import of_losses
from actcache.clients.lens.sampling import Others, spaced
from actcache.clients.lens.tally import Tally
from actcache.clients.lens.translators import Lens, identity
from actcache.clients.results import Results
from actcache.clients.selection import Selectable
from actcache.clients.states import Piece, States

MAX_TOKENS = 20_000
UNITS = {
    "cosine": "1",
    "cosine_permuted": "1",
    "excess": "1",
    "cosine_other_target": "1",
    "excess_target": "1",
    "cosine_centred": "1",
    "cosine_random": "1",
    "cosine_kl": "1",
    "cosine_kl_permuted": "1",
    "predicted_decrease": "nats",
    "decrease": "nats",
    "decrease_next_lens": "nats",
}


def alignment(
    lens: Lens | None, ds: Selectable | States, max_tokens: int | None = MAX_TOKENS, seed: int = 0
) -> Results:
    """The cosine between what each block adds to a state h and the direction in which the loss falls fastest there.

    With Δh = h_{l+1} - h_l, q_l = softmax(head(lens_l(h_l))) and g = ∇_h CE(next token, q_l) at h_l, the cosine of Δh and -g, of each
    token, averaged (Jastrzębski et al. 2018, arXiv 1710.04773, eq. 4 and fig. 3, of ResNets). The gradient is analytic, through the
    head and the lens. Every measure is by block, labelled by the state after it:

    - `cosine`: of Δh and -g; `cosine_permuted`: of the Δh of a random token of another document and the same -g; what is left of the
      cosine there is of the mean update and the mean gradient alone. `excess`: the first less the second: the update fits its token.
    - `cosine_other_target`: of Δh and -g as it would be if what came had been what came after that other token. What is left there
      leads away from q, wherever to. `excess_target`: the first less this: the update leads to the token that came.
    - `cosine_centred`: of Δh less its mean over the whole dataset and -g.
    - `cosine_random`: of a random direction and -g: 0, with a standard deviation of 1/√d a token (`random_sd` among the facts).
    - `cosine_kl`, `cosine_kl_permuted`: the same with the gradient of KL(final ‖ q_l). Δh is part of the final state, so that this one
      is above its control also when blocks do nothing but add up.
    - `predicted_decrease`: -g·Δh, what the loss would fall by to first order; `decrease`: what it falls by,
      CE(lens_l(h_l)) - CE(lens_l(h_{l+1})); `decrease_next_lens`: with h_{l+1} read by its own translator, which is the same for the
      logit lens.

    A token whose update or gradient is 0 has no cosine and is not counted.

    Args:
        lens: what reads the states, or None for the logit lens.
        ds: a dataset, tokens selected from one, or `states(…)`.
        max_tokens: how many tokens, of evenly spaced sequences; None for all.
        seed: of the controls.

    Raises:
        SpecMismatch: the lens is another model's.
        NotFound: the dataset has no head, or lacks a state.
        InvalidInput: no token has a successor, or what the lens reads is not what is given.
    """
    read = spaced(ds, max_tokens, lens.offset if lens else 0)
    lens = identity(read) if lens is None else lens
    lens.check(read)
    others = Others.of(read, seed)
    middle = np.diff(np.stack(centres(read)), axis=0)
    tally = Tally(UNITS, read.groups, (read.n_layers - 1,))
    for piece in read.pieces():
        tally.add(piece.low, _of_piece(lens, read, piece, others, middle, seed))
    facts = {"lens": lens.kind, **read.facts(), "random_sd": read.width**-0.5, "seed": seed}
    return Results(tally.measures(("block",)), {"block": read.labels[1:]}, facts)


def _of_piece(lens: Lens, read: States, piece: Piece, others: Others, middle: np.ndarray, seed: int) -> np.ndarray:
    """Those of `UNITS` of the tokens of a piece, (measure, block, n) float32. `middle` are the mean updates, (block, d)."""
    target = read.target[piece.low : piece.high]
    document = read.groups.of[piece.low : piece.high]
    drawn = others.draw(document, np.random.default_rng([seed, 2, piece.low]))
    out = np.empty((len(UNITS), read.n_layers - 1, len(target)), np.float32)

    def measure(rows: slice) -> None:
        generator = np.random.default_rng([seed, 3, piece.low + rows.start])
        final = Prediction.of(read.head.logits(piece.final[rows]))
        for block in range(read.n_layers - 1):
            h, after = piece.states[block][rows], piece.states[block + 1][rows]
            other = others.states[block + 1, drawn[rows]] - others.states[block, drawn[rows]]
            update = after - h
            wanted = [target[rows], others.read.target[drawn[rows]]]
            found, (gradient, elsewhere, towards_final) = of_losses(lens, read.head, block, h, wanted, [final])
            loss = found.loss(target[rows])
            same = Prediction.of(lens.logits(read.head, block, after)).loss(target[rows])
            own = same if lens.kind == "logit" else _loss(lens, read, block + 1, after, target[rows])
            plain, permuted = cosine(update, -gradient), cosine(other, -gradient)
            mistaken = cosine(update, -elsewhere)
            out[:, block, rows] = (
                plain,
                permuted,
                plain - permuted,
                mistaken,
                plain - mistaken,
                cosine(update - middle[block], -gradient),
                cosine(generator.standard_normal(h.shape, np.float32), -gradient),
                cosine(update, -towards_final),
                cosine(other, -towards_final),
                -np.einsum("ij,ij->i", gradient, update),
                loss - same,
                loss - own,
            )

    by_block(len(target), read.vocabulary, measure)
    return out


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines of rows (n, d) with rows, (n,); NaN where one of them is 0."""
    length = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(length > 0, np.einsum("ij,ij->i", a, b) / length, np.nan))


def _loss(lens: Lens, read: States, layer: int, h: np.ndarray, target: np.ndarray) -> np.ndarray:
    return Prediction.of(lens.logits(read.head, layer, h)).loss(target)
