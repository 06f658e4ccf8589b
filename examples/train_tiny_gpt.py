"""Train `examples/tiny-gpt`: a small GPT-2 on the Python standard library's own source files.

    python examples/train_tiny_gpt.py examples/tiny-gpt --minutes 40

Every Python installation carries the corpus, so that anybody can check or repeat the training. One file in
twenty (by the hash of its relative path) is held out; the card that the script writes gives the loss on those files beside
the unigram entropy of their tokens, both in nats per token.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

VOCABULARY = 4096
CONTEXT = 256
LAYERS, WIDTH, HEADS = 6, 128, 4
BATCH = 32  # sequences a step
PEAK_RATE = 3e-3
WARMUP_STEPS = 200
END_OF_TEXT = "<|endoftext|>"


def standard_library() -> list[Path]:
    """The standard library's `.py` files, sorted, without installed packages and without files that are not UTF-8."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [p for p in sorted(root.rglob("*.py")) if "site-packages" not in p.parts]
    return [p for p in files if _is_utf8(p) and p.stat().st_size > 200]


def _is_utf8(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


def held_out(path: Path) -> bool:
    """Whether a file belongs to the held-out twentieth."""
    name = path.relative_to(sysconfig.get_path("stdlib")).as_posix()
    return hashlib.sha256(name.encode()).digest()[0] < 13


def train_tokenizer(files: list[Path]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` entries, as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((p.read_text(encoding="utf-8") for p in files), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=CONTEXT,
    )


def encode(tokenizer: PreTrainedTokenizerFast, files: list[Path]) -> np.ndarray:
    """All files as one run of token ids, each ended by the end-of-text token. Shape (tokens,), int64."""
    eos = tokenizer.eos_token_id
    pieces: list[int] = []
    for path in files:
        pieces += tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)
        pieces.append(eos)
    return np.asarray(pieces, dtype=np.int64)


def train(tokens: np.ndarray, minutes: float, seed: int) -> tuple[GPT2LMHeadModel, int]:
    """Train from random weights for about `minutes`. Returns the model and the number of steps taken."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95))
    start, step, budget = time.monotonic(), 0, minutes * 60
    while (spent := time.monotonic() - start) < budget:
        rate = (
            PEAK_RATE
            * min(1.0, (step + 1) / WARMUP_STEPS)
            * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * spent / budget)))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = random.integers(0, len(tokens) - CONTEXT, size=BATCH)
        batch = torch.from_numpy(np.stack([tokens[s : s + CONTEXT] for s in starts]))
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            rate_now = step * BATCH * CONTEXT / max(spent, 1e-9)
            print(f"step {step}  {spent / 60:.1f} min  loss {loss.item():.3f}  {rate_now:,.0f} tokens/s", flush=True)
        step += 1
    return model.eval(), step


@torch.inference_mode()
def cross_entropy(model: GPT2LMHeadModel, tokens: np.ndarray) -> float:
    """Mean next-token loss over disjoint windows of the full context, in nats per token."""
    windows = torch.from_numpy(tokens[: len(tokens) // CONTEXT * CONTEXT].reshape(-1, CONTEXT))
    losses = [model(input_ids=w, labels=w).loss.item() * len(w) for w in windows.split(BATCH)]
    return sum(losses) / len(windows)


def unigram_entropy(tokens: np.ndarray) -> float:
    """Entropy of the tokens' own frequencies, in nats: the loss of the best model without context."""
    counts = np.bincount(tokens)
    p = counts[counts > 0] / len(tokens)
    return float(-(p * np.log(p)).sum())


CARD = """\
---
license: apache-2.0
library_name: transformers
tags: [gpt2, text-generation]
---
# tiny-gpt

A GPT-2 of {layers} layers × {width}, {heads} heads, context {context}, byte-level BPE of {vocabulary} tokens, {parameters:,} parameters in
float32. It writes Python that looks like the standard library and is good for nothing else: it is here so that
every example, test and demonstration runs on a model that was really trained.

- Corpus: the {train_files:,} source files ({train_tokens:,} tokens) of the standard library of Python {python}; {held_files} more
  ({held_tokens:,} tokens), chosen by the hash of their names, were held out.
- Training: `python examples/train_tiny_gpt.py examples/tiny-gpt --minutes {minutes:g}` on two CPU cores: {steps:,} steps of
  {batch} × {context} tokens, AdamW.
- **Held-out loss {loss:.3f} nats per token**; the unigram entropy of the same tokens is {entropy:.3f} nats, so the model
  is {gain:.2f} nats below the best model without context. On windows of the training files: {train_loss:.3f} nats.
- The training files are under the Python Software Foundation License; the weights under Apache-2.0, as this repository.
"""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model, its tokenizer and its card go")
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    files = standard_library()
    train_files = [p for p in files if not held_out(p)]
    held_files = [p for p in files if held_out(p)]
    tokenizer = train_tokenizer(train_files)
    train_tokens, held_tokens = encode(tokenizer, train_files), encode(tokenizer, held_files)
    print(f"{len(train_tokens):,} tokens to train on, {len(held_tokens):,} held out", flush=True)
    model, steps = train(train_tokens, arguments.minutes, arguments.seed)
    model.save_pretrained(arguments.folder)
    tokenizer.save_pretrained(arguments.folder)
    loss, entropy = cross_entropy(model, held_tokens), unigram_entropy(held_tokens)
    facts = {
        "layers": LAYERS,
        "width": WIDTH,
        "heads": HEADS,
        "context": CONTEXT,
        "vocabulary": VOCABULARY,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_files": len(train_files),
        "train_tokens": len(train_tokens),
        "held_files": len(held_files),
        "held_tokens": len(held_tokens),
        "python": platform.python_version(),
        "minutes": arguments.minutes,
        "steps": steps,
        "batch": BATCH,
        "loss": loss,
        "train_loss": cross_entropy(model, train_tokens[: len(held_tokens)]),
        "entropy": entropy,
        "gain": entropy - loss,
    }
    (arguments.folder / "README.md").write_text(CARD.format(**facts), encoding="utf-8")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
