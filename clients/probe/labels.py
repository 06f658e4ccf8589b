"""What a probe is to tell of each token, from whatever array it is given in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from actcache.schemas.errors import InvalidInput

if TYPE_CHECKING:
    from actcache.clients.whole import Whole

Task = Literal["classification", "regression"]
MOST_CLASSES = 1 << 14
UNSEEN = -2
"""A class that the probe does not know."""


@dataclass(frozen=True)
class Labels:
    """Labels of every token of a dataset.

    Attributes:
        task: what is asked.
        classes: the classes in ascending order; empty for numbers.
        code: the class of each token by its number, (n_tokens,) int32; -1 is no label. None for numbers.
        value: the numbers of each token, (n_tokens, outputs) float64; NaN in any is no label. None for classes.
    """

    task: Task
    classes: np.ndarray
    code: np.ndarray | None = None
    value: np.ndarray | None = None

    @property
    def labelled(self) -> np.ndarray:
        """Which tokens have a label, (n_tokens,) bool."""
        return np.asarray(self.code != -1 if self.value is None else ~np.isnan(self.value).any(axis=1))

    def at(self, token: np.ndarray) -> np.ndarray:
        """The class numbers (n,) or numbers (n, outputs) of some tokens."""
        return np.asarray(self.code[token] if self.code is not None else self.value[token])  # type: ignore[index]


def read_labels(whole: Whole, labels: Any, task: str | None = None, classes: np.ndarray | None = None) -> Labels:
    """Labels as `fit` takes them, of every token. `classes` are those known already: others are `UNSEEN`.

    Raises:
        InvalidInput: no labels that fit the dataset, or the task.
    """
    if task not in (None, "classification", "regression"):
        raise InvalidInput(f"task={task!r}: there is classification and regression")
    if callable(labels):
        raise InvalidInput(
            "labels: say what the function is of: ac.probe.by_token(ds, function) of a token's text, "
            "by_document(ds, function) of a document's, by_span(ds, function) for spans of a document's characters"
        )
    array = _of_tokens(whole, labels)
    if task is None:
        task = "regression" if array.dtype.kind == "f" and classes is None else "classification"
    if task == "regression":
        return _numbers(whole, array)
    if array.ndim != 1:
        raise InvalidInput(f"{whole.url}: classes of shape {array.shape}; give one a token, or task='regression'")
    missing = np.zeros(len(array), bool)
    if array.dtype.kind == "O":
        missing = np.array([value is None for value in array.tolist()])
    elif array.dtype.kind == "f":
        missing = np.isnan(array)
    elif array.dtype.kind == "i":
        missing = array == -1
    try:
        kept, numbers = _numbered(array[~missing])
    except TypeError:
        raise InvalidInput(f"{whole.url}: labels of several sorts; give numbers, booleans or strings") from None
    if classes is not None:
        order = {value: number for number, value in enumerate(classes.tolist())}
        known = np.array([order.get(value, UNSEEN) for value in kept.tolist()], np.int32)
        kept, numbers = classes, known[numbers] if len(known) else numbers
    if len(kept) > MOST_CLASSES:
        raise InvalidInput(f"{whole.url}: {len(kept):,} classes; give task='regression' if these are numbers")
    code = np.full(len(array), -1, np.int32)
    code[~missing] = numbers
    return Labels("classification", kept, code)


def _of_tokens(whole: Whole, labels: Any) -> np.ndarray:
    """An array with one row a token, of a plain dtype where that is possible."""
    try:
        array = np.asarray(labels)
    except ValueError:
        raise InvalidInput(f"{whole.url}: labels of no one shape; give one a token") from None
    if array.shape[:1] == (whole.n_documents,) != (whole.n_tokens,):
        array = array[whole.tokens["document"]]
    if array.ndim not in (1, 2) or len(array) != whole.n_tokens:
        raise InvalidInput(
            f"{whole.url}: labels of shape {array.shape}; give one for each of the dataset's {whole.n_tokens:,} tokens, "
            f"or of its {whole.n_documents:,} documents, -1, NaN or None where there is none"
        )
    if array.dtype.kind == "O":
        array = _plain(array)
    if array.dtype.kind not in "biufUO":
        raise InvalidInput(f"{whole.url}: labels of dtype {array.dtype}; give numbers, booleans or strings")
    return array


def _plain(array: np.ndarray) -> np.ndarray:
    """Objects that are all floats, whole numbers or None as floats, if one is a float; else as they are."""
    flat = array.ravel().tolist()
    sorts = {type(value) for value in flat} - {type(None)}
    if sorts and sorts <= {int, float} and float in sorts:
        return np.array([np.nan if value is None else value for value in flat], float).reshape(array.shape)
    if sorts == {int} and type(None) not in {type(value) for value in flat}:
        return array.astype(np.int64)
    return array


def _numbers(whole: Whole, array: np.ndarray) -> Labels:
    try:
        value = array.astype(np.float64).reshape(len(array), -1)
    except (TypeError, ValueError):
        raise InvalidInput(f"{whole.url}: regression is of numbers, not of {array.dtype}") from None
    if np.isinf(value).any():
        raise InvalidInput(f"{whole.url}: a label is infinite; NaN is for tokens without one")
    return Labels("regression", np.empty(0), None, value)


def _numbered(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values that there are, ascending, and each by its number among them.

    Raises:
        TypeError: they cannot be compared.
    """
    if values.dtype.kind != "O":
        kept, numbers = np.unique(values, return_inverse=True)
        return kept, numbers
    listed = values.tolist()
    if len({type(value) for value in listed}) > 1 or not isinstance(next(iter(listed), ""), str | bool | int):
        raise TypeError
    found = sorted(set(listed))
    order = {value: number for number, value in enumerate(found)}
    return np.array(found), np.fromiter((order[value] for value in listed), np.int64, len(listed))
