"""Makes `tests/references/tuned-lens/` with the package tuned-lens 0.2.0: `python -m tests.references.tuned_lens`.

It runs in the environment of `benchmarks/peers_env/tuned-lens.txt`, from the root of the repository; what it wrote is kept,
so that files and numbers can be compared without the package.

**The lens.** A state h of width d is read as head(norm(h + A_l h + b_l)): A_l, b_l are the translator of layer l, added to the
state (zeros are the logit lens); norm and head are the model's own, with the norm's gain and bias and, if the head has one, its
bias. Layer 0 reads the embedding, layer L - 1 what the last block reads; the last block's output has no translator.

**The format**, a folder of two files, written by `TunedLens.save` and found by `TunedLens.from_model_and_pretrained`.
`config.json` is one object, on one line without a newline:

- `base_model_name_or_path`, string: `model.config.name_or_path`, which is whatever the model was loaded by; "" for one that
  was not loaded. Never checked;
- `d_model`, integer: `config.hidden_size`, the width of the states and translators;
- `num_hidden_layers`, integer: `config.num_hidden_layers`, L, which is also the number of translators;
- `bias`, boolean, default true. With false the package's constructor fails (it zeroes a bias that is None), so there are no
  such files of it, and it reads none;
- `base_model_revision`, string or null, default null: the model's git revision, if told. Never checked;
- `unembed_hash`, string or null, default null: see below. On loading, another one than the model's gives a warning, no error,
  and is replaced by the model's; null is not compared;
- `lens_type`, string, default "linear_tuned_lens", the only one. Never checked.

The first three are required. Unknown keys are dropped with a warning.

`params.pt` is what `torch.save` makes of the `state_dict` of the list of translators, an OrderedDict in the order `0.weight`,
`0.bias`, `1.weight`, … `{L-1}.bias`: `l.weight` (d, d), of which row i gives coordinate i of what is added, as in
`torch.nn.Linear` (h @ weight.T + bias), and `l.bias` (d,). All are of the dtype of the model's unembedding: float32, float16 or
bfloat16 (float16 for an 8-bit model). Loading is strict: no key may be missing or added. The norm and head are not in the file.
Without torch: a zip file whose members lie below one folder, "params" or "archive", all stored without compression. `data.pkl`
is a pickle of protocol 2 that calls `collections.OrderedDict` and `torch._utils._rebuild_tensor_v2(storage, offset, size,
stride, requires_grad, hooks)` and sets `_metadata` of the dictionary; a storage is a persistent id ("storage", torch.FloatStorage
or HalfStorage or BFloat16Storage, "N", "cpu" or "cuda:0", elements), whose bytes are the member `data/N`, little-endian as the
member `byteorder`, if there, says.

**`unembed_hash`** is the SHA-256, in hexadecimal, of the UTF-8 text `numpy.array_str(weight, precision=1)`, where weight is the
unembedding as float32 (vocabulary, d). With numpy's default print options, which array_str obeys, more than 1000 elements are
abridged, to the first and last 3 rows of the first and last 3 columns (all columns of 6 or fewer): the hash of a real model
tells 36 numbers of one decimal. It says little of a matrix and nothing of norm or bias.

**`arrays.npz`** has, of a random GPT-2 of 2 layers of width 8 and a vocabulary of 20, the `unembedding` (20, 8), the final norm's
`norm_gain`, `norm_bias` (8,) and `norm_eps`; of 2 sequences of 6 `tokens`, `states` (3, 2, 6, 8), the last before the final
norm; of the lenses `logit` and `tuned`, at layers 0 and 1, `*_logits` (2, 2, 6, 20), `*_kl` (2, 2, 6), KL(final ‖ layer) in nats
by `tuned_lens.stats.kl_divergence`, and `*_loss` (2, 2, 5), cross-entropy of the next token in nats; `tuned_translated`
(2, 2, 6, 8), states as the norm gets them; of the model `final_logits` (2, 6, 20) and `final_loss` (2, 5). All but the tokens
are float32. `hashes.json` has the package's hashes of `matrices()` and of `examples/tiny-gpt`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent / "tuned-lens"
ROOT = Path(__file__).parent.parent.parent


def matrices() -> dict[str, np.ndarray]:
    """Float32 matrices whose text numpy forms in different ways. All values are exact."""

    def matrix(rows: int, columns: int, scale: float = 1 / 16) -> np.ndarray:
        return ((np.arange(rows * columns) * 37 % 101 - 50) * scale).astype(np.float32).reshape(rows, columns)

    wide = matrix(40, 30)
    wide[0, 0], wide[-1, -1] = 2.0**-14, 4096.0
    hidden = matrix(40, 30)
    hidden[20, 15] = 2.0**40  # in what is left out
    return {
        "all shown": matrix(20, 8),
        "all shown, in several lines a row": matrix(25, 40),
        "abridged": matrix(40, 26),
        "abridged, every column shown": matrix(300, 5),
        "abridged, seven columns": matrix(300, 7),
        "zeros with a sign": matrix(40, 30, 1 / 2048),
        "with exponents": wide,
        "large where it is left out": hidden,
        "integers": matrix(40, 30, 4.0),
    }


def main() -> None:
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
    from tuned_lens import TunedLens
    from tuned_lens.nn.lenses import LogitLens
    from tuned_lens.nn.unembed import Unembed
    from tuned_lens.stats import kl_divergence
    from tuned_lens.utils import shift_labels, shift_preds, tensor_hash

    torch.manual_seed(7)
    config = GPT2Config(
        vocab_size=20,
        n_positions=8,
        n_embd=8,
        n_layer=2,
        n_head=2,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=0,
        name_or_path="random-gpt2",
    )
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    norm = model.transformer.ln_f
    norm.weight.add_(0.3 * torch.randn(8))
    norm.bias.add_(0.3 * torch.randn(8))
    tuned = TunedLens.from_model(model, model_revision="main").requires_grad_(False)
    for translator in tuned:
        translator.weight.add_(0.3 * torch.randn(8, 8))
        translator.bias.add_(0.3 * torch.randn(8))
    tuned.save(FOLDER / "lens")
    tuned = TunedLens.from_model_and_pretrained(model, str(FOLDER / "lens"))

    tokens = torch.randint(0, 20, (2, 6))
    before_norm: list[torch.Tensor] = []
    hook = norm.register_forward_pre_hook(lambda _, inputs: before_norm.append(inputs[0]))
    output = model(tokens, output_hidden_states=True)
    hook.remove()
    states = output.hidden_states[:-1]

    def losses(logits: torch.Tensor) -> torch.Tensor:
        predicted = shift_preds(logits, 1)
        found = torch.nn.functional.cross_entropy(
            predicted.flatten(0, 1), shift_labels(tokens, 1).flatten(), reduction="none"
        )
        return found.reshape(predicted.shape[:2])

    arrays = {
        "unembedding": model.lm_head.weight,
        "norm_gain": norm.weight,
        "norm_bias": norm.bias,
        "norm_eps": torch.tensor(norm.eps),
        "tokens": tokens,
        "states": torch.stack([*states, before_norm[0]]),
        "final_logits": output.logits,
        "final_loss": losses(output.logits),
        "tuned_translated": torch.stack([tuned.transform_hidden(h, layer) for layer, h in enumerate(states)]),
    }
    for name, lens in (("logit", LogitLens.from_model(model)), ("tuned", tuned)):
        logits = [lens(h, idx=layer) for layer, h in enumerate(states)]
        arrays[f"{name}_logits"] = torch.stack(logits)
        arrays[f"{name}_kl"] = torch.stack([kl_divergence(output.logits, of_layer) for of_layer in logits])
        arrays[f"{name}_loss"] = torch.stack([losses(of_layer) for of_layer in logits])
    np.savez_compressed(FOLDER / "arrays.npz", **{name: array.detach().numpy() for name, array in arrays.items()})

    hashes = {name: tensor_hash(matrix) for name, matrix in matrices().items()}
    bundled = AutoModelForCausalLM.from_pretrained(ROOT / "examples" / "tiny-gpt", local_files_only=True)
    hashes["examples/tiny-gpt"] = Unembed(bundled).unembedding_hash()
    (FOLDER / "hashes.json").write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
