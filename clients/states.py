"""What lenses and probes read: the states of a network in order, of chosen tokens, and what those are to predict."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from actcache.clients.bootstrap import CONFIDENCE, RESAMPLES, Groups
from actcache.clients.buffered import Batch
from actcache.clients.field import TOKEN
from actcache.clients.loader import BUFFER, Batches
from actcache.clients.sources import Later
from actcache.clients.token_index import Masked
from actcache.schemas.errors import InvalidInput
from actcache.schemas.quantised import KINDS, Kind

if TYPE_CHECKING:
    from actcache.cache.head import Head
    from actcache.clients.selection import Selectable
    from actcache.clients.whole import Whole

FINAL = "final"

PIECE_BYTES = 32 << 20
"""States that are held at once, of all sites together; a few such pieces are read ahead."""
MOST_ROWS, FEWEST_ROWS = 8192, 256
BUFFER_BYTES = 1 << 30
"""Rows, as stored, of a window that is shuffled; it may be up to twice as long."""
MOST_SPANNED, SPARSE = 1 << 24, 8
"""Values of a column that are read to have some of them; of more, not more than so many times those that are asked for."""
ROUGH = 10
"""Fewer groups than this make intervals that are clearly too narrow: of 2, 95 % cover about half, of 5 about 85 %."""
FEWEST_DOCUMENTS = 5
"""Fewer documents than this are not split: their sequences are."""


@dataclass(frozen=True)
class Piece:
    """The states of some of the tokens.

    Attributes:
        low, high: which of the tokens.
        states: one array a site, (n, d) float32.
        final: the last site's state, `offset` tokens later, (n, d) float32.
    """

    low: int
    high: int
    states: Sequence[np.ndarray]
    final: np.ndarray


@dataclass(frozen=True, eq=False, repr=False)
class States:
    """States of some tokens at several sites, and the prediction that they are measured against.

    Attributes:
        ds: the dataset.
        sites: from the first layer to the last; the head reads the last one.
        labels: what the sites are called: `embed`, `0`, `1`, … in a GPT.
        head: what makes logits of the last state.
        token: places on the token axis, (token,) int64, ascending.
        target: what is to be predicted at each, (token,) int64: the id of the token after it, and after `offset` more.
        groups: which tokens are of one document.
        offset: how many tokens later the prediction is made that the states are compared with.
        kind: the quantised form that is read, or None for the exact one.
    """

    ds: Whole
    sites: tuple[str, ...]
    labels: tuple[str, ...]
    head: Head
    token: np.ndarray
    target: np.ndarray
    groups: Groups
    offset: int = 0
    kind: Kind | None = None

    def __len__(self) -> int:
        return len(self.token)

    def __repr__(self) -> str:
        ahead = f", {self.offset} tokens ahead" if self.offset else ""
        read = f" in {self.kind}" if self.kind else ""
        return f"<actcache states of {len(self):,} tokens at {len(self.sites)} sites{read}{ahead}: {self.ds.url}>"

    @property
    def width(self) -> int:
        """Dimensions of a state."""
        return int(self.ds.source(self.sites[-1], self.kind).shape[1])

    @property
    def n_layers(self) -> int:
        """How many sites."""
        return len(self.sites)

    @property
    def vocabulary(self) -> int:
        """How many logits the head gives."""
        return int(self.head.logits(np.zeros((1, self.width), np.float32)).shape[1])

    def batches(
        self,
        sites: Sequence[str] | None = None,
        size: int | None = None,
        shuffle: int | None = None,
        epoch: int = 0,
        drop_last: bool = False,
    ) -> Batches:
        """An epoch of batches of the states, float32, with the prediction they are compared with among them: see `final`.

        `sites` are all of them unless given; `size` by default as many tokens as make 32 MiB. Shuffled tokens are mixed within windows
        of a gigabyte. `drop_last` leaves out what would make a short batch.

        Raises: as `Batches`.
        """
        names = tuple(self.sites if sites is None else sites)
        sources = {name: self.ds.source(name, self.kind) for name in names}
        last = self.ds.source(self.sites[-1], self.kind)
        if self.offset:
            sources[FINAL] = Later(last, self.offset)
        else:
            sources.setdefault(self.sites[-1], last)
        values = sum(source.shape[1] for source in sources.values())
        row_bytes = sum(source.shape[1] * source.dtype.itemsize for source in sources.values())
        if size is None:
            size = int(np.clip(PIECE_BYTES // (4 * values), FEWEST_ROWS, MOST_ROWS))
        buffer = int(np.clip(BUFFER_BYTES // row_bytes, size, BUFFER))
        bits = Masked.empty(self.ds.n_tokens)
        Masked.mark(bits, self.token)
        return Batches(sources, Masked(bits), size, shuffle=shuffle, epoch=epoch, buffer=buffer, drop_last=drop_last)

    def pieces(self, sites: Sequence[str] | None = None) -> Iterator[Piece]:
        """All tokens in their order, some thousand at a time, the next ones read while one piece is used.

        `sites` are all of them unless given. A piece's arrays are used again for later pieces when nobody holds them.

        Raises: as reading rows.
        """
        names = tuple(self.sites if sites is None else sites)
        low = 0
        for batch in self.batches(names):
            high = low + len(batch[TOKEN])
            yield Piece(low, high, [batch[name] for name in names], self.final(batch))
            low = high

    @property
    def final_name(self) -> str:
        """What a batch calls the states that the prediction is made of."""
        return FINAL if self.offset else self.sites[-1]

    def final(self, batch: Batch) -> np.ndarray:
        """The states of a batch, (n, d), that the prediction is made of which the others are compared with."""
        return batch[self.final_name]

    def split(self, held_out: float = 0.1, seed: int = 0) -> tuple[States, States]:
        """Two parts: to fit on, and held out. No document is in both, and about `held_out` of the tokens are in the second.

        Of fewer than five documents the sequences are divided instead, which a warning says.

        Raises:
            InvalidInput: no such share, or there are not two groups to divide.
        """
        if not 0 < held_out < 1:
            raise InvalidInput(f"held_out={held_out}: give a share between 0 and 1")
        groups = self.groups
        if groups.count < FEWEST_DOCUMENTS and groups.by == "document":
            sequence = np.searchsorted(self.ds.sequence_start, self.token, side="right")
            numbers = np.unique(sequence, return_inverse=True)[1]
            count = int(numbers.max()) + 1
            warnings.warn(
                f"{self.ds.url}: too few documents ({groups.count}) to hold some out; sequences ({count}) are divided instead",
                stacklevel=2,
            )
            groups = Groups(numbers, count, "sequence")
        if groups.count < 2:
            raise InvalidInput(
                f"{self.ds.url}: one {groups.by} cannot be divided into a part to fit on and one held out"
            )
        order = np.random.default_rng(seeded(seed)).permutation(groups.count)
        size = np.bincount(groups.of, minlength=groups.count)[order]
        tokens = np.cumsum(size)
        number = int(np.clip(np.searchsorted(tokens, held_out * tokens[-1]) + 1, 1, groups.count - 1))
        chosen = order[:number]
        if tokens[number - 1] > 2 * held_out * tokens[-1]:  # a long one came: those that fit, or the shortest
            chosen = order[_fitting(size, held_out * tokens[-1])]
        outside = np.isin(groups.of, chosen)
        parts = self.only(np.flatnonzero(~outside), groups), self.only(np.flatnonzero(outside), groups)
        if groups.by == "sequence" and (shared := _shared_text(*parts)):
            warnings.warn(
                f"{self.ds.url}: sequences overlap, and {shared:.0%} of the held-out tokens are in the part to fit on too, in another "
                "sequence: what is measured on them is too good",
                stacklevel=2,
            )
        return parts

    def only(self, places: np.ndarray, groups: Groups | None = None) -> States:
        """Some of the tokens, by ascending places among them; `groups` of all tokens may be given anew."""
        return replace(
            self, token=self.token[places], target=self.target[places], groups=(groups or self.groups)[places]
        )

    def facts(self) -> dict[str, object]:
        """What numbers measured on these tokens, and their intervals, rest on."""
        return {"dataset": self.ds.url, "tokens": len(self), f"{self.groups.by}s": self.groups.count, **self.intervals}

    @property
    def intervals(self) -> dict[str, object]:
        """How intervals are found of these tokens, as a fact; nothing if there are none."""
        if self.groups.count < 2:
            return {}
        few = f", of {self.groups.count} too narrow" if self.groups.count < ROUGH else ""
        return {"intervals": f"{CONFIDENCE:.0%} by {RESAMPLES:,} resamples of {self.groups.by}s{few}"}


def states(
    ds: Selectable | States,
    *,
    sites: Sequence[str] | None = None,
    head: Head | None = None,
    targets: np.ndarray | None = None,
    offset: int = 0,
    max_tokens: int | None = None,
    quantised: str | None = None,
) -> States:
    """The states of a dataset or a selection that lenses and probes read, by default the residual stream of a GPT.

    Goes over every token that has a successor in its sequence, or those among the first `max_tokens`. States that were made by this
    function are given back as they are.

    Args:
        ds: a dataset, several, or tokens selected from one.
        sites: other states than the residual stream, from first to last, all equally wide.
        head: what makes logits of the last state; by default the dataset's own. `Head([], {})` if the last site is the logits.
        targets: what is to be predicted at each token of the whole dataset, (n_tokens,) whole numbers from 0; -1 for nothing. By
            default the id of the next token of the sequence.
        offset: compare with the prediction that is made so many tokens later.
        max_tokens: how many tokens of the dataset or selection to look at.
        quantised: a kind (`int8`, `fp8`) to read each state in.

    Raises:
        NotFound: the dataset lacks a state, in the form asked for, or a head.
        InvalidInput: no token is left, or arguments that do not fit the dataset.
    """
    if isinstance(ds, States):
        return ds
    whole = whole_of(ds)
    if offset < 0:
        raise InvalidInput(f"offset={offset}: a prediction that is made later is asked for, at least 0")
    if quantised is not None and quantised not in KINDS:
        raise InvalidInput(f"quantised={quantised!r}: there is {', '.join(KINDS)}")
    kind: Kind | None = quantised
    names = tuple(ds.residual_states if sites is None else sites)
    if len(names) < 2:
        raise InvalidInput(
            f"{ds.url}: at least two states are asked for, of which the last is what the others are compared with"
        )
    if sites is None and ds.layers[-1] != ds.model.n_layers:
        raise InvalidInput(
            f"{ds.url}: the last state of the residual stream makes the prediction; keep layer {ds.model.n_layers}"
        )
    widths = {name: whole.source(name, kind).shape[1] for name in names}
    if len(set(widths.values())) > 1:
        raise InvalidInput(
            f"{ds.url}: states of different widths: {', '.join(f'{n} has {w}' for n, w in widths.items())}"
        )
    token, target = _pairs(ds, whole, targets, offset, max_tokens)
    document, count = numbered(whole, "document", token)
    found = States(
        whole,
        names,
        site_labels(ds, sites),
        whole.head if head is None else head,
        token,
        target,
        Groups(document, count, "document"),
        offset,
        kind,
    )
    if (most := int(target.max())) >= found.vocabulary:
        raise InvalidInput(f"{ds.url}: {most} is to be predicted, and the head makes {found.vocabulary} logits")
    return found


def _pairs(
    ds: Selectable, whole: Whole, targets: np.ndarray | None, offset: int, max_tokens: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a view, ascending, that have something to predict `offset` tokens later in their sequence, and what that is."""
    chosen = chosen_tokens(ds, max_tokens)
    ends = whole.sequence_start[np.searchsorted(whole.sequence_start, chosen, side="right")]
    if targets is None:
        token = chosen[chosen + offset + 1 < ends]
        if not len(token):
            raise InvalidInput(
                f"{ds.url}: no token has a successor in its sequence" + (f" {offset} tokens later" if offset else "")
            )
        return token, values_at(whole, "token_id", token + offset + 1).astype(np.int64)
    targets = np.asarray(targets)
    if targets.shape != (whole.n_tokens,) or targets.dtype.kind not in "iu":
        raise InvalidInput(
            f"targets: {whole.n_tokens:,} whole numbers are asked for, one a token of the dataset, "
            f"not {targets.dtype} of shape {targets.shape}"
        )
    token = chosen[chosen + offset < ends]
    token = token[targets[token + offset] >= 0]
    if not len(token):
        raise InvalidInput(f"{ds.url}: no token has a target")
    return token, targets[token + offset].astype(np.int64)


