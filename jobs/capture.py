"""Taking the tensors at a model's sites while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from actcache.jobs.inputs import Inputs
from actcache.jobs.parts import ModelParts, ModuleTap
from actcache.jobs.trace import arguments
from actcache.schemas.errors import ProofFailed

Sink = Callable[[str, torch.Tensor], None]


class _Finished(Exception):
    """Every site has been read: the rest of the forward pass is of no use."""


@torch.inference_mode()
def run(
    parts: ModelParts,
    inputs: Inputs,
    sites: Iterable[str],
    sink: Sink,
    whole: bool = False,
) -> torch.Tensor | None:
    """Run a batch and hand each site's tensor (sequence, position, width) to `sink`, as it is computed.

    The tensor is the model's own: `sink` must copy what it keeps. The pass stops after the last site unless `whole`;
    then it stops before the unembedding, and what that is given (sequence, position, width) is returned:
    `parts.logits` makes logits of it.

    Raises:
        ProofFailed: a site was read more or less than once.
        InvalidInput: a site has not one vector a position.
    """
    wanted = parts.taps(sites)
    seen: list[str] = []
    final: list[torch.Tensor] = []

    def take(tap: ModuleTap, value: Any) -> None:
        tensor = inputs.vectors(value, tap.site)
        seen.append(tap.site)
        sink(tap.site, tensor if tap.transform is None else tap.transform(tensor))
        if not whole and len(seen) == len(wanted):
            raise _Finished

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        final.append(inputs.vectors(arguments(args, kwargs), "what the unembedding is given"))
        raise _Finished

    with _stopped(parts, stop), _hooked(wanted, take), suppress(_Finished):
        inputs.call(parts.model)
    if sorted(seen) != sorted(tap.site for tap in wanted):
        odd = sorted({tap.site for tap in wanted} ^ set(seen)) or [site for site in seen if seen.count(site) > 1]
        raise ProofFailed(
            f"{odd[0]} was not read exactly once in a forward pass; the model's blocks are not run in order"
        )
    return final[0] if final else None


def keep_nothing(site: str, tensor: torch.Tensor) -> None:
    """A sink for who wants the pass alone."""


def read_sites(parts: ModelParts, inputs: Inputs, sites: Iterable[str]) -> dict[str, torch.Tensor]:
    """Run a batch and keep every site's tensor (sequence, position, width).

    Copies, also on the CPU: a model may change a tensor that it has handed on, as Falcon adds attention's output to the MLP's.

    Raises:
        ProofFailed, InvalidInput: as `run`.
    """
    found: dict[str, torch.Tensor] = {}
    run(parts, inputs, sites, lambda site, tensor: found.update({site: tensor.clone()}))
    return found


@contextmanager
def _stopped(parts: ModelParts, stop: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]) -> Iterator[None]:
    """Call `stop` before the unembedding, if the model has a head."""
    handle = parts.unembedding.register_forward_pre_hook(stop, with_kwargs=True) if parts.anatomy.head else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


@contextmanager
def _hooked(wanted: list[ModuleTap], take: Callable[[ModuleTap, Any], None]) -> Iterator[None]:
    handles = []
    try:
        for tap in wanted:
            if tap.before:

                def before(
                    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tap: ModuleTap = tap
                ) -> None:
                    take(tap, arguments(args, kwargs))

                handles.append(tap.module.register_forward_pre_hook(before, with_kwargs=True))
            else:

                def after(module: nn.Module, args: tuple[Any, ...], output: Any, tap: ModuleTap = tap) -> None:
                    take(tap, output)

                handles.append(tap.module.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()
