"""What a torch module is beside its weights: the plain attributes of all its parts, which neither its repr nor its source tells."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from actcache.jobs.head import to_numpy

DEPTH = 6
_OF_TORCH = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.Size, np.generic)


def settings(module: nn.Module) -> list[str]:
    """A line for each attribute of each module below `module`, the buffers that its state leaves out among them.

    Numbers, texts, functions, tensors, and containers and objects of these count; of anything else its type.
    """
    lines = []
    stored = set(module.state_dict(keep_vars=True))
    for path, part in module.named_modules():
        lines += [
            f"{path}.{name}={_told(value)}" for name, value in sorted(vars(part).items()) if name not in _OF_TORCH
        ]
    lines += [f"{name}={_told(buffer)}" for name, buffer in module.named_buffers() if name not in stored]
    return lines


def _told(value: Any, depth: int = 0) -> str:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, _PLAIN):
        return f"{kind} {value!r}"
    if isinstance(value, torch.Tensor | np.ndarray):
        array = np.ascontiguousarray(to_numpy(value) if isinstance(value, torch.Tensor) else value)
        return f"{array.dtype.name} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"
    if isinstance(value, nn.Module) or depth == DEPTH:
        return kind
    if inspect.isroutine(value) or inspect.isclass(value):
        return _function(value)
    inside = sorted(_inside(value, depth)) if isinstance(value, set | frozenset) else list(_inside(value, depth))
    return f"{kind} ({', '.join(inside)})"


def _inside(value: Any, depth: int) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield f"{_told(name, depth + 1)}: {_told(item, depth + 1)}"
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield _told(item, depth + 1)
    else:
        for name, item in sorted(getattr(value, "__dict__", {}).items()):
            yield f"{name}={_told(item, depth + 1)}"


def _function(value: Any) -> str:
    name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    if name.startswith(("torch.", "transformers.", "numpy.")):
        return name
    try:
        return f"{name} {inspect.getsource(value)}"
    except (OSError, TypeError):
        return name
