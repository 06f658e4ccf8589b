"""Mixing: how many tokens of a batch come from the same sequence, and from how many objects, with the loader's order and others."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from actcache.clients.shuffle import Plan, Share
from actcache.clients.token_index import Span
from benchmarks.material import Material
from benchmarks.ratio import Result

TITLE = "mixing: pairs of the same sequence in a batch, what orders give ÷ what is expected of them"
TOKENS = 20_000_000
SEQUENCE, SIZE, BLOCK, ROW = 1024, 4096, 21_760, 256
BUFFERS = (1 << 17, 1 << 18, 1 << 20, 1 << 22)
MOST_TOKENS = 6_000_000


def run(material: Material) -> Iterator[Result]:
    """The loader's order with several buffers, then a perfect one, whole rows, and a reservoir."""
    print(f"  {TOKENS:,} tokens in sequences of {SEQUENCE}, batches of {SIZE}, objects of {BLOCK:,}; companions are")
    print(
        "  the other tokens of its sequence that a token has in its batch; spread is χ² of tokens by object ÷ its degrees"
    )
    rng = np.random.default_rng(0)
    for buffer in BUFFERS:
        yield _result(f"the loader, buffer {buffer:,}", order(TOKENS, buffer), expected(buffer))
    yield _result("a perfect shuffle", rng.permutation(TOKENS)[:MOST_TOKENS], expected(TOKENS))
    rows = rng.permutation(TOKENS // ROW)[: MOST_TOKENS // ROW]
    yield _result(f"shuffled rows of {ROW} tokens", (rows[:, None] * ROW + np.arange(ROW)).ravel(), expected(TOKENS))
    yield _result("a reservoir of 1,048,576, objects shuffled", _reservoir(1 << 20, rng), expected(1 << 20))


def order(tokens: int, buffer: int, block: int = BLOCK, most: int = MOST_TOKENS) -> np.ndarray:
    """The first tokens, `most` or somewhat more, that the loader gives out, in its order."""
    cuts = np.append(np.arange(0, tokens, block), tokens)
    plan = Plan(Span(0, tokens), cuts, size=SIZE, shuffle=0, epoch=0, buffer=buffer, share=Share(), drop_last=False)
    found, count = [], 0
    for window in range(len(plan.windows) - 1):
        units = np.flatnonzero(plan.window_of == window).tolist()
        found.append(np.concatenate([plan.tokens(unit) for unit in units])[plan.order(window)])
        count += len(found[-1])
        if count >= most:
            break
    return np.concatenate(found)


def expected(mixed: int, sequence: int = SEQUENCE, size: int = SIZE) -> float:
    """Pairs of the same sequence in a batch that is drawn from `mixed` tokens of whole sequences.

    Any two of them are of the same one with probability (sequence - 1) / (mixed - 1).
    """
    return size * (size - 1) / 2 * (sequence - 1) / (mixed - 1)


def pairs(tokens: np.ndarray, sequence: int = SEQUENCE, size: int = SIZE) -> float:
    """Pairs of the same sequence in a batch, on average, of tokens in their order."""
    owners = tokens[: len(tokens) // size * size].reshape(-1, size) // sequence
    counts = [np.unique(batch, return_counts=True)[1] for batch in owners]
    return float(np.mean([(count * (count - 1) / 2).sum() for count in counts]))


def spread(tokens: np.ndarray, total: int, block: int = BLOCK, size: int = SIZE) -> tuple[float, float]:
    """χ² of how many tokens of a batch each object has ÷ its degrees of freedom, 1 for a perfect shuffle, and objects in a batch."""
    blocks = -(-total // block)
    batches = tokens[: len(tokens) // size * size].reshape(-1, size) // block
    counts = np.stack([np.bincount(batch, minlength=blocks) for batch in batches])
    mean = size / blocks
    chi_square = ((counts - mean) ** 2 / mean).sum(axis=1) / (blocks - 1)
    return float(chi_square.mean()), float((counts > 0).sum(axis=1).mean())


def _reservoir(size: int, rng: np.random.Generator) -> np.ndarray:
    """A buffer, from which one is drawn at a time and replaced by the next token of the objects in random order."""
    blocks = rng.permutation(TOKENS // BLOCK)[: (MOST_TOKENS + size) // BLOCK]
    tokens = (blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel()
    buffer, found = tokens[:size].tolist(), []
    for token, at in zip(tokens[size:].tolist(), rng.integers(0, size, len(tokens) - size).tolist(), strict=True):
        found.append(buffer[at])
        buffer[at] = token
    return np.array(found[size:])  # what it gives out before it has run once is not what it gives out then


def _result(what: str, tokens: np.ndarray, wanted: float) -> Result:
    found = pairs(tokens)
    chi_square, blocks = spread(tokens, TOKENS)
    figures = {"pairs": found, "companions": 2 * found / SIZE, "spread": chi_square, "objects in a batch": blocks}
    return Result("mixing", what, found / wanted, found / wanted, found / wanted, 1, None, "lower", figures)
