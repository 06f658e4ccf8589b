"""Finding the parts of any decoder-only model by what it computes: blocks, what they add to the stream, and the head.

A model is run on a few tokens. Its blocks are the longest outermost list of modules that are each called once, each on what the one
before returned; `additions` takes each block apart, `head_search` finds the way from the last one to the logits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from actcache.jobs.additions import Additions
from actcache.jobs.head_search import HeadSearch
from actcache.jobs.relations import same
from actcache.jobs.trace import Call, forward, logits_of, watching
from actcache.schemas import sites as names
from actcache.schemas.anatomy import Anatomy, Tap
from actcache.schemas.errors import OutOfRange, Unsupported

SEQUENCES, POSITIONS = 2, 19
_FACTOR = re.compile(r"multiplier|scal|alpha|factor", re.IGNORECASE)
_CAP = re.compile(r"cap", re.IGNORECASE)


@torch.inference_mode()
def discover(model: nn.Module, attention: str, where: str) -> Anatomy:
    """The anatomy of a causal language model that was loaded with that attention, in evaluation mode.

    Raises:
        OutOfRange: a block computes NaN.
        Unsupported: no blocks, or no way from the last block to the logits, can be found.
    """
    ids = plain_ids(model)
    shape = (int(ids.shape[0]), int(ids.shape[1]))
    blocks = _blocks(model, ids, shape, where)
    search = _Search(model, blocks)
    inside = {path: module for path, module in model.named_modules() if path}
    with _looked_up(model, ids) as rows, watching(inside, shape, search.ended, search.began):
        logits = logits_of(forward(model, ids, torch.ones_like(ids)))
    if tuple(logits.shape[:2]) != shape:
        raise Unsupported(
            f"{where}: its logits are of shape {tuple(logits.shape)} for {shape[0]} × {shape[1]} tokens; let it return logits "
            "of every position, (sequence, position, vocabulary)"
        )
    if not logits.isfinite().all():
        raise OutOfRange(f"{where}: its logits are not finite for plain tokens; try --compute-dtype float32")
    stated = [int(config.vocab_size) for config in _configs(model) if hasattr(config, "vocab_size")]
    return search.anatomy(
        logits,
        where,
        vocab_size=max(rows) if rows else (stated or [int(logits.shape[-1])])[0],
        max_context=max_context(model),
        attention=attention,
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


@contextmanager
def _looked_up(model: nn.Module, ids: torch.Tensor) -> Iterator[list[int]]:
    """While a model runs, the rows of the embeddings that these token ids are looked up in."""
    rows: list[int] = []

    def look(module: nn.Embedding, args: tuple[Any, ...]) -> None:
        if isinstance(args[0], torch.Tensor) and torch.equal(args[0], ids):
            rows.append(module.num_embeddings)

    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    handles = [table.register_forward_pre_hook(look) for table in tables]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def plain_ids(model: nn.Module, sequences: int = SEQUENCES, positions: int = POSITIONS) -> torch.Tensor:
    """Token ids (sequence, position) drawn at random, none of which the config gives a meaning of its own.

    Fewer positions where the model allows no more.
    """
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
    positions = min(positions, max_context(model) or positions)
    drawn = torch.randint(len(plain), (sequences, positions), generator=generator)
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
    outer = [paths for paths in found if not any(_holds(other, paths) for other in found)]
    return min(outer, key=lambda paths: (-len(paths), -_size(model, paths), paths[0].count(".")))


def _size(model: nn.Module, paths: Sequence[str]) -> int:
    """Number of parameters, which tells blocks from a list of one norm."""
    return sum(parameter.numel() for path in paths for parameter in model.get_submodule(path).parameters())


def _holds(outer: Sequence[str], inner: Sequence[str]) -> bool:
    return any(inner[0].startswith(f"{path}.") for path in outer)


def _is_chain(calls: Sequence[Sequence[Call]]) -> bool:
    if any(len(of_one) != 1 for of_one in calls):
        return False
    line = [of_one[0] for of_one in calls]
    if any(call.given is None or call.made is None or call.given.shape != call.made.shape for call in line):
        return False
    return all(same(before.made, after.given) for before, after in pairwise(line))


class _Search:
    """Collects the calls of one forward pass and takes each block apart when it ends."""

    def __init__(self, model: nn.Module, blocks: list[str]) -> None:
        self._blocks = {path: index for index, path in enumerate(blocks)}
        self._dtype = next(model.parameters()).dtype
        self._factors = [1.0, *_numbers(model, _FACTOR)]
        self._caps = _numbers(model, _CAP)
        self._additions = Additions(self._factors, self._dtype)
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
            self._taps |= self._additions.taps(self._blocks[call.path], call, self._inside)
            self._inside = []
        elif self._in_block:
            self._inside.append(call)
        elif self._last is not None:
            self._outside.append(call)

    def anatomy(
        self, logits: torch.Tensor, where: str, *, vocab_size: int, max_context: int | None, attention: str
    ) -> Anatomy:
        """What was found, with the way from the last block to the logits."""
        assert self._last is not None
        assert self._last.made is not None
        head = HeadSearch(self._outside, self._factors, self._caps, self._dtype).steps(self._last.made, logits)
        if not head:
            raise Unsupported(
                f"{where}: the logits are not made of the last block's output by a norm, linear maps, a scale and a soft cap; "
                "describe the model with actcache.Capturable"
            )
        # A module that several blocks share would be read several times.
        taps = {site: tap for site, tap in self._taps.items() if self._count[tap.module] == 1}
        if head[0].op == "norm":
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


def _numbers(model: nn.Module, name: re.Pattern[str]) -> list[float]:
    """Every number of a model's config whose name says that it may be a factor, and its inverse."""
    found: list[float] = []
    for config in _configs(model):
        for key, value in config.to_dict().items():
            if name.search(key) and isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                found += [float(value), 1.0 / float(value)] if name is _FACTOR else [float(value)]
    return list(dict.fromkeys(found))
