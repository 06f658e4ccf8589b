"""What `tests/references/tuned_lens.py` says of the files and numbers of the package, against those that the package wrote."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import torch
from safetensors.numpy import load_file

from tests.references.tuned_lens import FOLDER, ROOT, matrices

ARRAYS = np.load(FOLDER / "arrays.npz")
CONFIG = json.loads((FOLDER / "lens/config.json").read_text())


def head(states: np.ndarray) -> np.ndarray:
    """Logits of states (…, d_model)."""
    centred = states - states.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + ARRAYS["norm_eps"])
    return (normed * ARRAYS["norm_gain"] + ARRAYS["norm_bias"]) @ ARRAYS["unembedding"].T


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def text_hash(matrix: np.ndarray) -> str:
    return hashlib.sha256(np.array_str(matrix, precision=1).encode()).hexdigest()


def test_the_numbers_are_those_of_the_formulas():
    lens = torch.load(FOLDER / "lens/params.pt", weights_only=True)
    layers, width = CONFIG["num_hidden_layers"], CONFIG["d_model"]
    assert list(lens) == [f"{layer}.{name}" for layer in range(layers) for name in ("weight", "bias")]
    lens = {name: tensor.numpy() for name, tensor in lens.items()}
    assert all(lens[f"{layer}.weight"].shape == (width, width) for layer in range(layers))
    states = ARRAYS["states"][:-1]
    translated = np.stack([h + h @ lens[f"{i}.weight"].T + lens[f"{i}.bias"] for i, h in enumerate(states)])
    np.testing.assert_allclose(ARRAYS["tuned_translated"], translated, rtol=1e-4, atol=1e-5)
    final = log_softmax(head(ARRAYS["states"][-1]))
    np.testing.assert_allclose(log_softmax(ARRAYS["final_logits"]), final, rtol=1e-4, atol=1e-5)
    for name, read in (("logit", states), ("tuned", translated)):
        logits = head(read)
        np.testing.assert_allclose(ARRAYS[f"{name}_logits"], logits, rtol=1e-4, atol=1e-5)
        found = log_softmax(logits)
        kl = (np.exp(final) * (final - found)).sum(-1)
        np.testing.assert_allclose(ARRAYS[f"{name}_kl"], kl, rtol=1e-4, atol=1e-5)
        loss = -np.take_along_axis(found[..., :-1, :], ARRAYS["tokens"][None, :, 1:, None], -1)[..., 0]
        np.testing.assert_allclose(ARRAYS[f"{name}_loss"], loss, rtol=1e-4, atol=1e-5)
    assert ARRAYS["logit_kl"].mean() > 0.1
    assert abs(ARRAYS["tuned_kl"] - ARRAYS["logit_kl"]).mean() > 0.1  # the translators do something


def test_the_hash_is_of_the_text_of_the_unembedding():
    expected = json.loads((FOLDER / "hashes.json").read_text())
    bundled = load_file(ROOT / "examples/tiny-gpt/model.safetensors")
    unembeddings = {**matrices(), "examples/tiny-gpt": bundled["transformer.wte.weight"]}  # which is the head's as well
    assert {name: text_hash(matrix) for name, matrix in unembeddings.items()} == expected
    assert text_hash(ARRAYS["unembedding"]) == CONFIG["unembed_hash"]
