"""How many dimensions the states of each layer use, by the eigenvalues of their covariance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from actcache.clients.bootstrap import Groups
from actcache.clients.covariance import Products, one_pass
from actcache.clients.geometry.influence import dealt, positive, said, share
from actcache.clients.geometry.reading import MEMORY, UNIT, kept_dimensions, layers, only_sites
from actcache.clients.results import Measure, Results
from actcache.clients.selection import Selectable
from actcache.clients.states import Piece, States
from actcache.schemas.errors import InvalidInput

COUNTS = {
    "effective_rank": "dimensions",
    "effective_rank_of_variance": "dimensions",
    "participation_ratio": "dimensions",
    "variance": f"squared {UNIT}",
}
FEWEST_TOKENS = 2


def spectrum(
    ds: Selectable | States,
    *,
    sites: Sequence[str] | None = None,
    max_tokens: int | None = None,
    without: Sequence[int] = (),
    intervals: bool = True,
    quantised: str | None = None,
    memory: int = MEMORY,
) -> Results:
    """How many dimensions the states of each layer use.

    With λ the eigenvalues of the covariance C of a layer's n states, and σ = √(nλ):

    - `effective_rank` (layer,), dimensions: exp of the entropy of σ / Σσ, the singular values of the centred states (Roy & Vetterli
      2007, EUSIPCO, their definition).
    - `effective_rank_of_variance`: the same of λ / Σλ, each direction's share of the variance. It is never larger.
    - `participation_ratio`: (tr C)² / tr C² = (Σλ)² / Σλ².
    - `variance`: tr C, the mean squared distance from the mean state, in squared units of the states.
    - `variance_share` (layer, directions), share: what the first 1, 2, 4, … principal directions hold of it.

    k directions of equal variance give k for each of the first three. All of them come from products in float64; an eigenvalue below
    their rounding counts as 0. No more directions than tokens can be found, so that few tokens make each number too small.

    Intervals are of documents, by the infinitesimal jackknife, on the scale of the logarithm, or of the logit for shares; it reads the
    data once more. They tell how much other documents would change a number, not that bias.

    Args:
        ds: a dataset, a selection, or states.
        sites: which states; by default the residual stream, or all sites where none of it is stored.
        max_tokens: how many tokens of the dataset or selection to look at.
        without: dimensions that are left out, such as massive ones, which may hold nearly all variance.
        intervals: whether to find intervals.
        quantised: a kind (`int8`, `fp8`) to read each state in.
        memory: bytes that sums of products may take; those of one layer are held at least, and the others left to further passes.

    Raises:
        NotFound: a site that is not stored, in the form asked for.
        InvalidInput: fewer than two tokens, or arguments that do not fit the dataset.
    """
    read = layers(ds, sites, max_tokens, quantised)
    kept = kept_dimensions(read, without)
    if len(read) < FEWEST_TOKENS:
        raise InvalidInput(f"{read.ds.url}: {len(read)} tokens; a spectrum asks for at least {FEWEST_TOKENS}")
    groups = dealt(read.groups)
    wanted = intervals and groups.count > 1
    firsts = 2 ** np.arange(int(np.log2(max(map(len, kept)))) + 1)
    value = np.empty((read.n_layers, len(COUNTS) + len(firsts)))
    influence = np.zeros((groups.count, *value.shape))
    passes = 0
    for numbers in _runs(kept, memory):
        sums = _sums(read, kept, numbers)
        passes += 1 + wanted
        found = {number: np.linalg.eigh(each.covariance) for number, each in zip(numbers, sums, strict=True)}
        slopes = {}
        for number, (eigenvalues, _) in found.items():
            value[number], slopes[number] = _measured(eigenvalues[::-1], firsts)
        if wanted:
            means = [each.x / each.n for each in sums]
            bases = [found[number][1][:, ::-1] for number in numbers]
            influence[:, numbers] = _influences(read, kept, numbers, groups, means, bases, slopes, value)
    measures = {}
    for place, (name, unit) in enumerate(COUNTS.items()):
        one = value[:, place]
        measures[name] = positive(one, influence[:, :, place], unit) if wanted else Measure(one, unit)
    rest, axes = value[:, len(COUNTS) :], ("layer", "directions")
    of_rest = influence[:, :, len(COUNTS) :]
    measures["variance_share"] = share(rest, of_rest, "share", axes) if wanted else Measure(rest, "share", axes)
    facts = {
        **read.facts(),
        "passes": passes,
        "intervals": said(groups) if intervals else "none were asked for",
        **({"without": sorted(set(map(int, without)))} if len(without) else {}),
    }
    return Results(measures, {"layer": read.labels, "directions": [str(first) for first in firsts]}, facts)


def _runs(kept: Sequence[np.ndarray], memory: int) -> Iterator[list[int]]:
    """Layers whose products, and what is made of them, are held at once."""
    most = max(1, memory // (3 * 8 * max(map(len, kept)) ** 2))
    for low in range(0, len(kept), most):
        yield list(range(low, min(low + most, len(kept))))


def _sums(read: States, kept: Sequence[np.ndarray], numbers: list[int]) -> list[Products]:
    sums = [Products.empty(len(kept[number]), len(kept[number])) for number in numbers]

    def add(place: int, x: np.ndarray, piece: Piece) -> None:
        exact = _chosen(x, kept[numbers[place]])
        sums[place].add(exact, exact)

    one_pass(only_sites(read, numbers), add)
    return sums


def _chosen(x: np.ndarray, kept: np.ndarray) -> np.ndarray:
    return (x if len(kept) == x.shape[1] else x[:, kept]).astype(np.float64)


def _influences(
    read: States,
    kept: Sequence[np.ndarray],
    numbers: list[int],
    groups: Groups,
    means: list[np.ndarray],
    bases: list[np.ndarray],
    slopes: dict[int, np.ndarray],
    value: np.ndarray,
) -> np.ndarray:
    """What each group's weight does to each measure, (group, layer, measure), in another pass.

    By the weight of a group, an eigenvalue λ of direction v has the slope Σ ((v · (x − x̄))² − λ) / n over its tokens; `slopes` are
    those of the measures by λ.
    """
    found = np.zeros((groups.count, len(numbers), value.shape[1]))

    def add(place: int, x: np.ndarray, piece: Piece) -> None:
        exact = _chosen(x, kept[numbers[place]]) - means[place]
        of_token = np.square(exact @ bases[place]) @ slopes[numbers[place]]
        owner = groups.of[piece.low : piece.high]
        for measure in range(of_token.shape[1]):
            found[:, place, measure] += np.bincount(owner, of_token[:, measure], groups.count)

    one_pass(only_sites(read, numbers), add)
    weight = np.bincount(groups.of, minlength=groups.count) / len(read)
    return np.asarray(found / len(read) - weight[:, None, None] * found.sum(axis=0) / len(read))


def _measured(eigenvalues: np.ndarray, firsts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The measures (m,) of eigenvalues (d,), largest first, and their derivatives by each eigenvalue (d, m)."""
    width = len(eigenvalues)
    real = eigenvalues > max(float(eigenvalues[0]), 0.0) * width * np.finfo(np.float64).eps
    value = np.where(real, eigenvalues, 0.0)
    if not real.any():
        return np.full(len(COUNTS) + len(firsts), np.nan), np.zeros((width, len(COUNTS) + len(firsts)))
    total, square = value.sum(), np.square(value).sum()
    root = np.sqrt(value)
    rank, rank_slope = _exp_entropy(root)
    of_variance, variance_slope = _exp_entropy(value)
    rank_slope = np.divide(rank_slope, 2 * root, out=np.zeros(width), where=real)
    shares = np.cumsum(value)[np.minimum(firsts, width) - 1] / total
    inside = np.arange(width)[:, None] < firsts
    found = np.concatenate([[rank, of_variance, total**2 / square, total], shares])
    slopes = np.column_stack(
        [
            rank_slope,
            variance_slope,
            2 * total / square - 2 * total**2 * value / square**2,
            np.ones(width),
            (inside - shares) / total,
        ]
    )
    return found, slopes


def _exp_entropy(weights: np.ndarray) -> tuple[float, np.ndarray]:
    """Exp of the entropy of weights over their sum, and its derivative by each weight, 0 for those that are 0."""
    share = weights / weights.sum()
    log = np.log(share, out=np.zeros_like(share), where=share > 0)
    entropy = -(share * log).sum()
    slope = np.where(share > 0, -np.exp(entropy) * (log + entropy) / weights.sum(), 0.0)
    return float(np.exp(entropy)), slope
