"""The stored arrays are what the model computes, seen by plain transformers and plain hooks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import actcache as ac
from tests.models import save_gpt2


def hooked(
    model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor | None
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Every site of a GPT-2 by hooks of this test's own, and the logits."""
    seen: dict[str, torch.Tensor] = {}
    handles = []

    def before(name: str):
        return lambda module, args: seen.__setitem__(name, args[0].detach().clone())

    def after(name: str):
        return lambda module, args, out: seen.__setitem__(
            name, (out[0] if isinstance(out, tuple) else out).detach().clone()
        )

    for index, block in enumerate(model.transformer.h):
        if index == 0:
            handles.append(block.register_forward_pre_hook(before("blocks.0.hook_resid_pre")))
        handles.append(block.attn.register_forward_hook(after(f"blocks.{index}.hook_attn_out")))
        handles.append(block.ln_2.register_forward_pre_hook(before(f"blocks.{index}.hook_resid_mid")))
        handles.append(block.mlp.register_forward_hook(after(f"blocks.{index}.hook_mlp_out")))
        handles.append(block.register_forward_hook(after(f"blocks.{index}.hook_resid_post")))
    handles.append(model.transformer.ln_f.register_forward_pre_hook(before("final")))
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask).logits
    for handle in handles:
        handle.remove()
    final = seen.pop("final")
    seen["ln_final.hook_normalized"] = torch.nn.functional.layer_norm(
        final, final.shape[-1:], eps=model.transformer.ln_f.eps
    )
    return seen, logits


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.dtype.itemsize}")


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy()
    return tensor.contiguous().numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bit_for_bit_on_the_plans_own_batches(tmp_path: Path, corpus: str, dtype: torch.dtype):
    folder = save_gpt2(tmp_path / "model", dtype=dtype)
    block, size = 160, 4
    ac.build(
        ac.Spec(model=str(folder), corpus=(corpus,), sites="all", block_tokens=block, batch_size=size), tmp_path / "ds"
    )
    ds = ac.open(tmp_path / "ds")
    assert ds.dtype == str(dtype).removeprefix("torch.")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    start, ids = ds.sequence_start, ds.tokens["token_id"]
    stored = {site: ds.site(site, dtype="stored").compute() for site in ds.sites}
    compared = 0
    for low in range(0, ds.n_tokens, block):
        high = min(low + block, ds.n_tokens)
        touching = [i for i in range(ds.n_sequences) if start[i] < high and start[i + 1] > low]
        for group in (touching[i : i + size] for i in range(0, len(touching), size)):
            longest = max(int(start[i + 1] - start[i]) for i in group)
            batch = torch.zeros(len(group), longest, dtype=torch.int64)
            mask = torch.zeros_like(batch)
            for row, i in enumerate(group):
                own = ids[start[i] : start[i + 1]].astype(np.int64)
                batch[row, : len(own)], mask[row, : len(own)] = torch.from_numpy(own), 1
            seen, _ = hooked(model, batch, mask)
            assert set(seen) == set(ds.sites)
            for row, i in enumerate(group):
                first, last = max(int(start[i]), low), min(int(start[i + 1]), high)
                for site, tensor in seen.items():
                    want = as_numpy(tensor[row, first - start[i] : last - start[i]])
                    assert np.array_equal(bits(stored[site][first:last]), bits(want)), (site, i)
                compared += last - first
    assert compared == ds.n_tokens


