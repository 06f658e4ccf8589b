"""What a build stores of the model's next-token distributions beside its activations: `loss`, `entropy`, `topk=K`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from actcache.schemas.array import ArrayLayout, piece

CHUNK_ROWS = 1 << 14
CHUNK_BYTES = 512 << 10
KINDS = ("loss", "entropy", "topk=K")
LOSS = "loss"
ENTROPY = "entropy"
TOPK_LOGIT, TOPK_TOKEN_ID, TOPK_LOG_NORMALIZER = "topk/logit", "topk/token_id", "topk/log_normalizer"
_TOPK = re.compile(r"topk=([0-9]{1,9})")
_ABOUT: dict[str, dict[str, str]] = {
    LOSS: {"units": "nats", "meaning": "cross-entropy of the next token of the same sequence; NaN at its last"},
    ENTROPY: {"units": "nats", "meaning": "entropy of the model's next-token distribution"},
    TOPK_LOGIT: {"meaning": "the k largest logits, descending; of equal ones the lower token id first"},
    TOPK_TOKEN_ID: {"meaning": "token ids of the k largest logits"},
    TOPK_LOG_NORMALIZER: {
        "units": "nats",
        "meaning": "logsumexp of all logits: a logit minus this is its token's log-probability",
    },
}


def parse_outputs(value: str | Iterable[str]) -> tuple[str, ...]:
    """Outputs as asked for, in words separated by commas or spaces, as they are recorded: sorted, none twice.

    Raises:
        ValueError: an output that there is not, or two different `topk`.
    """
    words = [value] if isinstance(value, str) else list(value)
    if not all(isinstance(word, str) for word in words):
        raise ValueError(f"an output is one of {', '.join(KINDS)}")
    found = {_canonical(word) for text in words for word in text.replace(",", " ").split()}
    if sum(name.startswith("topk=") for name in found) > 1:
        raise ValueError(f"two different K: {', '.join(sorted(found))}; give one topk")
    return tuple(sorted(found))


def _canonical(word: str) -> str:
    if word in (LOSS, ENTROPY):
        return word
    match = _TOPK.fullmatch(word)
    if match is None or int(match.group(1)) < 1:
        raise ValueError(f"{word!r} is not one of {', '.join(KINDS)} (K a whole number from 1, as in topk=50)")
    return f"topk={int(match.group(1))}"


def top_k(outputs: Iterable[str]) -> int | None:
    """The K of `topk=K`, or None where no logits are stored."""
    return next((int(match.group(1)) for name in outputs if (match := _TOPK.fullmatch(name))), None)


def output_layouts(outputs: Iterable[str], n_tokens: int, block_tokens: int) -> dict[str, ArrayLayout]:
    """The arrays of some outputs by name, one shard a block."""
    wanted = set(outputs)
    layouts: dict[str, ArrayLayout] = {}

    def add(name: str, dtype: str, row: tuple[int, ...] = ()) -> None:
        # chunks of many rows where a row is a number; where it is k of them, no more bytes than a site's chunk has
        rows = CHUNK_ROWS if not row else max(1, min(CHUNK_ROWS, CHUNK_BYTES // (4 * row[0])))
        layouts[name] = ArrayLayout(
            name,
            (n_tokens, *row),
            dtype,
            block_tokens,
            piece(block_tokens, rows),
            ("token", "k")[: 1 + len(row)],
            _ABOUT[name],
        )

    for name in (LOSS, ENTROPY):
        if name in wanted:
            add(name, "float32")
    k = top_k(wanted)
    if k is not None:
        add(TOPK_LOGIT, "float32", (k,))
        add(TOPK_TOKEN_ID, "int32", (k,))
        add(TOPK_LOG_NORMALIZER, "float32")
    return layouts


def output_shapes(layouts: Mapping[str, ArrayLayout], n_tokens: int) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype that the outputs among some arrays must have, whoever wrote them."""
    for name in (LOSS, ENTROPY):
        if name in layouts:
            yield name, (n_tokens,), "float32"
    found = [name for name in (TOPK_LOGIT, TOPK_TOKEN_ID, TOPK_LOG_NORMALIZER) if name in layouts]
    if found:
        k = next((layouts[name].shape[-1] for name in found if len(layouts[name].shape) == 2), 1)
        yield TOPK_LOGIT, (n_tokens, k), "float32"
        yield TOPK_TOKEN_ID, (n_tokens, k), "int32"
        yield TOPK_LOG_NORMALIZER, (n_tokens,), "float32"
