"""What `where` asks of tokens: `position__gt=0`, `special=False`, `norm__lt=500`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np

from actcache.schemas.errors import InvalidInput
from actcache.schemas.grid import BOS_FLAG, EOS_FLAG

_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
OPERATORS = (*_COMPARE, "in")
_FLAGS = {"bos": BOS_FLAG, "eos": EOS_FLAG}


@dataclass(frozen=True)
class Condition:
    """A field compared with a value. Nothing compares with NaN but `ne`."""

    field: str
    operator: str
    value: Any

    def holds(self, values: np.ndarray) -> np.ndarray:
        """Where it holds, bool, of the field's values."""
        if self.field == "special":
            return self._has_flag(values)
        if self.operator == "in":
            return np.isin(values, self.value)
        return np.asarray(_COMPARE[self.operator](values, self.value))

    def _has_flag(self, flags: np.ndarray) -> np.ndarray:
        mask = _FLAGS.get(self.value, BOS_FLAG | EOS_FLAG)
        wanted = self.value is not False
        return np.asarray(((flags & mask) != 0) == (wanted if self.operator == "eq" else not wanted))

    def __str__(self) -> str:
        value = "a list" if isinstance(self.value, np.ndarray) else repr(self.value)
        return f"{self.field}{'' if self.operator == 'eq' else f'__{self.operator}'}={value}"


def conditions(asked: Mapping[str, Any], fields: Iterable[str]) -> list[Condition]:
    """Read keywords `field=value` and `field__operator=value`; a value that is a list, an array, a range or a set means `in`.

    Raises:
        InvalidInput: no such field or operator, or a value that cannot be compared so.
    """
    known = list(fields)
    found = []
    for keyword, value in asked.items():
        name, _, how = keyword.rpartition("__") if "__" in keyword else (keyword, "", "eq")
        if name not in known:
            near = get_close_matches(name, known, 1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise InvalidInput(f"where({keyword}=…): no field {name!r}{meant} There is {', '.join(known)}")
        if how not in OPERATORS:
            raise InvalidInput(f"where({keyword}=…): no operator {how!r}; there is {', '.join(OPERATORS)}")
        found.append(Condition(name, *_checked(keyword, name, how, value)))
    return found


def _checked(keyword: str, name: str, how: str, value: Any) -> tuple[str, Any]:
    if name == "special":
        if how not in ("eq", "ne") or (value not in ("bos", "eos") and not isinstance(value, bool | np.bool_)):
            raise InvalidInput(f"where({keyword}={value!r}): special is True, False, 'bos' or 'eos', with eq or ne")
        return how, value if isinstance(value, str) else bool(value)
    if isinstance(value, list | tuple | set | frozenset | range | np.ndarray) and np.ndim(_listed(value)) == 1:
        if how not in ("eq", "in"):
            raise InvalidInput(f"where({keyword}=…): {how!r} compares with one number, and this is a list; use __in")
        values = _listed(value)
        if values.dtype.kind not in "iuf" and len(values):
            raise InvalidInput(f"where({keyword}=…): a list of {values.dtype}, where numbers are asked for")
        return "in", values
    if how == "in":
        raise InvalidInput(f"where({keyword}={value!r}): 'in' asks for a list")
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise InvalidInput(f"where({keyword}={value!r}): a number or a list of numbers is asked for")
    return how, value


def _listed(value: Any) -> np.ndarray:
    return np.asarray(sorted(value) if isinstance(value, set | frozenset) else value)
