"""Does a small GPT compute for the benefit of later tokens? `python examples/normal_and_myopic.py OUT_FOLDER --seeds 2 --steps 1500`.

Two GPTs of the same weights at the start see the same data in the same order. In one the gradient is stopped wherever attention reads an
earlier column (examples/value_myopic_gpt.py), so that no column is trained to be of use to a later one (Wu, Morris & Levine 2024,
arXiv 2404.00859). What each column tells of tokens further on is read by tuned lenses that look ahead. The myopic GPT learns less in the
same steps, so it is compared with the normal one as it was when it predicted as well, too.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from looking_ahead import Sums, difference, future, said
from training import cross_entropy, encode, held_out, standard_library, train, warmed_up, windows_of
from transformers import AutoTokenizer
from value_myopic_gpt import ValueMyopicGPT

import actcache as ac
from actcache.clients.bootstrap import mean

TOKENIZER = Path(__file__).parent / "tiny-gpt"
MYOPIC, NORMAL, EARLY = "myopic", "normal", "normal at the myopic one's loss"
CONTEXT, BATCH = 128, 8
MEASURED_OF_256 = 64  # a quarter of the files is not trained on
OFFSETS = (0, 1, 2)  # of the prediction: of t+1, t+2, t+3
LOOKED_EVERY = 25  # steps


def trained(seed: int, steps: int, train_tokens: np.ndarray, held_tokens: np.ndarray) -> dict[str, ValueMyopicGPT]:
    """The GPT trained myopically, the usual way, and the latter when it first predicted held-out tokens as well as the first."""
    found: dict[str, ValueMyopicGPT] = {}
    wanted = -np.inf
    for name in (MYOPIC, NORMAL):
        torch.manual_seed(seed)
        model = ValueMyopicGPT(len(AutoTokenizer.from_pretrained(TOKENIZER)), CONTEXT, myopic=name == MYOPIC)
        print(f"seed {seed}, {name}, before: {cross_entropy(model, held_tokens, CONTEXT):.4f} nats on held-out tokens")

        def each(step: int, model: ValueMyopicGPT = model, wanted: float = wanted) -> bool:
            look = np.isfinite(wanted) and EARLY not in found and step % LOOKED_EVERY == 0
            if look and (loss := cross_entropy(model, held_tokens, CONTEXT)) <= wanted:
                found[EARLY] = copy.deepcopy(model).eval()
                print(f"seed {seed}, {EARLY}: step {step}, {loss:.4f} nats")
            return step == steps

        train(model, windows_of(train_tokens, CONTEXT, BATCH, seed), lambda step, _: warmed_up(step), np.inf, each)
        wanted = cross_entropy(model, held_tokens, CONTEXT)
        print(f"seed {seed}, {name}: step {steps}, {wanted:.4f} nats on held-out tokens", flush=True)
        found[name] = model
    found.setdefault(EARLY, found[NORMAL])
    return found


def built(models: dict[str, ValueMyopicGPT], files: list[Path], folder: Path, tokens: int) -> dict[str, ac.Dataset]:
    """A dataset of each model, all of the same tokens."""
    found = {}
    for name, model in models.items():
        capturable = ac.Capturable(name=name.replace(" ", "-").replace("'", ""), module=model, tokenizer=TOKENIZER)
        corpus = tuple(map(str, files))
        spec = ac.Spec(model=capturable, corpus=corpus, outputs=("loss",), max_document_tokens=2000, max_tokens=tokens)
        url = folder / f"{capturable.name}.zarr"
        ac.build(spec, url)
        found[name] = ac.open(str(url))
    return found


def measured(name: str, ds: ac.Dataset) -> dict[int, Sums]:
    """What one model's layers tell of the tokens ahead, by offset; with the rest that is printed."""
    tokens = ac.lens.states(ds)
    share = np.bincount(tokens.target) / len(tokens)
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
    print(f"{name}: {len(tokens):,} tokens, {tokens.groups.count} documents; unigram entropy {entropy:.3f} nats")
    print(f"{name}: logit lens by layer, nats: {ac.lens.logit(ds)['loss'].round(3).tolist()}")
    by_layer = {"ridge lens on t+1": future(ds, 0, "ridge")}
    found = {offset: future(ds, offset) for offset in OFFSETS}
    by_layer |= {f"tuned lens on t+{offset + 1}": found[offset] for offset in OFFSETS}
    for lens, sums in by_layer.items():
        print(f"{name}: {lens} by layer, nats: {mean(*sums, 'nats').value.round(3).tolist()}", flush=True)
    fitted, read = tokens.split(0.5)
    penalty = ac.lens.transfer(ac.lens.fit(fitted, "ridge"), read.only(np.arange(min(8192, len(read)))))["penalty"]
    print(
        f"{name}: transfer penalty, mean over other layers' lenses: {penalty.sum() / (penalty.size - len(penalty)):.3f} nats"
    )
    return found


def compared(found: dict[str, list[dict[int, Sums]]], folder: Path) -> None:
    """Print and draw differences of models, whose sums are given by seed and offset."""
    ahead = {k: f"about t+{k + 1}" for k in OFFSETS}
    by_offset = {name: {k: [seed[k] for seed in seeds] for k in OFFSETS} for name, seeds in found.items()}
    for other, path in ((NORMAL, "same-steps.png"), (EARLY, "equal-loss.png")):
        for beyond in ("", ", beyond the token"):
            results = {k: difference(by_offset[MYOPIC][k], by_offset[other][k], bool(beyond)) for k in OFFSETS}
            for k in OFFSETS:
                said(f"myopic less {other}, {ahead[k]}{beyond}", results[k])
            if not beyond:
                ac.figures.draw_together({ahead[k]: results[k] for k in OFFSETS}, "loss_difference", folder / path)
    for k in OFFSETS if len(found[NORMAL]) > 1 else ():
        normal = by_offset[NORMAL][k]
        for beyond in ("", ", beyond the token"):
            said(
                f"control: normal, seed 1 less seed 0, {ahead[k]}{beyond}",
                difference(normal[1:2], normal[:1], bool(beyond)),
            )


def main(folder: Path, seeds: int, steps: int, tokens: int, every: int = 2) -> dict[str, list[dict[int, Sums]]]:
    """Train, build, measure, draw. Gives back the sums by model, seed and offset."""
    folder.mkdir(parents=True, exist_ok=True)
    files = standard_library()[::every]
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    outside = [p for p in files if held_out(p, MEASURED_OF_256)]
    train_tokens = encode(tokenizer, [p for p in files if p not in set(outside)])
    held_tokens = encode(tokenizer, outside)[: 64 * CONTEXT]
    found: dict[str, list[dict[int, Sums]]] = {name: [] for name in (MYOPIC, NORMAL, EARLY)}
    for seed in range(seeds):
        models = trained(seed, steps, train_tokens, held_tokens)
        for name, ds in built(models, outside, folder / f"seed-{seed}", tokens).items():
            found[name].append(measured(f"seed {seed}, {name}", ds))
    compared(found, folder)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where datasets and pictures go")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--tokens", type=int, default=150_000, help="tokens of held-out files that are measured on")
    arguments = parser.parse_args()
    main(arguments.folder, arguments.seeds, arguments.steps, arguments.tokens)
