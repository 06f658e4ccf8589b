"""The first picture of a dataset: what its layers predict, and how long their states are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from actcache.clients.figures.canvas import PAGE, drawable, page, plain
from actcache.clients.figures.colours import GREY, LINES
from actcache.clients.figures.lines import ticks
from actcache.clients.results import Results
from actcache.clients.summary import printable

if TYPE_CHECKING:
    from actcache.clients.dataset import Dataset

LONGEST_TITLE = 100


def overview(ds: Dataset, measures: Mapping[str, np.ndarray], path: str | Path) -> Path:
    """Draw a logit lens's loss by layer (nats) beside the residual norm by layer, as PNG or SVG. Returns the path.

    `measures` is what `actcache.lens.logit` returns.

    Raises:
        InvalidInput: another ending, or no such folder.
        Unsupported: matplotlib is not installed.
    """
    with page(path, PAGE, 2.9) as figure:
        left, right = figure.subplots(1, 2)
        layers = np.arange(len(measures["loss"]))
        names = ["embed", *(str(layer) for layer in layers[:-1])]
        left.plot(layers, measures["loss"], "o-", color=LINES[0], label="logit lens")
        if isinstance(measures, Results) and measures.measures["loss"].low is not None:
            left.fill_between(layers, *measures.interval("loss"), color=LINES[0], alpha=0.2, linewidth=0)
        left.axhline(_unigram_entropy(ds), color=GREY, linestyle="--", label="unigram entropy")
        left.set(
            title="Next-token loss of each layer's prediction", xlabel="after block", ylabel="loss (nats per token)"
        )
        left.set_ylim(bottom=0)
        norms = np.array([np.percentile(ds.norm[site], (5, 50, 95)) for site in ds.residual_sites])
        right.fill_between(
            layers, norms[:, 0], norms[:, 2], color=LINES[1], alpha=0.2, linewidth=0, label="5th to 95th percentile"
        )
        right.plot(layers, norms[:, 1], "o-", color=LINES[1], label="median")
        right.set(title="Residual norm", xlabel="after block", ylabel="L2 norm", yscale="log")
        for axes in (left, right):
            axes.legend()
            ticks(axes, "x", names)
        labels = ds.provenance.labels
        said = f"{labels.model} on {', '.join(labels.corpus)}"
        said = f"{said[:LONGEST_TITLE]}…" if len(said) > LONGEST_TITLE else said
        plain(figure.suptitle(drawable(printable(f"{said}: {ds.n_tokens:,} tokens")), fontsize=9))
    return Path(path)


def _unigram_entropy(ds: Dataset) -> float:
    """Entropy in nats of the predicted tokens' own frequencies: the loss of the best model without context."""
    following = np.ones(ds.n_tokens, bool)
    following[ds.sequence_start[:-1]] = False
    counts = np.bincount(ds.tokens["token_id"][following])
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())
