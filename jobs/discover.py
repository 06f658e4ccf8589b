"""Finding the parts of any decoder-only model by what it computes: blocks, what they add to the stream, and the head.

A model is run once on a few tokens. Its blocks are the outermost list of modules that are each called once, each on what
the one before returned. Inside a block, whatever module's output, times a factor, takes the stream from one state to the
next is what attention or the MLP adds. So no family needs to be known by name; what cannot be found is not offered.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from actcache.jobs.norms import find_norm
from actcache.jobs.relations import factor_of, is_sum, same, scale_of
from actcache.jobs.trace import Call, forward, logits_of, watching
from actcache.schemas import sites as names
from actcache.schemas.anatomy import Anatomy, HeadStep, NormParts, Tap
from actcache.schemas.errors import OutOfRange, Unsupported

SEQUENCES, POSITIONS = 2, 19
_FACTOR = re.compile(r"multiplier|scal|alpha|factor", re.IGNORECASE)
_CAP = re.compile(r"cap", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|ff\b|feed_?forward|moe|expert|fc", re.IGNORECASE)
MAX_HEAD_STEPS = 6


@torch.inference_mode()
def discover(model: nn.Module, attention: str, where: str) -> Anatomy:
    """The anatomy of a causal language model that was loaded with that attention, in evaluation mode.

    Raises:
        OutOfRange: a block computes NaN.
        Unsupported: no blocks, or no way from the last block to the logits, can be found.
    """
    ids = _ids(model)
    shape = (int(ids.shape[0]), int(ids.shape[1]))
    blocks = _blocks(model, ids, shape, where)
    search = _Search(model, blocks, shape)
    inside = {path: module for path, module in model.named_modules() if path}
    with watching(inside, shape, search.ended, search.began):
        logits = logits_of(forward(model, ids, torch.ones_like(ids)))
    return search.anatomy(
        logits, where, vocab_size=_vocabulary(model, ids), max_context=max_context(model), attention=attention
    )


def _configs(model: nn.Module) -> list[Any]:
    """The configs that a model of transformers has, its language model's first; none for a module of another kind."""
    config: Any = getattr(model, "config", None)
    return [config.get_text_config(decoder=True), config] if hasattr(config, "get_text_config") else []


def max_context(model: nn.Module) -> int | None:
    """The longest sequence that a model's config, or itself, allows, in tokens; None where positions have no end."""
    for source in (*_configs(model), getattr(model, "config", None), model):
        for name in ("max_position_embeddings", "max_seq_len", "block_size"):
            longest = getattr(source, name, None)
            if isinstance(longest, int) and longest > 0:
                return longest
    return None


def _vocabulary(model: nn.Module, ids: torch.Tensor) -> int:
    """Rows of the embedding that token ids are looked up in."""
    found: list[int] = []

    def look(module: nn.Embedding, args: tuple[Any, ...]) -> None:
        if torch.equal(args[0], ids):
            found.append(module.num_embeddings)

    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    handles = [table.register_forward_pre_hook(look) for table in tables]
    try:
        forward(model, ids, torch.ones_like(ids))
    finally:
        for handle in handles:
            handle.remove()
    stated = [int(config.vocab_size) for config in _configs(model) if hasattr(config, "vocab_size")]
    return max(found) if found else stated[0] if stated else logits_of(forward(model, ids)).shape[-1]


def _ids(model: nn.Module) -> torch.Tensor:
    """A few different tokens, none of which the config gives a meaning of its own."""
    special = {
        value
        for config in _configs(model)
        for name, value in config.to_dict().items()
        if isinstance(value, int) and name.endswith(("_id", "_index"))
    }
    rows = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    rows += [int(config.vocab_size) for config in _configs(model) if hasattr(config, "vocab_size")]
    plain = [token for token in range(min([512, *(size for size in rows if size > 8)])) if token not in special]
    generator = torch.Generator().manual_seed(0)
    positions = min(POSITIONS, max_context(model) or POSITIONS)
    drawn = torch.randint(len(plain), (SEQUENCES, positions), generator=generator)
    return torch.tensor(plain)[drawn].to(next(model.parameters()).device)


