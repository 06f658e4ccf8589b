"""Lenses: what a residual state predicts when the model's own head reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from actcache.clients.evaluation import log_softmax, pairs
from actcache.schemas.sites import residual_stream

if TYPE_CHECKING:
    from actcache.clients.dataset import Dataset
    from actcache.clients.joined import Joined

TOKENS_AT_ONCE = 2048


def logit(ds: Dataset | Joined, max_tokens: int | None = None, quantised: str | None = None) -> dict[str, np.ndarray]:
    """The logit lens (nostalgebraist 2020): each residual state read by the final norm and unembedding.

    Goes over every token that has a successor in its sequence, or those among the first `max_tokens`. Returns, per layer
    from the embedding to the last block's output, each (layer,), float64: `loss`, the cross-entropy of the next token in
    nats; `kl`, KL(final ‖ layer) in nats; `entropy` of the layer's prediction in nats; `agreement`, the share of
    tokens whose most probable next token is the final one's.

    `quantised`, a kind (`int8`, `fp8`), reads that form of each state, which differs from the exact one by `ds.damage`.

    Raises:
        NotFound: the dataset has no head, or lacks, in the form asked for, a state of the residual stream.
        InvalidInput: no token has a successor, or it is a selection.
    """
    sites = residual_stream(ds.model.n_layers)
    token, successor = pairs(ds, max_tokens)
    head = ds.head
    layers = len(sites) if quantised is not None else ds.resid.shape[0]
    totals = {name: np.zeros(layers) for name in ("loss", "kl", "entropy", "agreement")}
    for first in range(0, len(token), TOKENS_AT_ONCE):
        at, target = token[first : first + TOKENS_AT_ONCE], successor[first : first + TOKENS_AT_ONCE]
        low, high = int(at[0]), int(at[-1]) + 1
        states = [ds.rows(site, low, high, quantised)[at - low].astype(np.float32) for site in sites]
        final = log_softmax(head.logits(states[-1]))
        probability, best = np.exp(final), final.argmax(axis=1)
        for layer, state in enumerate(states):
            found = final if layer == layers - 1 else log_softmax(head.logits(state))
            totals["loss"][layer] -= found[np.arange(len(at)), target].sum(dtype=np.float64)
            totals["kl"][layer] += (probability * (final - found)).sum(dtype=np.float64)
            totals["entropy"][layer] -= (np.exp(found) * found).sum(dtype=np.float64)
            totals["agreement"][layer] += (found.argmax(axis=1) == best).sum()
    return {name: total / len(token) for name, total in totals.items()}
