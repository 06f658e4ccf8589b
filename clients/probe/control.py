"""Control tasks (Hewitt & Liang 2019, arXiv 1909.03368): labels at random that a probe can tell only by heart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from actcache.clients.states import numbered
from actcache.schemas.errors import InvalidInput

if TYPE_CHECKING:
    from actcache.clients.states import States

Control = Literal["type", "document", "none"]
TOKEN_ID = "token_id"


def control_of(asked: bool | str, read: States, answer: np.ndarray) -> Control:
    """Which control goes with labels (token,) or (token, outputs): by document where each has one label alone, else by token type.

    Raises:
        InvalidInput: no such control, or the dataset has no token ids.
    """
    if asked is False:
        return "none"
    if asked is True:
        _, first = np.unique(read.groups.of, return_index=True)
        if np.array_equal(answer, answer[first][read.groups.of]):
            return "document"
    elif asked not in ("type", "document"):
        raise InvalidInput(f"control={asked!r}: there is True, False, 'type' and 'document'")
    if asked != "document" and TOKEN_ID not in read.ds.fields:
        raise InvalidInput(
            f"{read.ds.url}: there are no token ids to draw a control for each token type; give control=False"
        )
    return "document" if asked == "document" else "type"


def drawn(control: Control, read: States, pool: np.ndarray, seed: int, draw: int) -> np.ndarray:
    """Answers of a control task, (token,) or (token, outputs): each token type, or document, has one at random for all of its tokens.

    It is drawn from `pool`, the labels of some tokens, so that it is each of them as often as that occurs.
    """
    if control == "type":
        owner, count = numbered(read.ds, TOKEN_ID, read.token)
    else:
        owner, count = read.groups.of, read.groups.count
    generator = np.random.default_rng([seed, draw])
    return np.asarray(pool[generator.integers(len(pool), size=count)][owner])
