"""Proof that the captured tensors are what the model computes, on real tokens, before anything is stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from actcache.jobs.capture import read_sites, run
from actcache.jobs.head import numpy_head, to_numpy
from actcache.jobs.inputs import Inputs, TokenInputs
from actcache.jobs.norms import gain_and_bias
from actcache.jobs.parts import ModelParts
from actcache.jobs.relations import ROUNDINGS, sum_error
from actcache.jobs.trace import arguments, forward, logits_of
from actcache.schemas import sites as names
from actcache.schemas.errors import ProofFailed

PROOF_TOKENS = 1024
EXTRA_PADDING = 8
IDENTITIES = {
    "logits": "the final norm and unembedding of the last block's output make the model's own logits",
    "stream": "each block is given what the one before returned, bit for bit",
    "attention": "resid_pre + attn_out = resid_mid",
    "mlp": "resid_mid + mlp_out = resid_post",
    "parallel": "resid_pre + attn_out + mlp_out = resid_post, where a block has no resid_mid",
    "final_norm": "hook_normalized · gain + bias is the final norm's output",
    "head": "the stored head, evaluated in numpy, makes the model's logits",
    "padding": "padding on the right changes no state of a real token",
    "batch": "a sequence has the same states alone and among others",
    "causality": "the states of a sequence's first half are those of the first half alone",
    "modules": "the outputs of modules that are asked for do not depend on padding, nor on a batch's other sequences",
}


@dataclass(frozen=True)
class Identity:
    """How far an identity is from holding, and how far rounding explains: ratios of norms or of elements."""

    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether it holds but for rounding. A NaN does not."""
        return self.error <= self.tolerance


def tolerance(dtype: str, n_layers: int) -> float:
    """The relative error, as a ratio of norms, that another order of computing the same states may cause.

    Rounding errors of n_layers + 1 additions to the stream grow as the square root of their number; the factor 4 is for
    what kernels do inside a block. The floor is for float32, whose smallest errors no one minds.
    """
    return max(1e-4, 4 * _eps(dtype) * math.sqrt(n_layers + 1))


def exact_tolerance(dtype: str) -> float:
    """The relative error that the rounding of a few operations may cause, where both sides do the same ones."""
    return max(1e-5, 4 * _eps(dtype))


def _eps(dtype: str) -> float:
    return float(torch.finfo(getattr(torch, dtype)).eps)


def largest(*errors: float) -> float:
    """The largest of some errors, 0 of none; NaN if one is, which `max` may lose."""
    return float(np.max([0.0, *errors]))


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖a - b‖ / ‖b‖ over the whole tensors, in float64."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def prove(
    parts: ModelParts, ids: torch.Tensor, mask: torch.Tensor, dtype: str, modules: Sequence[str] = ()
) -> dict[str, float]:
    """Check every identity of `IDENTITIES` that the model's sites allow. Returns their errors.

    `ids` and `mask` are (sequence, position), int64, padded on the right; the few longest sequences, at most `PROOF_TOKENS`
    tokens of them, are used.

    Raises:
        ProofFailed: an error is beyond the tolerance of the dtype; the message names the identity.
    """
    found = identities(parts, ids, mask, dtype, modules)
    for name, identity in found.items():
        if not identity.holds:
            raise ProofFailed(
                f"this {type(parts.model).__name__} fails the identity {name!r} ({IDENTITIES[name]}): relative error "
                f"{identity.error:.3g}, tolerance {identity.tolerance:.3g}; it would be stored wrongly, so nothing is stored"
            )
    return {name: identity.error for name, identity in found.items()}


