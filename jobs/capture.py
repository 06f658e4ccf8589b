"""Taking the tensors at a model's sites while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from actcache.jobs.parts import ModelParts
from actcache.schemas import sites as names
from actcache.schemas.errors import ProofFailed

Sink = Callable[[str, torch.Tensor], None]


@dataclass(frozen=True)
class Tap:
    """Where a site is read: before a module (its input) or after it (its output), and what is made of the tensor."""

    site: str
    module: nn.Module
    before: bool
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None


def taps(parts: ModelParts, sites: Iterable[str]) -> list[Tap]:
    """The taps of some sites, in model order."""
    found: dict[str, Tap] = {}
    first = names.resid_pre(0)
    found[first] = Tap(first, parts.blocks[0].block, before=True)
    for layer, block in enumerate(parts.blocks):
        for name, module, before in (
            (names.attn_out(layer), block.attention, False),
            (names.resid_mid(layer), block.mid_norm, True),
            (names.mlp_out(layer), block.mlp, False),
            (names.resid_post(layer), block.block, False),
        ):
            found[name] = Tap(name, module, before)
    found[names.FINAL_NORM] = Tap(names.FINAL_NORM, parts.final_norm, True, lambda x: normalised(parts.final_norm, x))
    wanted = set(sites)
    return [tap for name, tap in found.items() if name in wanted]


def normalised(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    """A norm's output before its gain and bias."""
    return nn.functional.layer_norm(x, tuple(norm.normalized_shape), eps=norm.eps)


class _Finished(Exception):
    """Every site has been read: the rest of the forward pass is of no use."""


@torch.inference_mode()
def run(
    parts: ModelParts,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    sites: Iterable[str],
    sink: Sink,
    whole: bool = False,
) -> torch.Tensor | None:
    """Run a batch (sequence, position) and hand each site's tensor (sequence, position, d_model) to `sink`, in model order.

    The tensor is the model's own: `sink` must copy what it keeps. The pass stops after the last site unless `whole`;
    then the final normed state is returned, from which the unembedding makes logits.

    Raises:
        ProofFailed: a site was read more or less than once.
    """
    wanted = taps(parts, sites)
    seen: list[str] = []

    def take(tap: Tap, tensor: torch.Tensor) -> None:
        seen.append(tap.site)
        sink(tap.site, tensor if tap.transform is None else tap.transform(tensor))
        if not whole and tap is wanted[-1]:
            raise _Finished

    state = None
    with _hooked(wanted, take), suppress(_Finished):
        outputs = parts.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        state = outputs.last_hidden_state
    if sorted(seen) != sorted(tap.site for tap in wanted):
        odd = sorted({tap.site for tap in wanted} ^ set(seen)) or [site for site in seen if seen.count(site) > 1]
        raise ProofFailed(
            f"{odd[0]} was not read exactly once in a forward pass; the model's blocks are not run in order"
        )
    return state


@contextmanager
def _hooked(wanted: list[Tap], take: Callable[[Tap, torch.Tensor], None]) -> Iterator[None]:
    handles = []
    try:
        for tap in wanted:
            if tap.before:

                def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tap: Tap = tap) -> None:
                    take(tap, args[0] if args else kwargs["hidden_states"])

                handles.append(tap.module.register_forward_pre_hook(before, with_kwargs=True))
            else:

                def after(module: nn.Module, args: tuple[Any, ...], output: Any, tap: Tap = tap) -> None:
                    take(tap, output[0] if isinstance(output, tuple) else output)

                handles.append(tap.module.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()