def chosen_tokens(ds: Selectable, max_tokens: int | None = None) -> np.ndarray:
    """The places on the token axis of the first tokens of a dataset or selection, ascending int64.

    Raises:
        InvalidInput: a selection that names a token twice, or fewer than one token is asked for.
    """
    if max_tokens is not None and max_tokens < 1:
        raise InvalidInput(f"max_tokens={max_tokens}: give at least 1")
    if ds is ds.whole:
        return np.arange(ds.n_tokens if max_tokens is None else min(max_tokens, ds.n_tokens))
    chosen = np.sort(ds.index.tokens(0, len(ds.index)))[:max_tokens]
    if len(np.unique(chosen)) < len(chosen):
        raise InvalidInput(f"{ds.url}: a selection that names a token twice")
    return chosen


def whole_of(ds: Selectable) -> Whole:
    """The dataset that something is, or is selected from.

    Raises:
        InvalidInput: it is none, but perhaps the URL of one.
    """
    if not hasattr(ds, "whole"):
        raise InvalidInput(
            f"a dataset or tokens selected from one are asked for, such as actcache.open(url), not {ds!r:.60}"
        )
    return ds.whole


def seeded(seed: int) -> int:
    """A seed that can be drawn with.

    Raises:
        InvalidInput: it is below 0.
    """
    if seed < 0:
        raise InvalidInput(f"seed={seed}: give a whole number from 0")
    return seed


