"""The tiny models themselves: a sweep is worth what they are worth."""

from __future__ import annotations

import pytest
import torch

from tests import tiny_configs
from tests.tiny_configs import DECODER_HALVES, DECODER_ONLY, ENCODERS, OTHER, TYPES, UNBUILDABLE

IDS = torch.randint(5, 250, (2, 24), generator=torch.Generator().manual_seed(1))
BUILDABLE = sorted(set(TYPES) - set(UNBUILDABLE))


@pytest.fixture(autouse=True)
def one_thread():
    """More gain nothing at this size, and much is lost where the processors are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_type_is_of_one_class():
    classes = [DECODER_ONLY, ENCODERS, DECODER_HALVES, set(OTHER)]
    assert sorted(name for kind in classes for name in kind) == sorted(TYPES)
    assert set(UNBUILDABLE) < set(TYPES)


@pytest.mark.parametrize("model_type", BUILDABLE)
def test_a_tiny_model_runs_and_looks_back_only(model_type: str):
    model = tiny_configs.build(model_type)
    assert sum(parameter.numel() for parameter in model.parameters()) < 5e6
    changed = IDS.clone()
    changed[:, -1] = (IDS[:, -1] + 7) % 240 + 5
    with torch.inference_mode():
        logits, other = (model(input_ids=i, use_cache=False).logits for i in (IDS, changed))
    assert logits.shape == (2, 24, tiny_configs.VOCABULARY)
    assert logits.isfinite().all()
    assert logits.std() > 0.1
    if model_type not in OTHER:
        torch.testing.assert_close(logits[:, :-1], other[:, :-1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits[:, -1], other[:, -1], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("model_type", sorted((DECODER_ONLY | ENCODERS) - set(UNBUILDABLE)))
def test_padding_at_the_end_changes_nothing(model_type: str):
    model = tiny_configs.build(model_type)
    length = 17
    padded, mask = IDS.clone(), torch.ones_like(IDS)
    padded[1, length:], mask[1, length:] = 0, 0
    with torch.inference_mode():
        alone = model(input_ids=IDS[1:, :length], use_cache=False).logits[0]
        together = model(input_ids=padded, attention_mask=mask, use_cache=False).logits[1, :length]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "mamba2", "rwkv"])
def test_the_seed_decides(model_type: str):
    one, same, other = (tiny_configs.build(model_type, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if one[name].is_floating_point())


@pytest.mark.parametrize("model_type", sorted(DECODER_ONLY - set(UNBUILDABLE) - {"mllama"}))
def test_every_weight_of_a_block_matters(model_type: str):
    model = tiny_configs.build(model_type).requires_grad_(True)
    logits = model(input_ids=IDS, use_cache=False).logits
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in idle if not any(part in name for part in NOT_FOLLOWED)] == []


# What chooses experts or keys has no gradient, nor what is held constant; towers of images and sounds are not run.
# mllama's second layer attends to images alone and is left out.
NOT_FOLLOWED = (
    "expert_bias",
    "correction_bias",
    "index",
    "router",
    "vision",
    "visual",
    "image",
    "multi_modal",
    "audio",
    "z_L_init",
)
