"""What the examples share that train a small language model on the Python standard library's own source files."""

from __future__ import annotations

import hashlib
import math
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

PEAK_RATE = 3e-3
WARMUP_STEPS = 200
SAID_EVERY = 100  # steps


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


def held_out(path: Path, of_256: int = 13) -> bool:
    """Whether a file is among the held-out ones by the hash of its name: by default a twentieth, `of_256` of each 256."""
    name = path.relative_to(sysconfig.get_path("stdlib")).as_posix()
    return hashlib.sha256(name.encode()).digest()[0] < of_256


def encode(tokenizer: PreTrainedTokenizerBase, files: list[Path]) -> np.ndarray:
    """All files as one run of token ids, each ended by the end-of-text token. Shape (tokens,), int64."""
    pieces: list[int] = []
    for path in files:
        pieces += tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)
        pieces.append(tokenizer.eos_token_id)
    return np.asarray(pieces, dtype=np.int64)


def loss_of(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each next token of windows of ids (window, position), in nats."""
    logits = model(windows)
    logits = getattr(logits, "logits", logits)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())


def windows_of(tokens: np.ndarray, context: int, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Without end: `batch` windows of `context` ids each, from places drawn at random, (batch, context)."""
    random = np.random.default_rng(seed)
    while True:
        starts = random.integers(0, len(tokens) - context, size=batch)
        yield torch.from_numpy(np.stack([tokens[s : s + context] for s in starts]))


def warmed_up(step: int, steps: int = WARMUP_STEPS) -> float:
    """The part of the peak rate at a step: rises evenly to 1."""
    return min(1.0, (step + 1) / steps)


def cosine(done: float) -> float:
    """The part of the peak rate when a share of the training is done: falls from 1 to 0.02 along a cosine."""
    return 0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * done))


def train(
    model: nn.Module,
    windows: Iterator[torch.Tensor],
    rate: Callable[[int, float], float],
    budget: float,
    each: Callable[[int], bool] | None = None,
) -> int:
    """Train by AdamW until `budget` seconds are over, or `each`, which is called after every step, says True. Returns the steps taken.

    `rate` gives the part of the peak rate for a step and the seconds spent.
    """
    matrices = [p for p in model.parameters() if p.squeeze().dim() > 1]
    vectors = [p for p in model.parameters() if p.squeeze().dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95))
    model.train()
    start, step, tokens = time.monotonic(), 0, 0
    while (spent := time.monotonic() - start) < budget:
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * rate(step, spent)
        batch = next(windows)
        loss = loss_of(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % SAID_EVERY == 0:
            print(
                f"step {step}  {spent / 60:.1f} min  loss {loss.item():.3f}  {tokens / max(spent, 1e-9):,.0f} tokens/s",
                flush=True,
            )
        step, tokens = step + 1, tokens + batch.numel()
        if each is not None and each(step):
            break
    model.eval()
    return step


@torch.inference_mode()
def cross_entropy(model: nn.Module, tokens: np.ndarray, context: int, batch: int = 32) -> float:
    """Mean next-token loss over disjoint windows of the full context, in nats per token."""
    windows = torch.from_numpy(tokens[: len(tokens) // context * context].reshape(-1, context))
    losses = [loss_of(model, w).item() * len(w) for w in windows.split(batch)]
    return sum(losses) / len(windows)
