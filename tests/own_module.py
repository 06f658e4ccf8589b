"""A module with inputs of its own, importable by worker processes."""

from __future__ import annotations

import os

import torch
from torch import nn

import actcache as ac


class Mixer(nn.Module):
    """Two linear layers over a vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def fresh() -> ac.Capturable:
    """The module with 20 items of 6 numbers."""
    vectors = torch.arange(120, dtype=torch.float32).reshape(20, 6) / 100
    return ac.Capturable(name="mixer", module=Mixer(), inputs=vectors, sites={"one": "first", "two": "second"})


class Deadly(Mixer):
    """Ends the process at one item, as the system does when memory is short."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (x == 7.0).any():
            os._exit(137)
        return super().forward(x)


def deadly() -> ac.Capturable:
    """The module with an item in the fourth block of two that ends the process."""
    vectors = torch.ones(20, 6)
    vectors[7] = 7.0
    return ac.Capturable(name="deadly", module=Deadly(), inputs=vectors, sites={"one": "first", "two": "second"})
