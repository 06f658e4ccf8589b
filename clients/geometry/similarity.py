"""How alike two layers are: linear CKA and the cosine of their covariances, of every two layers at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from actcache.clients.geometry.influence import dealt, said, share
from actcache.clients.geometry.products import Pair, PairSums, group_products, pair_sums, tiles
from actcache.clients.geometry.reading import MEMORY, kept_dimensions, layers
from actcache.clients.results import Measure, Results
from actcache.clients.selection import Selectable
from actcache.clients.states import States
from actcache.schemas.errors import InvalidInput

FEWEST_TOKENS = 4
AXES = ("layer", "other_layer")


def similarity(
    ds: Selectable | States,
    *,
    sites: Sequence[str] | None = None,
    max_tokens: int | None = None,
    without: Sequence[int] = (),
    intervals: bool = True,
    quantised: str | None = None,
    memory: int = MEMORY,
) -> Results:
    """How alike every two layers are, (layer, layer): symmetric matrices without a unit.

    With X (n, d) and Y (n, k) the centred states of the same n tokens at two layers, and C their covariances:

    - `cka`: linear centred kernel alignment, ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖) in Frobenius norms (Kornblith et al. 2019, arXiv 1905.00414). 1
      if one is the other rotated and scaled. It is not told from chance by its size alone: the fewer tokens, the larger it is.
    - `cka_unbiased`: the same ratio of the unbiased estimates of HSIC (Song et al. 2012, JMLR 13:1393; Nguyen et al. 2021, arXiv
      2010.15327), exact, over all tokens as one batch. About 0, and as often below it, where layers have nothing to do with each
      other. The three estimates are unbiased, for independent tokens; their ratio is not quite.
    - `cka_shuffled`: control. The exact mean of `cka` over all ways to pair the tokens of one layer with those of the other,
      √(PR(X) PR(Y)) / (n − 1) with the participation ratio PR = (tr C)² / tr C² (Kazi-Aoual et al. 1995, CSDA 20:643).
    - `cka_shuffled_in_documents`: control. The exact mean over all ways to pair them within each document: what both layers tell of
      the document, and not of the token, is left.
    - `covariance_cosine`: tr(Cx Cy) / (‖Cx‖ ‖Cy‖): whether two layers vary along the same directions of one basis, as the residual
      stream has. There only if all sites are equally wide.
    - `covariance_cosine_rotated`: control. tr Cx tr Cy / (d ‖Cx‖ ‖Cy‖), where the mean of tr(Cx Q Cy Qᵀ) over rotations Q is in the
      numerator: layers of these spectra whose bases have nothing to do with each other.

    The data is read once if the sums of products of all pairs fit into `memory` bytes, as the fact `passes` says, and once more for
    the intervals of `cka` and `covariance_cosine`: the infinitesimal jackknife over documents, on the scale of the logit. They tell
    how much other documents would change the number, not its bias, and mean little where it is as small as its control.

    Args:
        ds: a dataset, a selection, or states.
        sites: which states; by default the residual stream, or all sites where none of it is stored.
        max_tokens: how many tokens of the dataset or selection to look at.
        without: dimensions that are left out, such as massive ones, which may decide both measures alone.
        intervals: whether to find intervals.
        quantised: a kind (`int8`, `fp8`) to read each state in.
        memory: bytes that sums of products may take; three matrices (d, d) float64 are held at least.

    Raises:
        NotFound: a site that is not stored, in the form asked for.
        InvalidInput: fewer than four tokens, or arguments that do not fit the dataset.
    """
    read = layers(ds, sites, max_tokens, quantised)
    kept = kept_dimensions(read, without)
    if len(read) < FEWEST_TOKENS:
        raise InvalidInput(f"{read.ds.url}: {len(read)} tokens; similarity asks for at least {FEWEST_TOKENS}")
    found = _Matrices(read, kept, intervals)
    passes = 0
    for pairs in tiles(read, kept, memory):
        found.add(pairs)
        passes += 1
    facts = {
        **read.facts(),
        "passes": passes * (2 if intervals else 1),
        "intervals": said(found.groups) if intervals else "none were asked for",
        **({"without": sorted(set(map(int, without)))} if len(without) else {}),
    }
    return Results(found.measures(), dict.fromkeys(AXES, read.labels), facts)


class _Matrices:
    """What has been found of the pairs of layers so far."""

    def __init__(self, read: States, kept: Sequence[np.ndarray], intervals: bool) -> None:
        self.read, self.kept = read, kept
        self.groups = dealt(read.groups)
        self.intervals = intervals and self.groups.count > 1
        self.same_width = len(set(map(len, kept))) == 1
        shape = (read.n_layers, read.n_layers)
        names = ["cka", "cka_unbiased", "cka_shuffled", "cka_shuffled_in_documents"]
        names += ["covariance_cosine", "covariance_cosine_rotated"] if self.same_width else []
        self.value = {name: np.full(shape, np.nan) for name in names}
        self.influence = {name: np.zeros((self.groups.count, *shape)) for name in ("cka", "covariance_cosine")}

    def add(self, pairs: list[Pair]) -> None:
        """Find the numbers of some pairs; each layer's own pair is among them."""
        sums = pair_sums(self.read, self.kept, pairs)
        centred = {i: each.centred for (i, j), each in sums.items() if i == j}
        norm = {i: float(np.linalg.norm(own)) for i, own in centred.items()}
        trace = {i: float(np.trace(own)) for i, own in centred.items()}
        hsic = {i: sums[i, i].hsic for i in centred}
        along = group_products(self.read, self.kept, sums, self.groups) if self.intervals else None
        with np.errstate(invalid="ignore", divide="ignore"):
            for (i, j), each in sums.items():
                self._add_pair((i, j), each, norm, trace, hsic)
                if self.same_width:
                    both = np.float64(norm[i] * norm[j])
                    self._set("covariance_cosine", (i, j), np.vdot(centred[i], centred[j]) / both)
                    rotated = trace[i] * trace[j] / (len(self.kept[i]) * both)
                    self._set("covariance_cosine_rotated", (i, j), rotated)
                if along is not None:
                    self._add_influence((i, j), *along, norm)

    def _add_pair(
        self, pair: Pair, sums: PairSums, norm: dict[int, float], trace: dict[int, float], hsic: dict[int, float]
    ) -> None:
        i, j = pair
        both = np.float64(norm[i] * norm[j])
        self._set("cka", pair, np.square(sums.centred).sum() / both)
        self._set("cka_unbiased", pair, sums.hsic / np.sqrt(np.float64(hsic[i] * hsic[j])))
        self._set("cka_shuffled_in_documents", pair, sums.shuffled_in_documents / both)
        self._set("cka_shuffled", pair, trace[i] * trace[j] / ((sums.n - 1) * both))

    def _add_influence(
        self, pair: Pair, cross: dict[Pair, np.ndarray], own: dict[Pair, np.ndarray], norm: dict[int, float]
    ) -> None:
        """D log CKA = 2 ⟨S, dS⟩ / ‖S‖² − ½ d log ‖Sx‖² ‖Sy‖², and so for the covariances; times the number itself."""
        i, j = pair
        scale = own[i, i] / norm[i] ** 2 + own[j, j] / norm[j] ** 2
        cka = self.value["cka"][i, j]
        square = cka * norm[i] * norm[j]
        self._set_influence("cka", pair, cka * (2 * cross[i, j] / square - scale))
        if self.same_width:
            cosine = self.value["covariance_cosine"][i, j]
            product = cosine * norm[i] * norm[j]
            change = (own[i, j] + own[j, i]) / product - scale
            self._set_influence("covariance_cosine", pair, cosine * change)

    def _set(self, name: str, pair: Pair, value: float) -> None:
        i, j = pair
        self.value[name][i, j] = self.value[name][j, i] = value

    def _set_influence(self, name: str, pair: Pair, value: np.ndarray) -> None:
        i, j = pair
        self.influence[name][:, i, j] = self.influence[name][:, j, i] = value

    def measures(self) -> dict[str, Measure]:
        """All of them, with their intervals."""
        return {
            name: share(value, self.influence[name], "1", AXES)
            if self.intervals and name in self.influence
            else Measure(value, "1", AXES)
            for name, value in self.value.items()
        }