def numbered(whole: Whole, column: str, token: np.ndarray) -> tuple[np.ndarray, int]:
    """A column of some tokens, its values numbered from 0, and how many there are."""
    kept, numbers = np.unique(values_at(whole, column, token), return_inverse=True)
    return numbers, len(kept)


def _fitting(sizes: np.ndarray, most: float) -> list[int]:
    """Places of sizes that are together at most so much, the first that fit; the smallest, if none does."""
    found, total = [], 0
    for place, size in enumerate(sizes.tolist()):
        if total + size <= most:
            found.append(place)
            total += size
    return found or [int(sizes.argmin())]


def _shared_text(first: States, second: States) -> float:
    """The share of the tokens of the second whose places in their documents are those of tokens of the first."""
    if "document_position" not in second.ds.fields:
        return 0.0
    within, others = (
        np.stack(
            [values_at(part.ds, name, part.token).astype(np.int64) for name in ("document", "document_position")], 1
        )
        for part in (second, first)
    )
    text = within[:, 1] >= 0
    pairs = [np.ascontiguousarray(each).view([("", np.int64)] * 2)[:, 0] for each in (within[text], others)]
    return float(np.isin(pairs[0], pairs[1]).mean()) if text.any() else 0.0


def values_at(whole: Whole, column: str, token: np.ndarray) -> np.ndarray:
    """The values of a column at some tokens, ascending: read end to end, unless they are few among very many."""
    first, last = int(token[0]), int(token[-1]) + 1
    if last - first > max(MOST_SPANNED, SPARSE * len(token)):
        return whole.source(column).open().take(token)
    return np.asarray(whole.rows(column, first, last)[token - first])


def site_labels(ds: Selectable, sites: Sequence[str] | None) -> tuple[str, ...]:
    """What the sites are called: a block's output by its number, what is before the first `embed`."""
    if sites is not None:
        return tuple(sites)
    return tuple("embed" if layer == 0 else str(layer - 1) for layer in ds.layers)
