"""Small arrays of the token axis by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from actcache.schemas.errors import NotFound


class Columns(Mapping[str, np.ndarray]):
    """Arrays by name, read when first asked for and kept; numpy, not writeable."""

    def __init__(self, what: str, names: Sequence[str], read: Callable[[str], np.ndarray]) -> None:
        self._what = what
        self._names = tuple(names)
        self._read = read
        self._kept: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise NotFound(f"{self._what} {name!r}; there is {', '.join(self._names)}")
        if name not in self._kept:
            array = self._read(name)
            array.flags.writeable = False
            self._kept[name] = array
        return self._kept[name]

    def kept(self, name: str) -> np.ndarray | None:
        """An array, if it was read already."""
        return self._kept.get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"<{', '.join(self._names)}>"
