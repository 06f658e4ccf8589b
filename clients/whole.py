"""A whole token axis: what a dataset and several of them end to end have in common beyond any view."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from actcache.clients.selection import Selectable, Selection
from actcache.clients.sources import Source
from actcache.clients.token_index import Span, TokenIndex
from actcache.schemas.errors import InvalidInput

if TYPE_CHECKING:
    import dask.array as da

SEARCHED_ROWS = 1 << 14


class Whole(Selectable):
    """All tokens of a dataset.

    Attributes:
        n_tokens, n_sequences, n_documents: sizes.
        key: hash of the spec that it was built from; of several datasets, of each.
        model_key: hash of the model's configuration and weights: datasets of one model have the same.
    """

    key: str
    model_key: str
    n_sequences: int
    n_documents: int
    _n_tokens: int

    @property
    def whole(self) -> Whole:
        """See `Selectable`."""
        return self

    @property
    def index(self) -> TokenIndex:
        """See `View`."""
        return Span(0, self._n_tokens)

    def _index_of(self, source: Source) -> TokenIndex:
        """All rows, also of an array that is not along the token axis."""
        return Span(0, source.shape[0])

    @property
    def sequence_start(self) -> np.ndarray:
        """Row splits (n_sequences + 1), int64: sequence i is tokens [sequence_start[i], sequence_start[i+1])."""
        return self.tokens["sequence_start"]

    def sequence(self, number: int) -> Selection:
        """The tokens of a sequence, with their text beside them.

        Raises:
            IndexError: there is no such sequence.
        """
        number = _numbered(number, self.n_sequences, f"{self.url}: sequence")
        start, stop = self.sequence_start[number : number + 2].tolist()
        return Selection(self, lambda: Span(start, stop), None)

    def document(self, number: int) -> Selection:
        """The tokens of a document, with their text beside them: one run on the token axis, which can span sequences.

        Raises:
            IndexError: there is no such document.
        """
        number = _numbered(number, self.n_documents, f"{self.url}: document")
        return Selection(self, lambda: Span(self._first_of_document(number), self._first_of_document(number + 1)), None)

    def _first_of_document(self, number: int) -> int:
        """The first token of a document that is not before this one: they stand on the axis in ascending order."""
        low, high = 0, self._n_tokens
        while high - low > SEARCHED_ROWS:
            middle = (low + high) // 2
            if int(self._column("document", middle, middle + 1, None)[0]) < number:
                low = middle + 1
            else:
                high = middle
        return low + int(np.searchsorted(self._column("document", low, high, None), number))

    def sequences(
        self,
        name: str,
        length: int | None = None,
        dtype: Literal["float32", "stored", "int8", "fp8"] = "float32",
    ) -> da.Array:
        """A site as a lazy Dask array (sequence, position, d_model), where all sequences are equally long.

        With `length`, of those sequences that have so many tokens. `dtype` is as `site` takes it.

        Raises:
            NotFound: no site of that name, or it is not stored in that form.
            InvalidInput: another dtype; the sequences differ in length and none is given, or none has that length.
        """
        import dask.array as da

        source, _ = self._site(name, dtype)
        lengths = np.diff(self.sequence_start)
        longest = int(lengths.max())
        if length is None and longest != int(lengths.min()):
            raise InvalidInput(
                f"{self.url}: sequences have {lengths.min()} to {longest} tokens; sequences({name!r}, length={longest}) "
                f"gives the {np.count_nonzero(lengths == longest)} that have {longest}"
            )
        length = longest if length is None else length
        chosen = np.flatnonzero(lengths == length)
        if not len(chosen) or length < 1:
            raise InvalidInput(f"{self.url}: no sequence has {length} tokens; they have {lengths.min()} to {longest}")
        view: Selectable = self
        if len(chosen) < len(lengths):
            view = self.where(np.repeat(lengths == length, lengths))
        together = max(1, max(source.chunks) // length)
        flat = view.site(name, dtype, chunks=together * length)
        counts = tuple(rows // length for rows in flat.chunks[0])
        cut: da.Array = da.map_blocks(  # type: ignore[no-untyped-call]
            _cut,
            flat,
            length,
            chunks=(counts, (length,), flat.chunks[1]),
            new_axis=1,
            meta=np.empty((0, 0, 0), flat.dtype),
        )
        return cut


def _cut(rows: np.ndarray, length: int) -> np.ndarray:
    return rows.reshape(-1, length, rows.shape[-1])


def _numbered(number: int, count: int, what: str) -> int:
    if not -count <= number < count:
        raise IndexError(f"{what} {number} of {count}")
    return number + count if number < 0 else number
