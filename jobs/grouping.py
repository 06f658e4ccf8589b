"""Which sequences of a block are run together, and what of the work is for nothing."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from actcache.schemas.plan import BatchRule


def grouped(rule: BatchRule, lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Which sequences of these lengths (n) are run together: indices into `lengths`, each once."""
    if rule.order == "sequence":
        assert rule.size is not None
        yield from np.split(np.arange(len(lengths)), range(rule.size, len(lengths), rule.size))
        return
    assert rule.tokens is not None
    order, first = np.argsort(-lengths, kind="stable"), 0
    while first < len(order):
        count = max(1, rule.tokens // int(lengths[order[first]]))
        yield order[first : first + count]
        first += count


def padded_length(rule: BatchRule, lengths: np.ndarray) -> int:
    """To how many positions the sequences of a batch are padded."""
    return max(int(lengths.max()), -(-(rule.least_positions or 1) // len(lengths)))


def padded_fraction(rule: BatchRule, lengths: np.ndarray) -> float:
    """Pads run for each position run, of sequences of these lengths as one block."""
    run = sum(len(group) * padded_length(rule, lengths[group]) for group in grouped(rule, lengths))
    return 1 - int(lengths.sum()) / run if run else 0.0


def recomputed_fraction(sequence_start: np.ndarray, n_tokens: int, block_tokens: int) -> float:
    """Tokens that are run a second time since their sequence crosses a block's border, per token of the dataset."""
    borders = np.arange(block_tokens, n_tokens, block_tokens)
    owner = np.searchsorted(sequence_start, borders, side="right") - 1
    crossed = sequence_start[owner] < borders
    owner = owner[crossed]
    return float((sequence_start[owner + 1] - sequence_start[owner]).sum() / n_tokens) if len(owner) else 0.0
