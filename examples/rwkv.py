"""Lenses on a network without attention: `python examples/rwkv.py OUT_FOLDER --steps 1000`.

A small RWKV, a recurrence that reads the past from one running state (Peng et al. 2023, arXiv 2305.13048), is trained on the standard
library's own source files and cached. Logit, ridge and tuned lenses then read it layer by layer, and each other's layers; so they do the
bundled GPT on the same tokens. Neither has seen those files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from training import cosine, cross_entropy, encode, held_out, standard_library, train, warmed_up, windows_of
from transformers import AutoTokenizer, RwkvConfig, RwkvForCausalLM

import actcache as ac

GPT = Path(__file__).parent / "tiny-gpt"
CONTEXT, BATCH = 64, 16
LAYERS, WIDTH = 4, 128
TRAINED_ON = 100_000  # tokens that a tuned lens is trained on, passes counted each


def trained(folder: Path, steps: int, every: int = 3, seed: int = 0) -> float:
    """Train on every third file, save model and tokenizer, and give back the held-out loss in nats per token."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(GPT)
    files = standard_library()
    config = RwkvConfig(
        vocab_size=len(tokenizer),
        context_length=CONTEXT,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        rescale_every=0,  # inference is to compute what training did
    )
    model = RwkvForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    windows = windows_of(encode(tokenizer, [p for p in files[::every] if not held_out(p)]), CONTEXT, BATCH, seed)
    train(model, windows, lambda step, _: warmed_up(step) * cosine(step / steps), np.inf, lambda step: step == steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return cross_entropy(model, encode(tokenizer, [p for p in files[::every] if held_out(p)]), CONTEXT)


def measured(model: Path, url: Path, tokens: int, folder: Path) -> dict[str, ac.lens.Results]:
    """Build a dataset of held-out files, fit lenses on half of its documents, and measure them on the others."""
    corpus = tuple(str(p) for p in standard_library() if held_out(p))
    spec = ac.Spec(model=str(model), corpus=corpus, context=CONTEXT, max_document_tokens=6000, max_tokens=tokens)
    ac.build(spec, url)
    fitted, read = ac.lens.states(ac.open(str(url))).split(0.5)
    lenses = {"logit lens": ac.lens.identity(fitted)}
    lenses |= {f"{kind} lens": ac.lens.fit(fitted, kind, tokens=TRAINED_ON) for kind in ("ridge", "tuned")}
    found = {name: ac.lens.evaluate(lens, read) for name, lens in lenses.items()}
    for measure in ("loss", "kl"):
        ac.figures.draw_together(found, measure, folder / f"{url.stem}-{measure}.png")
    few = read.only(np.arange(min(4096, len(read))))
    moved = {f"transfer, {name}": ac.lens.transfer(lens, few) for name, lens in lenses.items() if lens.kind != "logit"}
    ac.figures.draw(moved["transfer, tuned lens"], folder / f"{url.stem}-transfer.png", measures=["penalty"])
    return found | moved


def said(name: str, found: dict[str, ac.lens.Results]) -> None:
    """Print what was measured, by layer, in nats."""
    for lens, results in found.items():
        if "kl" in results:
            for measure in ("loss", "kl"):
                low, high = results.interval(measure)
                numbers = zip(results.labels["layer"], results[measure], low, high, strict=True)
                by_layer = ", ".join(f"{n} {v:.3f} [{a:.3f}, {b:.3f}]" for n, v, a, b in numbers)
                print(f"{name}, {lens}, {measure} in nats by layer [95 %]: {by_layer}")
            continue
        penalty = results["penalty"]
        low, high = results.interval("penalty")
        for distance in (1, 2, len(penalty) - 1):
            for how, shift in (("earlier", -distance), ("later", distance)):
                value = np.diagonal(penalty, -shift).mean()
                print(f"{name}, {lens}: lens {distance} layers {how} than the state it reads costs {value:.3f} nats")
        print(
            f"{name}, {lens}: first lens on the last state {penalty[0, -1]:.3f} [{low[0, -1]:.3f}, {high[0, -1]:.3f}] nats"
        )
    print(f"{name}: {found['logit lens'].facts}")


def main(folder: Path, steps: int, tokens: int, every: int = 3) -> dict[str, dict[str, ac.lens.Results]]:
    """Train, build, measure, draw."""
    folder.mkdir(parents=True, exist_ok=True)
    print(f"held-out loss {trained(folder / 'model', steps, every):.3f} nats per token", flush=True)
    found = {}
    for name, model in (("rwkv", folder / "model"), ("gpt", GPT)):
        found[name] = measured(model, folder / f"{name}.zarr", tokens, folder)
        said(name, found[name])
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model, the datasets and the pictures go")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=60_000, help="tokens of held-out files that are measured on")
    arguments = parser.parse_args()
    main(arguments.folder, arguments.steps, arguments.tokens)