def test_sequence_by_sequence_to_rounding_with_the_loss(built: str, model: Path):
    ds = ac.open(built)
    plain = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    loss = ds["loss"].compute()
    states = {site: ds[site].compute() for site in ds.sites}
    for low, high in zip(ds.sequence_start[:-1], ds.sequence_start[1:], strict=True):
        ids = torch.from_numpy(ds.tokens["token_id"][low:high].astype(np.int64))
        seen, logits = hooked(plain, ids[None], None)
        for site, tensor in seen.items():
            np.testing.assert_allclose(states[site][low:high], tensor[0].numpy(), rtol=1e-4, atol=1e-5)
        want = torch.nn.functional.cross_entropy(logits[0, :-1], ids[1:], reduction="none").numpy()
        np.testing.assert_allclose(loss[low : high - 1], want, rtol=1e-5, atol=1e-5)
        assert np.isnan(loss[high - 1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrower_storage_is_the_rounded_value(built_by_dtype: dict[str, str], dtype: str):
    wide, narrow = ac.open(built_by_dtype["float32"]), ac.open(built_by_dtype[dtype])
    for site in wide.sites:
        values = wide.site(site, "stored").compute()
        rounded = torch.from_numpy(values).to(getattr(torch, dtype))
        assert np.array_equal(bits(narrow.site(site, "stored").compute()), bits(as_numpy(rounded)))
        assert np.array_equal(narrow[site].compute(), rounded.float().numpy())


def test_compute_dtype_decides_what_auto_stores(tmp_path: Path, model: Path, corpus: str):
    spec = ac.Spec(model=str(model), corpus=(corpus,), compute_dtype="bfloat16", max_tokens=50)
    ac.build(spec, tmp_path / "ds")
    ds = ac.open(tmp_path / "ds")
    assert (ds.dtype, ds.n_tokens) == ("bfloat16", 50)


def test_sites_that_end_early_hold_the_same(tmp_path: Path, spec: ac.Spec, built: str):
    """The forward pass stops after the last needed site; what is stored must not change."""
    early = spec.model_copy(update={"sites": "blocks.{0,1}.hook_resid_post", "outputs": ()})
    ac.build(early, tmp_path / "ds")
    ds, whole = ac.open(tmp_path / "ds"), ac.open(built)
    assert ds.sites == ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    for site in ds.sites:
        assert np.array_equal(ds[site].compute(), whole[site].compute())
    with pytest.raises(ac.NotFound, match="hook_resid_pre"):
        _ = ds.resid


def test_overflow_stops_with_site_token_and_value(tmp_path: Path, corpus: str):
    folder = save_gpt2(tmp_path / "model", scale=1e7)
    spec = ac.Spec(model=str(folder), corpus=(corpus,), dtype="float16")
    with pytest.raises(ac.OutOfRange, match=r"blocks\.0\.hook_resid_pre, token \d+, dimension \d+: -?\d+.* float16"):
        ac.build(spec, tmp_path / "ds")
    with pytest.raises(ac.NotSealed):
        ac.open(tmp_path / "ds")


def test_a_model_that_computes_nan_is_refused(tmp_path: Path, corpus: str):
    folder = save_gpt2(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.bias[3] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises((ac.OutOfRange, ac.ProofFailed)):
        ac.build(ac.Spec(model=str(folder), corpus=(corpus,)), tmp_path / "ds")


def test_zero_activations_read_back_as_zeros(tmp_path: Path, corpus: str):
    folder = save_gpt2(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(folder)
    ac.build(ac.Spec(model=str(folder), corpus=(corpus,), block_tokens=100), tmp_path / "ds")
    ds = ac.open(tmp_path / "ds")
    assert not ds.resid.compute().any()
    assert ac.verify(tmp_path / "ds", full=True).ok
    assert len(list((tmp_path / "ds" / ds.sites[0] / "c").iterdir())) == -(-ds.n_tokens // 100)


def test_a_model_whose_stream_is_rewritten_between_blocks_is_refused(
    tmp_path: Path, model: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
):
    """The proof must notice a captured tensor that is not what the next block reads."""
    original = AutoModelForCausalLM.from_pretrained

    def tampered(*args, **kwargs):
        found, info = original(*args, **kwargs)
        found.transformer.h[1].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.5, *inputs[1:]))
        return found, info

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", tampered)
    with pytest.raises((ac.ProofFailed, ac.Unsupported), match=r"stream|each on what the one before returned"):
        ac.build(ac.Spec(model=str(model), corpus=(corpus,)), tmp_path / "ds")
    assert not [path for path in (tmp_path / "ds").rglob("*") if path.match("blocks.*/c/*")]
