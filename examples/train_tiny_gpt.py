"""Train `examples/tiny-gpt`: a small GPT-2 on the Python standard library's own source files.

    python examples/train_tiny_gpt.py examples/tiny-gpt --minutes 40

Every Python installation carries the corpus, so that anybody can check or repeat the training. One file in
twenty (by the hash of its relative path) is held out; the card that the script writes gives the loss on those files beside
the unigram entropy of their tokens, both in nats per token.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import numpy as np
import torch
import training
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from training import cosine, cross_entropy, encode, held_out, standard_library, warmed_up, windows_of
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

VOCABULARY = 4096
CONTEXT = 256
LAYERS, WIDTH, HEADS = 6, 128, 4
BATCH = 32  # sequences a step
END_OF_TEXT = "<|endoftext|>"


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


def train(tokens: np.ndarray, minutes: float, seed: int) -> tuple[GPT2LMHeadModel, int]:
    """Train from random weights for about `minutes`. Returns the model and the number of steps taken."""
    torch.manual_seed(seed)
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
    budget = minutes * 60
    windows = windows_of(tokens, CONTEXT, BATCH, seed)
    steps = training.train(model, windows, lambda step, spent: warmed_up(step) * cosine(spent / budget), budget)
    return model, steps


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
    loss, entropy = cross_entropy(model, held_tokens, CONTEXT), unigram_entropy(held_tokens)
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
        "train_loss": cross_entropy(model, train_tokens[: len(held_tokens)], CONTEXT),
        "entropy": entropy,
        "gain": entropy - loss,
    }
    (arguments.folder / "README.md").write_text(CARD.format(**facts), encoding="utf-8")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
