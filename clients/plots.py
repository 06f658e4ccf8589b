"""Pictures of a dataset."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from actcache.clients.states import states
from actcache.schemas.errors import Unsupported

if TYPE_CHECKING:
    from actcache.clients.dataset import Dataset


def overview(ds: Dataset, measures: Mapping[str, np.ndarray], path: str | Path) -> Path:
    """Draw a logit lens's loss by layer (nats) beside the median residual norm by layer, as a PNG. Returns its path.

    `measures` is what `actcache.lens.logit` returns.

    Raises:
        Unsupported: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise Unsupported("a picture needs matplotlib; pip install 'actcache[plots]'") from None
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    layers = np.arange(len(measures["loss"]))
    names = ["embed", *(str(layer) for layer in layers[:-1])]
    left.plot(layers, measures["loss"], "o-", color="#2458a6", label="logit lens")
    left.axhline(_unigram_entropy(ds), color="#888888", linestyle="--", label="unigram entropy")
    left.set(title="Next-token loss of each layer's prediction", xlabel="after block", ylabel="loss (nats per token)")
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    norms = np.array([np.percentile(ds.norm[site], (5, 50, 95)) for site in ds.residual_sites])
    right.fill_between(layers, norms[:, 0], norms[:, 2], color="#c9772b", alpha=0.25, label="5th to 95th percentile")
    right.plot(layers, norms[:, 1], "o-", color="#c9772b", label="median")
    right.set(title="Residual norm", xlabel="after block", ylabel="L2 norm", yscale="log")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set_xticks(layers, names)
        axes.spines[["top", "right"]].set_visible(False)
    labels = ds.provenance.labels
    figure.suptitle(f"{labels.model} on {', '.join(labels.corpus)}: {ds.n_tokens:,} tokens", fontsize=11)
    path = Path(path)
    figure.savefig(path)
    return path


def _unigram_entropy(ds: Dataset) -> float:
    """Entropy in nats of the predicted tokens' own frequencies: the loss of the best model without context."""
    counts = np.bincount(states(ds).target)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())
