"""Watching a forward pass: which modules are called, in what order, with which vectors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class Call:
    """One call of a module.

    `given` and `made` are the first floating-point tensor of its arguments and of its result, if it has one vector a token,
    as (sequence, position, width) copies; `began` and `ended` order the calls.
    """

    path: str
    module: nn.Module
    began: int
    given: torch.Tensor | None
    ended: int = -1
    made: torch.Tensor | None = None


def forward(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
    """Call a causal language model on ids (sequence, position), without its cache; pass what its forward takes."""
    takes = inspect.signature(model.forward).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    optional: dict[str, Any] = {"attention_mask": mask, "use_cache": False}
    return model(ids, **{name: value for name, value in optional.items() if name in takes or anything})


def logits_of(result: Any) -> torch.Tensor:
    """The logits (sequence, position, vocabulary) of what a causal language model returned."""
    if isinstance(result, tuple) and result and isinstance(result[0], torch.Tensor):
        return result[0]
    return result if isinstance(result, torch.Tensor) else result.logits


def vectors(value: Any, shape: tuple[int, int]) -> torch.Tensor | None:
    """The first floating-point tensor in arguments or results with one vector a token, or None.

    It is (sequence, position, width), or (sequence · position, width), which is reshaped.
    """
    for tensor in _tensors(value):
        if tensor.ndim == 3 and tuple(tensor.shape[:2]) == shape:
            return tensor
        if tensor.ndim == 2 and len(tensor) == shape[0] * shape[1]:
            return tensor.reshape(*shape, -1)
    return None


def first_tensor(value: Any) -> torch.Tensor | None:
    """The first floating-point tensor in arguments or results, or None."""
    return next(_tensors(value), None)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """A module's arguments with the stream first, wherever it was passed."""
    return (*args, kwargs.get("hidden_states"), kwargs)


@contextmanager
def watching(
    modules: Mapping[str, nn.Module],
    shape: tuple[int, int],
    ended: Callable[[Call], None],
    began: Callable[[Call], None] | None = None,
) -> Iterator[None]:
    """Call `began` and `ended` for every call of some modules, by path."""
    clock = iter(range(1 << 62))
    open_calls: list[Call] = []
    handles = []

    def before(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = vectors(arguments(args, kwargs), shape)
        call = Call(path, module, next(clock), None if given is None else given.detach().clone())
        open_calls.append(call)
        if began is not None:
            began(call)

    def after(path: str, output: Any) -> None:
        while open_calls:
            call = open_calls.pop()
            if call.path == path:
                made = vectors(output, shape)
                call.made = None if made is None else made.detach().clone()
                call.ended = next(clock)
                ended(call)
                return

    try:
        for path, module in modules.items():
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, args, kwargs, path=path: before(path, m, args, kwargs), with_kwargs=True
                )
            )
            handles.append(module.register_forward_hook(lambda m, args, output, path=path: after(path, output)))
        yield
    finally:
        for handle in handles:
            handle.remove()
