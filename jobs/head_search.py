"""The way from the last block's output to the logits, found by arithmetic: norms, linear maps, scales, a soft cap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from actcache.jobs.norms import find_norm
from actcache.jobs.relations import same, scale_of
from actcache.jobs.trace import Call
from actcache.schemas.anatomy import HeadStep, NormParts

MAX_HEAD_STEPS = 6


@dataclass(frozen=True)
class HeadSearch:
    """Looks for a way through the calls that follow the last block; `factors` and `caps` are tried first."""

    calls: Sequence[Call]
    factors: Sequence[float]
    caps: Sequence[float]
    dtype: torch.dtype

    def steps(self, state: torch.Tensor, logits: torch.Tensor) -> list[HeadStep] | None:
        """The steps from a state (sequence, position, d_model) to the logits, or None if there is another way between them."""
        return self._walk(state, logits, frozenset())

    def _walk(self, state: torch.Tensor, logits: torch.Tensor, used: frozenset[str]) -> list[HeadStep] | None:
        if state.shape == logits.shape and same(state, logits):
            return []
        if len(used) > MAX_HEAD_STEPS:
            return None
        for call in self.calls:
            if call.path in used or call.given is None or call.made is None or any(call.module.children()):
                continue
            step, scale = self._step(call), None
            if step is None or call.given.shape != state.shape:
                continue
            if not same(call.given, state):
                scale = scale_of(call.given, state, self.factors, self.dtype)
                if scale is None:
                    continue
            rest = self._walk(call.made, logits, used | {call.path})
            if rest is not None:
                before = [] if scale in (None, 1.0) else [HeadStep(op="scale", factor=scale)]
                return [*before, step, *rest]
        if used and state.shape[:-1] == logits.shape[:-1] and state.shape[-1] >= logits.shape[-1]:
            return self._after_unembedding(state, logits)
        return None

    def _step(self, call: Call) -> HeadStep | None:
        if isinstance(call.module, nn.Linear):
            return HeadStep(op="linear", module=call.path)
        assert call.given is not None
        assert call.made is not None
        norm: NormParts | None = find_norm(call.module, call.given, call.made)
        return None if norm is None else HeadStep(op="norm", module=call.path, norm=norm)

    def _after_unembedding(self, raw: torch.Tensor, logits: torch.Tensor) -> list[HeadStep] | None:
        if raw.shape[-1] > logits.shape[-1]:  # an unembedding padded to a round number of rows
            rest = self._after_unembedding(raw[..., : logits.shape[-1]], logits)
            return None if rest is None else [HeadStep(op="first", rows=int(logits.shape[-1])), *rest]
        if same(raw, logits):
            return []
        bound = 16 * torch.finfo(self.dtype).eps
        ways = {
            (factor, cap): self._cap_error(raw, logits, factor, cap) for factor in self.factors for cap in self.caps
        }
        best = min(ways, key=ways.__getitem__, default=None)
        scale = scale_of(logits, raw, self.factors, self.dtype)
        # In a coarse dtype a scale passes for a soft cap of small logits, so they are compared.
        if scale is not None and (best is None or self._cap_error(raw, logits, scale, None) <= ways[best]):
            return [HeadStep(op="scale", factor=scale)]
        if best is None or ways[best] > bound:
            return None
        before = [] if best[0] == 1.0 else [HeadStep(op="scale", factor=best[0])]
        return [*before, HeadStep(op="softcap", factor=best[1])]

    @staticmethod
    def _cap_error(raw: torch.Tensor, logits: torch.Tensor, factor: float, cap: float | None) -> float:
        """The largest error of an element of the scaled and capped logits, over its size."""
        made = raw.float() * factor
        made = made if cap is None else torch.tanh(made / cap) * cap
        wanted = logits.float()
        return float(((made - wanted).abs() / (wanted.abs() + wanted.std())).max())