def prove_sites(
    parts: ModelParts, sites: Sequence[str], together: Inputs, alone: Sequence[Inputs], dtype: str
) -> dict[str, float]:
    """Check the one identity that holds for any module: an item has the same vectors alone and among others.

    `alone[i]` is sequence i of the batch `together` by itself, without padding. Returns its error.

    Raises:
        ProofFailed: an error is beyond the tolerance of the dtype; the message names the site.
    """
    batch = read_sites(parts, together, sites)
    bound, worst = tolerance(dtype, len(sites)), 0.0
    for row, inputs in enumerate(alone):
        for site, found in read_sites(parts, inputs, sites).items():
            error = _error(batch[site][row, : found.shape[1]], found[0])
            worst = max(worst, error)
            if not error <= bound:
                raise ProofFailed(
                    f"{site}: fails the identity 'batch' ({IDENTITIES['batch']}): relative error {error:.3g}, tolerance {bound:.3g}; "
                    "a module that mixes the items of a batch, or draws at random, cannot be stored"
                )
    return {"batch": worst}


@torch.inference_mode()
def identities(
    parts: ModelParts, ids: torch.Tensor, mask: torch.Tensor, dtype: str, modules: Sequence[str] = ()
) -> dict[str, Identity]:
    """The error of every identity that the model's sites allow, by name, in the order of `IDENTITIES`.

    The longest sequences come first: one token alone has no padding and no causality to speak of. `modules` are the sites
    `module:…` that are stored.
    """
    few = max(1, PROOF_TOKENS // ids.shape[1])
    longest = mask.sum(1).argsort(descending=True, stable=True)[:few]
    ids, mask = (part[longest, :PROOF_TOKENS].to(parts.device) for part in (ids, mask))
    states, pres, given = _states(parts, ids, mask, parts.anatomy.sites)
    own = mask.bool()
    logits = logits_of(forward(parts.model, ids, mask))[own]
    last = states[names.resid_post(parts.anatomy.n_layers - 1)][own]
    exact = exact_tolerance(dtype)
    made = [parts.head(last), parts.logits(given[own])]
    found = {"logits": Identity(largest(*(relative_error(way, logits) for way in made)), exact)}
    found["stream"] = Identity(_stream_error(states, pres), 0.0)
    roundings = ROUNDINGS * _eps(dtype)
    kept = {site: state[own] for site, state in states.items()}
    for name, errors in _additions(kept, parts.anatomy.n_layers).items():
        if errors:
            found[name] = Identity(largest(*errors), roundings)
    if names.FINAL_NORM in states:
        found["final_norm"] = Identity(_norm_error(parts, kept[names.FINAL_NORM], last), exact)
    found["head"] = Identity(_head_error(parts, last, logits), exact)
    others = tolerance(dtype, parts.anatomy.n_layers)
    del states, kept, pres  # of a large model they are gigabytes
    stream = [site for site in parts.anatomy.sites if names.is_residual(site)]
    row = ids[0, : int(mask[0].sum())]
    alone = read_sites(parts, _unpadded(row[None]), stream)
    for name, measure in _CONTEXTS.items():
        found[name] = Identity(measure(parts, row, alone), others)
    if modules:
        alone = read_sites(parts, _unpadded(row[None]), modules)
        errors = [measure(parts, row, alone) for measure in (_padding_error, _batch_error)]
        found["modules"] = Identity(largest(*errors), others)
    return found


def _states(
    parts: ModelParts, ids: torch.Tensor, mask: torch.Tensor, sites: Sequence[str]
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """The tensors of some sites, what each block was really given, and what the unembedding was."""
    states: dict[str, torch.Tensor] = {}
    pres: list[torch.Tensor] = []

    def keep(site: str, tensor: torch.Tensor) -> None:
        states[site] = tensor.clone()

    inputs = TokenInputs(ids, mask)

    def given(module: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        pres.append(inputs.vectors(arguments(args, kwargs), "a block's input").clone())

    handles = [block.register_forward_pre_hook(given, with_kwargs=True) for block in parts.blocks]
    try:
        state = run(parts, inputs, sites, keep, whole=True)
    finally:
        for handle in handles:
            handle.remove()
    assert state is not None
    return states, pres, state


def _stream_error(states: Mapping[str, torch.Tensor], pres: list[torch.Tensor]) -> float:
    posts = [states[names.resid_post(layer)] for layer in range(len(pres))]
    return largest(*(relative_error(post, pre) for post, pre in zip(posts[:-1], pres[1:], strict=True)))


def _additions(states: Mapping[str, torch.Tensor], n_layers: int) -> dict[str, list[float]]:
    """Errors of the sums that lead from each block's input to its output, by identity."""
    errors: dict[str, list[float]] = {"attention": [], "mlp": [], "parallel": []}
    for layer in range(n_layers):
        pre = states[names.resid_pre(0) if layer == 0 else names.resid_post(layer - 1)]
        post, mid = states[names.resid_post(layer)], states.get(names.resid_mid(layer))
        attention, mlp = states.get(names.attn_out(layer)), states.get(names.mlp_out(layer))
        if mid is not None and attention is not None:
            errors["attention"].append(sum_error(mid, pre, [attention]))
        if mid is not None and mlp is not None:
            errors["mlp"].append(sum_error(post, mid, [mlp]))
        if mid is None and (attention is not None or mlp is not None):
            errors["parallel"].append(sum_error(post, pre, [term for term in (attention, mlp) if term is not None]))
    return errors


def _norm_error(parts: ModelParts, normalised: torch.Tensor, last: torch.Tensor) -> float:
    step = parts.anatomy.final_norm
    assert step is not None
    assert step.norm is not None
    assert step.module is not None
    module = parts.model.get_submodule(step.module)
    gain, bias = gain_and_bias(step.norm, module)
    scaled = normalised.float() * (1 if gain is None else gain) + (0 if bias is None else bias)
    return relative_error(scaled, module(last))


def _head_error(parts: ModelParts, last: torch.Tensor, logits: torch.Tensor) -> float:
    head = numpy_head(parts)
    head.check(parts.anatomy.d_model)
    return relative_error(torch.from_numpy(head.logits(to_numpy(last).astype(np.float32))), logits.cpu())


def _unpadded(ids: torch.Tensor) -> TokenInputs:
    return TokenInputs(ids, torch.ones_like(ids))


def _padding_error(parts: ModelParts, row: torch.Tensor, alone: Mapping[str, torch.Tensor]) -> float:
    """A sequence alone against the same padded on the right, and against its half among longer ones."""
    length = len(row)
    half = max(1, length // 2)
    most = parts.anatomy.max_context or length + EXTRA_PADDING
    longest = length if length >= most else min(length + EXTRA_PADDING, most)
    padded, mask = row.new_zeros(2, longest), row.new_zeros(2, longest)
    for index, size in enumerate((length, half)):
        padded[index, :size], mask[index, :size] = row[:size], 1
    together = read_sites(parts, TokenInputs(padded, mask), alone)
    return largest(_worst(together, 0, alone, length), _worst(together, 1, alone, half))


def _batch_error(parts: ModelParts, row: torch.Tensor, alone: Mapping[str, torch.Tensor]) -> float:
    """A sequence alone against the same among three."""
    together = read_sites(parts, _unpadded(torch.stack([row.flip(0), row, row.roll(1)])), alone)
    return _worst(together, 1, alone, len(row))


def _causality_error(parts: ModelParts, row: torch.Tensor, alone: Mapping[str, torch.Tensor]) -> float:
    """The first half of a sequence, run by itself, against the same within the whole."""
    half = max(1, len(row) // 2)
    return _worst(alone, 0, read_sites(parts, _unpadded(row[None, :half]), alone), half)


_CONTEXTS: dict[str, Callable[[ModelParts, torch.Tensor, Mapping[str, torch.Tensor]], float]] = {
    "padding": _padding_error,
    "batch": _batch_error,
    "causality": _causality_error,
}


def _worst(together: Mapping[str, torch.Tensor], row: int, alone: Mapping[str, torch.Tensor], length: int) -> float:
    """The largest relative error of any site, one at a time, over `length` tokens of a row; inf where its width differs."""
    return largest(*(_error(together[site][row, :length], alone[site][0, :length]) for site in alone))


def _error(a: torch.Tensor, b: torch.Tensor) -> float:
    return relative_error(a, b) if a.shape == b.shape else math.inf
