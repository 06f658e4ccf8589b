"""From nats a token to bits per byte of text, which compares models of different tokenizers."""

from __future__ import annotations

import numpy as np

from actcache.clients.states import States, values_at
from actcache.schemas.errors import NotFound, Unsupported

NATS_PER_BIT = float(np.log(2))
UNIT = "bits per byte"


def target_bytes(read: States) -> np.ndarray | str:
    """How many bytes of UTF-8 the text of each token that is to be predicted has, (token,) int64; or why that cannot be told.

    BOS and EOS are no text, and count 0. Bits per byte (Gao et al. 2020, arXiv 2101.00027, section 3.1) are the nats of some tokens
    / ln 2 / their bytes.
    """
    if not predicts_tokens(read):
        return "what is predicted is no token of the text"
    try:
        counts = read.ds.tokenizer.byte_counts(read.target)
    except NotFound:
        return "the dataset holds no tokenizer"
    except Unsupported as error:
        return str(error)
    if "special" in read.ds.fields:
        counts[_later(read, "special") != 0] = 0
    return counts


def predicts_tokens(read: States) -> bool:
    """Whether what is to be predicted are the next tokens of the text, and not other targets that were given."""
    last = int(read.token[-1]) + read.offset + 1
    return last < read.ds.n_tokens and bool((_later(read, "token_id") == read.target).all())


def _later(read: States, column: str) -> np.ndarray:
    """A column at the tokens that are to be predicted."""
    at = read.token + read.offset + 1
    return values_at(read.ds, column, at)