def _blocks(model: nn.Module, ids: torch.Tensor, shape: tuple[int, int], where: str) -> list[str]:
    """Paths of the blocks, in order."""
    lists = {
        path: [f"{path}.{name}" for name, _ in module.named_children()]
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    children = {path: model.get_submodule(path) for paths in lists.values() for path in paths}
    calls: dict[str, list[Call]] = {path: [] for path in children}
    with watching(children, shape, lambda call: calls[call.path].append(call)):
        forward(model, ids, torch.ones_like(ids))
    found = [paths for paths in lists.values() if _is_chain([calls[path] for path in paths])]
    sick = [call for made in calls.values() for call in made if call.made is not None and call.made.isnan().any()]
    if sick:
        first = min(sick, key=lambda call: call.ended)
        raise OutOfRange(f"{where}: {first.path} computes NaN from plain tokens; try --compute-dtype float32")
    if not found:
        raise Unsupported(
            f"{where}: no list of blocks that are each run once, each on what the one before returned; "
            "describe the model with actcache.Capturable"
        )
    return min(found, key=lambda paths: (paths[0].count("."), -len(paths)))


def _is_chain(calls: Sequence[Sequence[Call]]) -> bool:
    if any(len(of_one) != 1 for of_one in calls):
        return False
    line = [of_one[0] for of_one in calls]
    if any(call.given is None or call.made is None or call.given.shape != call.made.shape for call in line):
        return False
    return all(same(before.made, after.given) for before, after in pairwise(line))


class _Search:
    """Collects the calls of one forward pass and takes each block apart when it ends."""

    def __init__(self, model: nn.Module, blocks: list[str], shape: tuple[int, int]) -> None:
        self._model = model
        self._blocks = {path: index for index, path in enumerate(blocks)}
        self._shape = shape
        self._dtype = next(model.parameters()).dtype
        self._factors = [1.0, *_numbers(model, _FACTOR)]
        self._caps = _numbers(model, _CAP)
        self._inside: list[Call] = []
        self._outside: list[Call] = []
        self._in_block = False
        self._last: Call | None = None
        self._taps: dict[str, Tap] = {}
        self._count: dict[str, int] = {}
        self._widths: dict[str, int] = {}
        self._ended: dict[str, int] = {}

    def began(self, call: Call) -> None:
        if call.path in self._blocks:
            self._inside, self._in_block = [], True

    def ended(self, call: Call) -> None:
        self._count[call.path] = self._count.get(call.path, 0) + 1
        if call.made is not None:
            self._widths[call.path], self._ended[call.path] = int(call.made.shape[-1]), call.ended
        if call.path in self._blocks:
            self._in_block = False
            self._last = call
            self._take_apart(self._blocks[call.path], call)
            self._inside = []
        elif self._in_block:
            self._inside.append(call)
        elif self._last is not None:
            self._outside.append(call)

    def _take_apart(self, layer: int, block: Call) -> None:
        pre, post = block.given, block.made
        assert pre is not None
        assert post is not None
        if layer == 0:
            self._taps[names.resid_pre(0)] = Tap(module=block.path, at="input")
        stream = [call for call in self._inside if call.given is not None and call.given.shape == pre.shape]
        added = _outermost([call for call in self._inside if call.made is not None and call.made.shape == pre.shape])
        found = self._sequential(layer, pre, post, stream, added) or self._joined(layer, pre, post, added)
        self._taps |= found
        self._taps[names.resid_post(layer)] = Tap(module=block.path, at="output")

    def _sequential(
        self, layer: int, pre: torch.Tensor, post: torch.Tensor, stream: list[Call], added: list[Call]
    ) -> dict[str, Tap]:
        """Attention, then MLP: pre → mid → post. The last addition is looked for first."""
        for reader in _distinct(stream):
            mid = reader.given
            assert mid is not None
            if same(mid, pre) or same(mid, post) or is_sum(post, mid, [], self._dtype):
                continue
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
        if is_sum(post, pre, [], self._dtype):
            return {}
        for call in added:
            factor = self._factor(post, pre, call)
            if factor is not None:
                name = names.mlp_out if _MLP.search(_kind(call)) else names.attn_out
                return {name(layer): Tap(module=call.path, at="output", factor=factor)}
        for index, one in enumerate(added):
            for other in added[index + 1 :]:
                factors = self._two_factors(post, pre, one, other)
                if factors is None:
                    continue
                mlp = [bool(_MLP.search(_kind(call))) for call in (one, other)]
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
        return factor_of(total, base, term.made, self._factors, self._dtype)

    def _two_factors(
        self, total: torch.Tensor, base: torch.Tensor, one: Call, other: Call
    ) -> tuple[float, float] | None:
        if one.made is None or other.made is None or _nested(one.path, other.path):
            return None
        pairs = [(a, b) for a in self._factors for b in self._factors]
        columns = torch.stack([one.made.double().flatten(), other.made.double().flatten()], dim=1).cpu()
        target = (total.double() - base.double()).flatten()[:, None].cpu()
        fitted = torch.linalg.lstsq(columns, target).solution.flatten().tolist()
        for a, b in [*pairs, (fitted[0], fitted[1])]:
            if abs(a - fitted[0]) + abs(b - fitted[1]) > 0.1 * (abs(a) + abs(b)):
                continue
            if is_sum(total, base, [(one.made, a), (other.made, b)], self._dtype):
                return a, b
        return None

    def anatomy(
        self, logits: torch.Tensor, where: str, *, vocab_size: int, max_context: int | None, attention: str
    ) -> Anatomy:
        """What was found, with the way from the last block to the logits."""
        assert self._last is not None
        assert self._last.made is not None
        head = self._head(self._last.made, logits, where)
        first = head[0]
        taps = dict(self._taps)
        if first.op == "norm" and first.module is not None:
            # Not the norm's own input: a model may use one norm in several places.
            taps[names.FINAL_NORM] = Tap(module=self._last.path, at="output")
        unembedding = [step.module for step in head if step.op == "linear"][-1]
        last = next(call.began for call in self._outside if call.path == unembedding)
        once = {
            path: width
            for path, width in self._widths.items()
            if self._count[path] == 1 and self._ended[path] < last  # logits are no site: capture stops before them
        }
        return Anatomy(
            blocks=tuple(self._blocks),
            d_model=int(self._last.made.shape[-1]),
            vocab_size=vocab_size,
            max_context=max_context,
            attention=attention,
            taps=taps,
            head=tuple(head),
            modules=once,
        )

    def _head(self, state: torch.Tensor, logits: torch.Tensor, where: str) -> list[HeadStep]:
        """The steps from the last block's output to the logits: norm, projections, scales, a soft cap."""
        paths = self._walk(state, logits, frozenset())
        if paths is None:
            raise Unsupported(
                f"{where}: the logits are not made of the last block's output by a norm, linear maps, a scale and a soft cap; "
                "describe the model with actcache.Capturable"
            )
        return paths

    def _walk(self, state: torch.Tensor, logits: torch.Tensor, used: frozenset[str]) -> list[HeadStep] | None:
        if state.shape == logits.shape and same(state, logits):
            return []
        if len(used) > MAX_HEAD_STEPS:
            return None
        for call in self._outside:
            if call.path in used or call.given is None or call.made is None or any(call.module.children()):
                continue
            step, scale = self._step(call), None
            if step is None or call.given.shape != state.shape:
                continue
            if not same(call.given, state):
                scale = scale_of(call.given, state, self._factors, self._dtype)
                if scale is None:
                    continue
            rest = self._walk(call.made, logits, used | {call.path})
            if rest is not None:
                before = [] if scale is None else [HeadStep(op="scale", factor=scale)]
                return [*before, step, *rest]
        if state.shape == logits.shape and used:
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
        scale = scale_of(logits, raw, self._factors, self._dtype)
        if scale is not None:
            return [HeadStep(op="scale", factor=scale)]
        for factor in self._factors:
            for cap in self._caps:
                capped = torch.tanh(raw.float() * factor / cap) * cap
                bound = 16 * torch.finfo(self._dtype).eps
                if bool(((capped - logits.float()).abs() <= bound * (logits.float().abs() + 1)).all()):
                    before = [] if factor == 1.0 else [HeadStep(op="scale", factor=factor)]
                    return [*before, HeadStep(op="softcap", factor=cap)]
        return None


def _numbers(model: nn.Module, name: re.Pattern[str]) -> list[float]:
    """Every number of a model's config whose name says that it may be a factor, and its inverse."""
    found: list[float] = []
    for config in _configs(model):
        for key, value in config.to_dict().items():
            if name.search(key) and isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                found += [float(value), 1.0 / float(value)] if name is _FACTOR else [float(value)]
    return list(dict.fromkeys(found))


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


def _kind(call: Call) -> str:
    return f"{call.path.rsplit('.', 1)[-1]} {type(call.module).__name__}"


def _nested(one: str, other: str) -> bool:
    return one.startswith(f"{other}.") or other.startswith(f"{one}.")
