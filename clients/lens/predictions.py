"""What each layer predicts at each position, read by a lens: the table of nostalgebraist (2020), as arrays, text, JSON and CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from actcache.clients.bootstrap import Groups
from actcache.clients.evaluation import Prediction, by_block
from actcache.clients.lens.prediction_table import NOTHING, Predictions
from actcache.clients.lens.translators import Lens, identity
from actcache.clients.lens.units import predicts_tokens
from actcache.clients.selection import Selectable
from actcache.clients.states import Piece, States, states, values_at
from actcache.clients.whole import Whole
from actcache.schemas.errors import InvalidInput, NotFound, Unsupported

__all__ = ["Predictions", "predictions"]

MOST_POSITIONS = 1 << 14


def predictions(
    lens: Lens | None,
    ds: Selectable | States,
    sequence: int | None = None,
    start: int = 0,
    stop: int | None = None,
    top: int = 5,
    layers: Sequence[int] | None = None,
    quantised: str | None = None,
) -> Predictions:
    """What each layer predicts at some positions, and how well.

    Args:
        lens: a lens, or None for the logit lens.
        ds: a dataset, of which a sequence is named; or the tokens of a selection or of states, in their order on the token axis.
        sequence: which sequence, counted as `ds.sequence` counts.
        start: the first of its tokens that is shown; negative ones count from the end.
        stop: the first that is shown no more.
        top: how many of the most probable ids are kept.
        layers: which states, 0 being the first, -1 the last; all unless given.
        quantised: a kind (`int8`, `fp8`) to read each state in.

    Raises:
        SpecMismatch: the lens is another model's.
        NotFound: the dataset has no head, or lacks a state.
        InvalidInput: no such sequence or layer, no tokens, more than 16,384, or what the lens reads is not what is given.
    """
    read = _chosen(ds, sequence, slice(start, stop), lens.offset if lens else 0, quantised)
    lens = identity(read) if lens is None else lens
    lens.check(read)
    chosen = _layers(layers, read)
    if top < 1:
        raise InvalidInput(f"top={top}: at least one prediction is to be kept")
    top = min(top, read.vocabulary)
    shape = (len(chosen), len(read))
    out = Predictions(
        layers=tuple(read.labels[layer] for layer in chosen),
        token=read.token,
        position=_column(read, "position"),
        token_id=_column(read, "token_id"),
        next_id=read.target,
        top_id=np.empty((*shape, top), np.int64),
        probability=np.empty((*shape, top), np.float32),
        entropy=np.empty(shape, np.float32),
        loss=np.full(shape, np.nan, np.float32),
        kl=np.empty(shape, np.float32),
        rank=np.zeros(shape, np.int64),
        facts={"lens": lens.kind, "dataset": read.ds.url, **({} if sequence is None else {"sequence": sequence})},
    )
    for piece in read.pieces([read.sites[layer] for layer in chosen]):
        _of_piece(lens, chosen, read, piece, out)
    return replace(out, text=_text(read, out))


def _of_piece(lens: Lens, chosen: Sequence[int], read: States, piece: Piece, out: Predictions) -> None:
    """Fill in the tokens of a piece."""
    top = out.top_id.shape[2]

    def measure(rows: slice) -> None:
        at = slice(piece.low + rows.start, piece.low + rows.stop)
        final = Prediction.of(read.head.logits(piece.final[rows]))
        target = read.target[at]
        known = target != NOTHING
        for number, layer in enumerate(chosen):
            exact = lens.translator(layer) is None and layer == read.n_layers - 1
            found = final if exact else Prediction.of(lens.logits(read.head, layer, piece.states[number][rows]))
            best = _best(found.log, top)
            out.top_id[number, at] = best
            out.probability[number, at] = np.take_along_axis(found.probability, best, 1)
            out.entropy[number, at] = found.entropy
            out.kl[number, at] = final.kl(found)
            own = np.take_along_axis(found.log, np.where(known, target, 0)[:, None], 1)
            out.loss[number, at] = np.where(known, -own[:, 0], np.nan)
            out.rank[number, at] = np.where(known, 1 + (found.log > own).sum(axis=1), 0)

    by_block(piece.high - piece.low, read.vocabulary, measure)


def _best(log: np.ndarray, top: int) -> np.ndarray:
    """The ids of the largest values of each row, (n, top), the largest first; of equal ones the smaller id."""
    width = log.shape[1]
    some = np.argpartition(log, width - top, axis=1)[:, width - top :] if top < width else np.indices(log.shape)[1]
    order = np.lexsort((some, -np.take_along_axis(log, some, 1)), axis=1)
    return np.asarray(np.take_along_axis(some, order, 1))


def _chosen(ds: Selectable | States, sequence: int | None, part: slice, offset: int, quantised: str | None) -> States:
    """The tokens asked for; those without a successor too, whose target is `NOTHING`."""
    whole = ds.ds if isinstance(ds, States) else ds.whole
    if sequence is not None and not -whole.n_sequences <= sequence < whole.n_sequences:
        raise InvalidInput(f"{whole.url}: no sequence {sequence}; there is 0 to {whole.n_sequences - 1}")
    if isinstance(ds, States):
        places = np.arange(len(ds))
        if sequence is not None:
            tokens = ds.ds.sequence(sequence).index
            places = np.flatnonzero(np.isin(ds.token, tokens.tokens(0, len(tokens))))
        return ds.only(_few(places[part], ds.ds.url))
    view = ds
    if sequence is not None:
        if not isinstance(ds, Whole):
            raise InvalidInput(f"{ds.url}: sequence={sequence} is for a whole dataset; a selection is read as it is")
        view = ds.sequence(sequence)
    elif isinstance(ds, Whole):
        raise InvalidInput(f"{ds.url}: say which sequence (sequence=0), or give a selection such as ds.document(0)")
    if len(view.index) > MOST_POSITIONS:
        _few(np.arange(*part.indices(len(view.index))), ds.url)
    read = states(view, offset=offset, quantised=quantised)
    token = _few(np.sort(view.index.tokens(0, len(view.index)))[part], ds.url)
    ends = whole.sequence_start[np.searchsorted(whole.sequence_start, token, side="right")]
    token, ends = token[token + offset < ends], ends[token + offset < ends]
    later = token + offset + 1
    target = np.full(len(token), NOTHING)
    if len(token):
        first, last = int(later[0]), min(int(later[-1]) + 1, whole.n_tokens)
        ids = whole.rows("token_id", min(first, last), last).astype(np.int64)
        target[later < ends] = ids[later[later < ends] - first]
    _few(token, ds.url)
    return replace(read, token=token, target=target, groups=Groups(np.zeros(len(token), np.int64), 1, "document"))


def _few(places: np.ndarray, url: str) -> np.ndarray:
    if not 0 < len(places) <= MOST_POSITIONS:
        raise InvalidInput(
            f"{url}: {len(places):,} tokens are chosen; 1 to {MOST_POSITIONS:,} are shown, see start and stop"
        )
    return places


def _layers(layers: Sequence[int] | None, read: States) -> list[int]:
    """Indices from 0, ascending as given."""
    if layers is None:
        return list(range(read.n_layers))
    wrong = [layer for layer in layers if not -read.n_layers <= layer < read.n_layers]
    if wrong or not len(layers):
        raise InvalidInput(f"layers={list(layers)}: some of 0 to {read.n_layers - 1} are asked for")
    return sorted({layer % read.n_layers for layer in layers})


def _column(read: States, name: str) -> np.ndarray:
    return values_at(read.ds, name, read.token).astype(np.int64)


def _text(read: States, found: Predictions) -> dict[int, str] | None:
    """The text of every id that occurs; None without a tokenizer, or where what is predicted is no token."""
    known = read.target != NOTHING
    if known.any() and not predicts_tokens(read.only(np.flatnonzero(known))):
        return None
    ids = np.unique(np.concatenate([found.token_id, found.next_id[known], found.top_id.ravel()]))
    try:
        return dict(zip(ids.tolist(), read.ds.tokenizer.strings(ids), strict=True))
    except (NotFound, Unsupported):
        return None
