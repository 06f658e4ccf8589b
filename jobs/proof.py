"""Proof that the captured tensors are what the model computes, on real tokens, before anything is stored."""

from __future__ import annotations

import math

import numpy as np
import torch

from actcache.cache.head import Head
from actcache.jobs.batches import Batch
from actcache.jobs.capture import run
from actcache.jobs.model import head_parts, to_numpy
from actcache.jobs.parts import ModelParts
from actcache.schemas import sites as names
from actcache.schemas.errors import ProofFailed
from actcache.schemas.sites import all_sites

PROOF_TOKENS = 2048
EXTRA_PADDING = 8


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


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖a - b‖ / ‖b‖ over the whole tensors, in float64."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def prove(parts: ModelParts, batch: Batch, dtype: str) -> dict[str, float]:
    """Check every identity on a few sequences of a real batch. Returns each identity's relative error.

    - `logits`: unembed(final_norm(resid_post[L-1])) equals the model's own logits
    - `stream`: resid_post[i] is resid_pre[i+1], bit for bit
    - `attention`, `mlp`: resid_pre + attn_out = resid_mid, resid_mid + mlp_out = resid_post
    - `final_norm`: hook_normalized · gain + bias equals the final norm's output
    - `padding`: a sequence alone, and padded on the right in a batch, has the same states
    - `head`: the stored head, evaluated in numpy, gives the model's logits

    Raises:
        ProofFailed: an error is beyond the tolerance of the dtype; the message names the identity.
    """
    n_layers = len(parts.blocks)
    ids, mask = _few(batch)
    states, pres = _states(parts, ids, mask)
    with torch.inference_mode():
        logits = parts.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        last = states[names.resid_post(n_layers - 1)]
        own = mask.bool()
        errors = {"logits": relative_error(parts.unembedding(parts.final_norm(last))[own], logits[own])}
        errors["stream"] = max(
            [0.0, *(relative_error(states[names.resid_post(i - 1)], pres[i]) for i in range(1, n_layers))]
        )
        errors["attention"] = max(
            relative_error(pres[i] + states[names.attn_out(i)], states[names.resid_mid(i)]) for i in range(n_layers)
        )
        errors["mlp"] = max(
            relative_error(states[names.resid_mid(i)] + states[names.mlp_out(i)], states[names.resid_post(i)])
            for i in range(n_layers)
        )
        gain, bias = parts.final_norm.weight, parts.final_norm.bias
        scaled = states[names.FINAL_NORM] * gain + (bias if bias is not None else 0)
        errors["final_norm"] = relative_error(scaled[own], parts.final_norm(last)[own])
    errors["padding"] = _padding_error(parts, ids, mask)
    errors["head"] = _head_error(parts, last[own], logits[own])
    bounds = dict.fromkeys(errors, exact_tolerance(dtype)) | {"stream": 0.0, "padding": tolerance(dtype, n_layers)}
    for identity, error in errors.items():
        bound = bounds[identity]
        if not error <= bound:
            raise ProofFailed(
                f"this model fails the identity {identity!r}: relative error {error:.3g}, tolerance {bound:.3g}; "
                "it would be stored wrongly, so nothing is stored"
            )
    return errors


def _few(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch's first sequences, at most `PROOF_TOKENS` padded tokens but at least one sequence."""
    count = max(1, PROOF_TOKENS // batch.input_ids.shape[1])
    return batch.input_ids[:count], batch.attention_mask[:count]


def _states(
    parts: ModelParts, ids: torch.Tensor, mask: torch.Tensor
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Every site's tensor, and what each block's forward pass was really given."""
    states: dict[str, torch.Tensor] = {}
    pres: list[torch.Tensor] = []

    def keep(site: str, tensor: torch.Tensor) -> None:
        states[site] = tensor.clone()

    handles = [
        block.block.register_forward_pre_hook(lambda module, args: pres.append(args[0].clone()))
        for block in parts.blocks
    ]
    try:
        run(parts, ids.to(parts.device), mask.to(parts.device), all_sites(len(parts.blocks)), keep, whole=True)
    finally:
        for handle in handles:
            handle.remove()
    return states, pres


def _padding_error(parts: ModelParts, ids: torch.Tensor, mask: torch.Tensor) -> float:
    """The largest error of any residual state of the first sequence between running it alone and padded."""
    length = int(mask[0].sum())
    alone, _ = _states(parts, ids[:1, :length], mask[:1, :length])
    half = max(1, length // 2)
    longest = length if length >= _longest(parts) else min(length + EXTRA_PADDING, _longest(parts))
    padded, padded_mask = torch.zeros(2, longest, dtype=ids.dtype), torch.zeros(2, longest, dtype=mask.dtype)
    padded[0, :length], padded_mask[0, :length] = ids[0, :length], 1
    padded[1, :half], padded_mask[1, :half] = ids[0, :half], 1
    together, _ = _states(parts, padded, padded_mask)
    whole = max(relative_error(together[site][0, :length], alone[site][0]) for site in alone)
    return max(whole, max(relative_error(together[site][1, :half], alone[site][0, :half]) for site in alone))


def _longest(parts: ModelParts) -> int:
    return int(getattr(parts.model.config, "max_position_embeddings", 1 << 30))


def _head_error(parts: ModelParts, last: torch.Tensor, logits: torch.Tensor) -> float:
    head = head_parts(parts)
    stored = Head(head.operations, {name: array.astype(np.float32) for name, array in head.arrays.items()})
    return relative_error(torch.from_numpy(stored.logits(to_numpy(last).astype(np.float32))), logits.cpu())
