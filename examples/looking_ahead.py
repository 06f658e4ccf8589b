"""What a lens tells of tokens further on, and differences of two models in that: what examples share that look ahead."""

from __future__ import annotations

from typing import Literal

import numpy as np

import actcache as ac
from actcache.clients.bootstrap import mean
from actcache.clients.lens.logit import token_measures

Sums = tuple[np.ndarray, np.ndarray]
"""Nats (document, layer) float64, and tokens (document,)."""


TRAINED_ON = 60_000  # tokens that a tuned lens is trained on, passes counted each


def future(ds: ac.Dataset, offset: int, kind: Literal["ridge", "tuned"] = "tuned") -> Sums:
    """Loss of the token after `offset` more, read from each layer by a lens that was fitted on the other half of the documents."""
    halves = ac.lens.states(ds, offset=offset).split(0.5)
    sums, counts = [], []
    for fitted, read in (halves, halves[::-1]):
        lens = ac.lens.fit(fitted, kind, target_offset=offset, tokens=TRAINED_ON)
        of_half = np.zeros((read.groups.count, read.n_layers))
        for low, values in token_measures(lens, read):
            np.add.at(of_half, read.groups.of[low : low + values.shape[2]], values[0].T.astype(np.float64))
        sums.append(of_half)
        counts.append(np.bincount(read.groups.of, minlength=read.groups.count))
    return np.concatenate(sums), np.concatenate(counts)


def difference(a: list[Sums], b: list[Sums], beyond_the_token: bool = False) -> ac.lens.Results:
    """Loss of a less that of b in nats, the mean over seeds, paired by document; and how far each seed's is from that.

    `beyond_the_token` takes from each loss that of the same lens on the embedding, which knows the token alone.
    """
    pairs = [(one[0] - other[0], one[1]) for one, other in zip(a, b, strict=True)]
    if beyond_the_token:
        pairs = [(sums - sums[:, :1], counts) for sums, counts in pairs]
    found = mean(sum(sums for sums, _ in pairs), sum(counts for _, counts in pairs), "nats")
    seeds = np.stack([mean(*pair, "nats").value for pair in pairs])
    labels = ["embed", *map(str, range(len(found.value) - 1))]
    return ac.lens.Results({"loss_difference": found}, {"layer": labels}, {"seeds": seeds.round(4).tolist()})


def said(name: str, results: ac.lens.Results) -> None:
    """Print a difference by layer, with its interval and the seeds' own."""
    low, high = results.interval("loss_difference")
    ends = zip(results.labels["layer"], results["loss_difference"], low, high, strict=True)
    print(f"{name}, nats by layer [95 %]: {', '.join(f'{n} {v:+.3f} [{a:+.3f}, {b:+.3f}]' for n, v, a, b in ends)}")
    print(f"    seeds: {'; '.join(' '.join(f'{each:+.3f}' for each in seed) for seed in results.facts['seeds'])}")
