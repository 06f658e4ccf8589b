"""What a module is called with for a batch, and how its outputs become one vector a position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from actcache.jobs.head import to_numpy
from actcache.jobs.trace import first_tensor, forward, vectors
from actcache.schemas.errors import InvalidInput


class Inputs(Protocol):
    """A batch, ready to be run."""

    def call(self, module: nn.Module) -> Any:
        """The module's own result."""
        ...

    def vectors(self, value: Any, site: str) -> torch.Tensor:
        """What a module took or gave, as (sequence, position, width).

        Raises:
            InvalidInput: it has not one vector a position.
        """
        ...


@dataclass(frozen=True)
class TokenInputs:
    """Token ids and attention mask (sequence, position), padded on the right."""

    ids: torch.Tensor
    mask: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Sequences and positions."""
        return int(self.ids.shape[0]), int(self.ids.shape[1])

    def call(self, module: nn.Module) -> Any:
        """The result of a causal language model."""
        return forward(module, self.ids, self.mask)

    def vectors(self, value: Any, site: str) -> torch.Tensor:
        """The first tensor with one vector a token.

        Raises:
            InvalidInput: there is none.
        """
        found = vectors(value, self.shape)
        if found is None:
            raise InvalidInput(f"{site}: no vector a token in a batch of {self.shape[0]} × {self.shape[1]} tokens")
        return found


@dataclass(frozen=True)
class ItemInputs:
    """Items of a user's own, stacked; `positions` vectors each."""

    args: tuple[torch.Tensor, ...]
    kwargs: Mapping[str, torch.Tensor]
    items: int
    positions: int

    @classmethod
    def stack(cls, items: Sequence[Any], positions: int, device: torch.device) -> ItemInputs:
        """Items as one batch.

        Raises:
            InvalidInput: they are not tensors, or tuples or dicts of tensors, of one shape.
        """
        try:
            if isinstance(items[0], Mapping):
                kwargs = {name: _stack([item[name] for item in items], device) for name in items[0]}
                return cls((), kwargs, len(items), positions)
            rows = [item if isinstance(item, tuple) else (item,) for item in items]
            args = tuple(_stack(column, device) for column in zip(*rows, strict=True))
            return cls(args, {}, len(items), positions)
        except (TypeError, ValueError, RuntimeError, KeyError) as error:
            raise InvalidInput(f"the module's inputs do not stack into a batch: {error}") from None

    def call(self, module: nn.Module) -> Any:
        """The module's own result."""
        return module(*self.args, **self.kwargs)

    def vectors(self, value: Any, site: str) -> torch.Tensor:
        """The first tensor, flattened to positions, or averaged over them where an item has one.

        Raises:
            InvalidInput: it has another number of positions.
        """
        tensor = first_tensor(value)
        if tensor is None or tensor.ndim < 2 or len(tensor) != self.items:
            raise InvalidInput(f"{site}: the module's output has no vectors of {self.items} items in it")
        if tensor.ndim == 2:
            tensor = tensor[:, None]
        elif tensor.ndim > 3:
            tensor = tensor.flatten(2).transpose(1, 2)
        if self.positions == 1:
            return tensor.mean(dim=1, keepdim=True)
        if tensor.shape[1] != self.positions:
            raise InvalidInput(
                f"{site}: {tensor.shape[1]} positions an item, where the dataset has {self.positions}; all sites of a dataset "
                "share one axis: leave the site out, or average every site with positions=1"
            )
        return tensor


def as_array(value: Any, what: str) -> np.ndarray:
    """A tensor or array as numpy, with the same bits.

    Raises:
        InvalidInput: it is neither; the message says of `what`.
    """
    try:
        return np.ascontiguousarray(to_numpy(torch.as_tensor(value)))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"{what} is not made of tensors: {error}") from None


def _stack(rows: Sequence[Any], device: torch.device) -> torch.Tensor:
    return torch.stack([torch.as_tensor(row) for row in rows]).to(device)
