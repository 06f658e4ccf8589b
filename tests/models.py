"""Tiny random models and corpora, made from a config."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

END = "<|endoftext|>"


def save_tokenizer(folder: Path) -> int:
    """A byte-level tokenizer without merges. Returns the size of its vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=257, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["a"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)
    fast.save_pretrained(folder)
    return len(fast)


def save_gpt2(
    folder: Path,
    *,
    layers: int = 3,
    width: int = 32,
    heads: int = 4,
    context: int = 32,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    vocabulary: int | None = None,
) -> Path:
    """A random GPT-2 and its tokenizer, by default of the same vocabulary. `scale` multiplies the embedding, to make large activations."""
    folder.mkdir(parents=True, exist_ok=True)
    size = save_tokenizer(folder)
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary or size,
        n_positions=context,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(scale)
        for block in model.transformer.h:
            block.ln_1.bias.normal_(0, 0.1)
        model.transformer.ln_f.bias.normal_(0, 0.1)
        model.transformer.ln_f.weight.normal_(1, 0.1)
    model.to(dtype).save_pretrained(folder)
    return folder


def write_corpus(folder: Path, documents: int = 12, seed: int = 0) -> str:
    """Text files of very different lengths, one of them empty. Returns the glob that finds them."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        length = 0 if number == 3 else int(torch.randint(1, 150, (1,), generator=generator))
        letters = torch.randint(97, 123, (length,), generator=generator).tolist()
        (folder / f"{number:03d}.txt").write_text("".join(map(chr, letters)), encoding="utf-8")
    return str(folder / "*.txt")
