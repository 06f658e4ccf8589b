"""Datasets whose states were made up, so that what there is to find is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

import actcache as ac


class _Slice(nn.Module):
    """Columns [low, high) of what comes in."""

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., self.low : self.high] * 1.0


class _Slices(nn.Module):
    """Takes all states of an item side by side, (item, position, layer · d), and gives each to a module of its own."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Slice(number * width, (number + 1) * width) for number in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in self.layers], -1)


def plant(states: np.ndarray, path: Path, name: str = "planted") -> ac.Dataset:
    """A sealed dataset of these states, (layer, sequence, position, d), as sites `layer0`, `layer1`, …; a sequence is a document."""
    layers, sequences, positions, width = states.shape
    side_by_side = np.ascontiguousarray(states.transpose(1, 2, 0, 3).reshape(sequences, positions, layers * width))
    sites = {f"layer{number}": f"layers.{number}" for number in range(layers)}
    module = _Slices(layers, width).eval()
    inputs = torch.from_numpy(side_by_side.astype(np.float32))
    capturable = ac.Capturable(name=name, module=module, inputs=inputs, sites=sites, positions=positions)
    ac.build(ac.Spec(model=capturable, sites="all"), path)
    return ac.open(path)
