"""Fitting a lens on a dataset: in closed form, and trained from there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from actcache.clients.lens.checkpoint import Checkpoint
from actcache.clients.lens.logit import evaluate
from actcache.clients.lens.ridge import grams, ridge
from actcache.clients.lens.translators import Lens, identity
from actcache.clients.selection import Selectable
from actcache.clients.states import States, states
from actcache.schemas.canonical import digest
from actcache.schemas.errors import InvalidInput, Unsupported

if TYPE_CHECKING:
    from actcache.clients.lens.training import Precision, Progress

MOST_HELD_OUT = 1 << 15
"""Held-out tokens that a lens is measured on when it is made."""
RUNS, RUN = 16, 256
"""Runs of fitted tokens, evenly spaced, on which training is checked, and tokens of each."""


def fit(
    ds: Selectable | States,
    kind: Literal["ridge", "tuned"] = "tuned",
    *,
    shared: bool = False,
    target_offset: int = 0,
    max_tokens: int | None = None,
    held_out: float = 0.1,
    seed: int = 0,
    tokens: int | None = None,
    start: Literal["ridge", "zero"] = "ridge",
    device: str | None = None,
    precision: Precision = "auto",
    checkpoint: str | Path | None = None,
    report: Callable[[Progress], None] | None = None,
) -> Lens:
    """A lens that reads every state of a dataset as h + W h + b, from which the model's own head predicts what it does in the end.

    `ridge` takes one pass: W and b are the least-squares map to the last state, its penalty chosen by document. `tuned`
    goes on from there by natural gradient on KL(final ‖ lens) in nats (Belrose et al. 2023, arXiv 2303.08112; docs/design/0011), and
    needs torch.

    Args:
        ds: a dataset, a selection, or `states(…)`.
        kind: `ridge` or `tuned`.
        shared: one translator for all states, instead of one each.
        target_offset: fit to the prediction that is made so many tokens later (a future lens).
        max_tokens: tokens of the dataset to look at, held-out ones among them.
        held_out: the share of tokens, in whole documents, that nothing is fitted on: `states(ds).split(held_out, seed)` gives them.
        seed: of the split and of the order.
        tokens: how many tokens to train on, passes counted each; by default 3,200 for each dimension of a state, but no more than
            four passes.
        start: begin training at the ridge solution, or at zero, which is the logit lens.
        device: where torch computes, such as `cuda`; by default a GPU if there is one.
        precision: of products with the unembedding while training. `auto` is bfloat16 where the processor multiplies it faster; what
            is reported of a lens is always measured in float32.
        checkpoint: a file that keeps the state of training every half minute, at its end, and when `report` raises; with it, the same
            call goes on after an interruption. It is removed once the lens has been measured.
        report: called after each step. What it raises ends the training.

    Returns:
        The lens. Its `facts` tell the dataset's key, the tokens fitted on, `not_improved`, the translators that training made worse on
        those, which are as they were at the start, and `held_out`: loss, KL, entropy (nats) and agreement (share) by layer, on at most
        32,768 held-out tokens.

    Raises:
        NotFound: the dataset has no head, or lacks a state.
        InvalidInput: arguments that make no sense, too few documents to hold some out, a checkpoint of another training.
        Unsupported: `tuned` without torch.
    """
    if kind not in ("ridge", "tuned"):
        raise InvalidInput(f"kind={kind!r}: there is 'ridge' and 'tuned'")
    if start not in ("ridge", "zero"):
        raise InvalidInput(f"start={start!r}: there is 'ridge' and 'zero'")
    if isinstance(ds, States) and target_offset != ds.offset:
        raise InvalidInput(
            f"target_offset={target_offset}: the states look {ds.offset} tokens ahead; give states(…, offset=) the same"
        )
    trainer = _trainer() if kind == "tuned" else None
    if trainer is not None:
        trainer.check(tokens, device, precision)  # before anything is read
    every = states(ds, offset=target_offset, max_tokens=max_tokens)
    read, outside = every.split(held_out, seed)
    found = grams(read, shared)
    lens = identity(read, shared) if kind == "tuned" and start == "zero" else ridge(read, shared, found)
    facts: dict[str, Any] = {
        "dataset": read.ds.key,
        "labels": list(read.labels),
        "tokens": len(read),
        f"{read.groups.by}s": read.groups.count,
        "seed": seed,
        "held_out_share": held_out,
    }
    kept: Checkpoint | None = None
    if trainer is None:
        facts["penalty"] = [float(each.penalty) for each in found]
    else:
        course = trainer.Course.of(read, tokens)
        training = trainer.Training(read, lens, found, course, seed=seed, device=device, precision=precision)
        facts |= {
            "start": start,
            "steps": course.steps,
            "tokens_a_step": course.size,
            "products_in": training.precision,
        }
        identified = {
            "seed": seed,
            **facts,
            "shared": shared,
            "offset": target_offset,
            "which": _which(read),
            "model": lens.model,
        }
        kept = None if checkpoint is None else Checkpoint(checkpoint, identified)
        lens, facts["not_improved"] = _no_worse(training.run(report, kept), lens, read)
    measured = evaluate(lens, outside.only(np.arange(min(MOST_HELD_OUT, len(outside)))))
    facts["held_out"] = {"tokens": measured.facts["tokens"], **{name: measured[name].tolist() for name in measured}}
    if kept is not None:
        kept.remove()
    return replace(lens, facts=facts)


def _no_worse(trained: Lens, start: Lens, read: States) -> tuple[Lens, list[int]]:
    """The trained lens with the first translators wherever training made the KL worse, on tokens fitted on; and which these are.

    It can where predictions are so sure that the tokens drawn to measure the curvature see none.
    """
    runs = np.linspace(0, max(0, len(read) - RUN), RUNS).astype(np.int64)
    places = np.unique(np.concatenate([np.arange(first, min(first + RUN, len(read))) for first in runs]))
    before, after = (evaluate(each, read.only(places))["kl"] for each in (start, trained))
    number = np.array([trained.translator(layer) for layer in range(read.n_layers)], float)  # NaN for none
    means = ([kl[number == each].mean() for each in range(len(trained.weight))] for kl in (before, after))
    worse = [each for each, (first, last) in enumerate(zip(*means, strict=True)) if not last <= first]
    weight, bias = trained.weight.copy(), trained.bias.copy()
    weight[worse], bias[worse] = start.weight[worse], start.bias[worse]
    return replace(trained, weight=weight, bias=bias), worse


def _which(read: States) -> str:
    """What tells the tokens and states that are fitted on from others."""
    what = [type(read).__name__, list(read.sites), read.kind or "", sha256(read.token.data).hexdigest()]
    return digest(what)[:16]


def _trainer() -> ModuleType:
    try:
        return import_module("actcache.clients.lens.training")
    except ModuleNotFoundError as missing:
        if missing.name != "torch":
            raise
        raise Unsupported(
            "a tuned lens is trained with torch; install it, or fit kind='ridge', which needs none"
        ) from None
