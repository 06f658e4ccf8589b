"""Where a training that was interrupted goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from actcache.clients import tensor_file
from actcache.schemas.errors import InvalidInput

KIND = "lens training"
SECONDS = 30.0


class Checkpoint:
    """A file that holds the state of one training. It is replaced as a whole, every half minute, and goes when the lens is made.

    Args:
        path: the file.
        facts: what the training is; a state of another is refused. JSON takes them.
    """

    def __init__(self, path: str | Path, facts: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._facts = dict(facts)
        self._kept = time.monotonic()

    def found(self) -> tuple[int, dict[str, np.ndarray]] | None:
        """Steps done and the arrays then, if there is a file.

        Raises:
            InvalidInput: it is of another training, or no such file.
        """
        if not self.path.exists():
            return None
        arrays, facts = tensor_file.read(self.path, KIND)
        for name, value in self._facts.items():
            if facts.get(name) != value:
                raise InvalidInput(
                    f"{self.path}: a training with {name} {facts.get(name)!r}, not {value!r}; go on with what it was begun with, "
                    "or remove the file"
                )
        return int(facts["step"]), arrays

    def keep(self, step: int, state: Callable[[], Mapping[str, np.ndarray]], now: bool = False) -> None:
        """Write the state, unless that was done a moment ago, or `now` in any case."""
        if now or time.monotonic() - self._kept >= SECONDS:
            tensor_file.write(self.path, state(), {**self._facts, "kind": KIND, "step": step})
            self._kept = time.monotonic()

    def remove(self) -> None:
        """Remove the file: the training is over."""
        self.path.unlink(missing_ok=True)
