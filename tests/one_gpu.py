"""Preloaded by a Dask worker: a machine that says it has a GPU, though torch computes on the processor."""

from __future__ import annotations

import torch

torch.cuda.device_count = lambda: 1
