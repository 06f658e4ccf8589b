"""Gradients of heads and lenses against torch's autograd."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import actcache as ac
from actcache.cache.head import Head
from actcache.clients.evaluation import Prediction
from actcache.clients.lens.gradient import of_losses, through, vjp
from actcache.schemas.errors import Unsupported

D, V = 7, 12


def arrays(seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    shapes = {"gain": (D,), "shift": (D,), "square": (D, D), "unembedding": (V, D), "bias": (V,)}
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


NARROW = st.sampled_from(
    [
        {"op": "layer_norm", "eps": 1e-5, "gain": "gain", "bias": "shift"},
        {"op": "layer_norm", "eps": 0.3},
        {"op": "rms_norm", "eps": 1e-6, "gain": "gain"},
        {"op": "rms_norm", "eps": 0.1, "bias": "shift"},
        {"op": "linear", "weight": "square"},
        {"op": "scale", "factor": -0.7},
        {"op": "softcap", "cap": 1.5},
    ]
)
WIDE = st.sampled_from([{"op": "first", "rows": 9}, {"op": "scale", "factor": 3.0}, {"op": "softcap", "cap": 2.0}])


def in_torch(head: Head, x: torch.Tensor) -> torch.Tensor:
    """The operations as torch has them, by their published definitions."""
    for operation in head.operations:
        own = {role: torch.from_numpy(head.arrays[operation[role]]).double() for role in ("gain", "bias", "weight") if role in operation}  # type: ignore[index]  # fmt: skip
        match operation["op"]:
            case "layer_norm":
                eps = float(np.float32(operation["eps"]))
                x = torch.nn.functional.layer_norm(x, x.shape[-1:], own.get("gain"), own.get("bias"), eps)
            case "rms_norm":
                eps = float(np.float32(operation["eps"]))
                x = torch.nn.functional.rms_norm(x, x.shape[-1:], own.get("gain"), eps) + own.get("bias", 0)
            case "linear":
                x = torch.nn.functional.linear(x, own["weight"], own.get("bias"))
            case "first":
                x = x[..., : int(operation["rows"])]
            case "scale":
                x = x * float(np.float32(operation["factor"]))
            case "softcap":
                x = torch.tanh(x / float(operation["cap"])) * float(operation["cap"])
    return x


@given(st.lists(NARROW, max_size=4), st.lists(WIDE, max_size=3), st.booleans(), st.integers(0, 99))
def test_every_head_has_the_gradient_of_autograd(before, after, biased, seed):
    unembedding = {"op": "linear", "weight": "unembedding"} | ({"bias": "bias"} if biased else {})
    if sum(operation["op"] == "first" for operation in after) > 1:
        after = [operation for operation in after if operation["op"] != "first"]
    head = Head([*before, unembedding, *after], arrays(seed))
    generator = np.random.default_rng(seed)
    h = 2 * generator.normal(size=(5, D))
    logits, pullback = vjp(head, h)
    x = torch.from_numpy(h).requires_grad_()
    want = in_torch(head, x)
    np.testing.assert_allclose(logits, want.detach().numpy(), rtol=1e-9, atol=1e-9)
    c = generator.normal(size=logits.shape)
    (gradient,) = torch.autograd.grad(want, x, torch.from_numpy(c))
    found = pullback(c)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, gradient.numpy(), rtol=1e-7, atol=1e-8 * (1 + np.abs(gradient.numpy()).max()))
    single = vjp(head, h.astype(np.float32))[1](c.astype(np.float32))
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, found, rtol=0.02, atol=2e-3 * (1 + np.abs(found).max()))


def test_losses_through_a_lens(built: str):
    """The gradients of cross-entropy and of KL(final ‖ lens), of a lens that rotates and shifts."""
    ds = ac.open(built)
    read = ac.lens.states(ds, max_tokens=60)
    generator = np.random.default_rng(0)
    plain = ac.lens.identity(read)
    lens = replace(
        plain,
        weight=generator.normal(0, 0.3, plain.weight.shape).astype(np.float32),
        bias=generator.normal(0, 0.3, plain.bias.shape).astype(np.float32),
    )
    h = ds.resid[1].compute()[read.token]
    final = Prediction.of(ds.head.logits(ds.resid[-1].compute()[read.token]))
    found, (ce, kl) = of_losses(lens, ds.head, 1, h, [read.target], [final])
    x = torch.from_numpy(h).double().requires_grad_()
    moved = x + x @ torch.from_numpy(lens.weight[1]).double().T + torch.from_numpy(lens.bias[1]).double()
    log = torch.log_softmax(in_torch(ds.head, moved), -1)
    p = torch.from_numpy(final.probability).double()
    loss = torch.nn.functional.nll_loss(log, torch.from_numpy(read.target), reduction="sum")
    (want,) = torch.autograd.grad(loss, x, retain_graph=True)
    (want_kl,) = torch.autograd.grad((p * (p.log() - log)).sum(), x)
    np.testing.assert_allclose(ce, want.numpy(), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(kl, want_kl.numpy(), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.loss(read.target).sum(), loss.item(), rtol=1e-5)
    last, back = through(lens, ds.head, read.n_layers - 1, h)
    np.testing.assert_array_equal(last, ds.head.logits(h))
    assert back(np.zeros_like(last)).shape == h.shape


def test_an_unknown_operation_has_no_gradient():
    with pytest.raises(Unsupported, match="'swirl'"):
        vjp(Head([{"op": "swirl"}], {}), np.zeros((1, 2)))
