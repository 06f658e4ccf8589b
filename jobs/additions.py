"""What attention and MLP add to the residual stream, found by arithmetic.

Inside a block, whatever module's output, times a factor, takes the stream from one state to the next is what attention or
the MLP adds; the state between them is whatever a module reads that is neither the block's input nor its output. So no family
needs to be known by name, and what cannot be found is not offered.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from actcache.jobs.relations import ROUNDINGS, factor_of, is_sum, same, sampled, sum_error
from actcache.jobs.trace import Call
from actcache.schemas import sites as names
from actcache.schemas.anatomy import Tap

SLACK = 8 * ROUNDINGS
_ATTENTION = re.compile(r"att(n|ention)", re.IGNORECASE)
_MIXER = re.compile(r"att(n|ention)|mix|mamba|ssm|rnn|recurren|conv|lstm|retention|rwkv|time", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|ff\b|feed_?forward|moe|expert|fc", re.IGNORECASE)


@dataclass(frozen=True)
class Additions:
    """Looks for sums in the calls of a block; `factors` are tried first, `dtype` decides what rounding explains."""

    factors: Sequence[float]
    dtype: torch.dtype

    def taps(self, layer: int, block: Call, inside: list[Call]) -> dict[str, Tap]:
        """The sites of a block, of which `inside` are the calls in it, in model order."""
        pre, post = block.given, block.made
        assert pre is not None
        assert post is not None
        taps = {names.resid_pre(0): Tap(module=block.path, at="input")} if layer == 0 else {}
        stream = [call for call in inside if call.given is not None and call.given.shape == pre.shape]
        added = _outermost([call for call in inside if call.made is not None and call.made.shape == pre.shape])
        taps |= self._sequential(layer, pre, post, stream, added) or self._joined(layer, pre, post, added)
        taps[names.resid_post(layer)] = Tap(module=block.path, at="output")
        return taps

    def _sequential(
        self, layer: int, pre: torch.Tensor, post: torch.Tensor, stream: list[Call], added: list[Call]
    ) -> dict[str, Tap]:
        """Attention, then MLP: pre → mid → post. The last addition is looked for first."""
        for reader in _distinct(stream):
            mid = reader.given
            assert mid is not None
            if any(is_sum(end, mid, [], self.dtype) for end in (pre, post)):
                continue  # an end of the block itself, or the same in a narrower dtype
            for last in added:
                if last.ended < reader.began:
                    continue
                factor = self._factor(post, mid, last)
                if factor is None:
                    continue
                found = {
                    names.resid_mid(layer): Tap(module=reader.path, at="input"),
                    names.mlp_out(layer): Tap(module=last.path, at="output", factor=factor),
                }
                return self._first_addition(layer, pre, mid, [c for c in added if c.ended < reader.began]) | found
        return {}

    def _first_addition(self, layer: int, pre: torch.Tensor, mid: torch.Tensor, added: list[Call]) -> dict[str, Tap]:
        """What takes the stream to `mid`; in the first block it may begin after a norm of the embedding."""
        for call in added:
            factor = self._factor(mid, pre, call)
            if factor is not None:
                return {names.attn_out(layer): Tap(module=call.path, at="output", factor=factor)}
        for begin in added if layer == 0 else []:
            for call in added:
                factor = None if call.began < begin.ended else self._factor(mid, begin.made, call)
                if factor is not None:
                    return {
                        names.resid_pre(0): Tap(module=begin.path, at="output"),
                        names.attn_out(layer): Tap(module=call.path, at="output", factor=factor),
                    }
        return {}

    def _joined(self, layer: int, pre: torch.Tensor, post: torch.Tensor, added: list[Call]) -> dict[str, Tap]:
        """Attention and MLP side by side, or one of them alone: pre → post."""
        if is_sum(post, pre, [], self.dtype):
            return {}
        for call in added:
            factor = self._factor(post, pre, call)
            if factor is not None:
                return _lone(layer, call, factor)
        for index, one in enumerate(added):
            for other in added[index + 1 :]:
                factors = self._two_factors(post, pre, one, other)
                if factors is None:
                    continue
                mlp = [_is_mlp(call) for call in (one, other)]
                if mlp[0] == mlp[1]:
                    return {}
                first, second = (one, other) if mlp[1] else (other, one)
                by = dict(zip((one.path, other.path), factors, strict=True))
                return {
                    names.attn_out(layer): Tap(module=first.path, at="output", factor=by[first.path]),
                    names.mlp_out(layer): Tap(module=second.path, at="output", factor=by[second.path]),
                }
        return {}

    def _factor(self, total: torch.Tensor, base: torch.Tensor | None, term: Call) -> float | None:
        if base is None or term.made is None:
            return None
        return factor_of(total, base, term.made, self.factors, self.dtype)

    def _two_factors(
        self, total: torch.Tensor, base: torch.Tensor, one: Call, other: Call
    ) -> tuple[float, float] | None:
        if one.made is None or other.made is None or _nested(one.path, other.path):
            return None
        if not self._may_be_two(total, base, one.made, other.made):
            return None
        pairs = [(a, b) for a in self.factors for b in self.factors]
        columns = torch.stack([one.made.double().flatten(), other.made.double().flatten()], dim=1).cpu()
        target = (total.double() - base.double()).flatten()[:, None].cpu()
        fitted = torch.linalg.lstsq(columns, target).solution.flatten().tolist()
        for a, b in [*pairs, (fitted[0], fitted[1])]:
            if abs(a - fitted[0]) + abs(b - fitted[1]) > 0.1 * (abs(a) + abs(b)):
                continue
            if is_sum(total, base, [(one.made, a), (other.made, b)], self.dtype):
                return a, b
        return None

    def _may_be_two(self, total: torch.Tensor, base: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> bool:
        """Whether some factors fit a few elements, by far more than rounding: to try all of every pair takes hours."""
        few = [sampled(tensor).double().cpu() for tensor in (total, base, one, other)]
        target = (few[0] - few[1])[:, None]
        a, b = torch.linalg.lstsq(torch.stack(few[2:], dim=1), target).solution.flatten().tolist()
        return sum_error(few[0], few[1], [a * few[2], b * few[3]]) <= SLACK * torch.finfo(self.dtype).eps


def _outermost(calls: list[Call]) -> list[Call]:
    """Calls by depth, then in order: of modules that return the same tensor the outermost is the one to name."""
    return sorted(calls, key=lambda call: (call.path.count("."), call.began))


def _distinct(calls: list[Call]) -> list[Call]:
    """The outermost reader of each different tensor, the last tensor first."""
    kept: list[Call] = []
    for call in _outermost(calls):
        if not any(same(call.given, other.given) for other in kept):
            kept.append(call)
    return sorted(kept, key=lambda call: -call.began)


def _lone(layer: int, call: Call, factor: float) -> dict[str, Tap]:
    """What a block's only addition is, by its module's name; nothing where the name does not tell."""
    tap = Tap(module=call.path, at="output", factor=factor)
    if _is_mlp(call):
        return {names.mlp_out(layer): tap}
    return {names.attn_out(layer): tap} if _MIXER.search(_kind(call)) else {}


def _kind(call: Call) -> str:
    return f"{call.path.rsplit('.', 1)[-1]} {type(call.module).__name__}"


def _is_mlp(call: Call) -> bool:
    """Whether a module is called an MLP. The attention of a family of experts may have them in its class's name."""
    return _ATTENTION.search(_kind(call)) is None and _MLP.search(_kind(call)) is not None


def _nested(one: str, other: str) -> bool:
    return one.startswith(f"{other}.") or other.startswith(f"{one}.")
