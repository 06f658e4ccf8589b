"""The logit lens against a tuned one, by layer, on held-out documents: `python examples/logit_and_tuned_lens.py demo.zarr`.

The ridge lens, which takes one pass and no torch, stands beside them. What it shows is in docs/examples/logit-and-tuned-lens.md.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

import actcache as ac

HELD_OUT, SEED = 0.2, 0
MOST_MEASURED = 1 << 15
"""Held-out tokens that are measured, about: of more of them every second, every third, …"""
SHOWN = slice(64, 75)
"""Positions of the tables of predictions."""


def thinned(read: ac.lens.States, most: int) -> ac.lens.States:
    """Every k-th token, so that all documents stay."""
    return read.only(np.arange(0, len(read), -(-len(read) // most)))


def unigram_loss(fitted: ac.lens.States, measured: ac.lens.States) -> float:
    """Cross-entropy in nats under the frequencies of the next tokens fitted on, one added to each: what is known without any state."""
    counts = np.bincount(fitted.target, minlength=fitted.vocabulary) + 1
    return float(-np.log(counts[measured.target] / counts.sum()).mean())


def table(title: str, columns: dict[str, tuple[ac.lens.Results, str]]) -> None:
    """Print measures by layer, each with its interval."""
    (first, _), *_ = columns.values()
    print(f"\n{title}\n{'layer':<6}" + "".join(f"{name:>28}" for name in columns))
    for layer, label in enumerate(first.labels["layer"]):
        cells = []
        for results, measure in columns.values():
            low, high = results.interval(measure)
            cells.append(f"{results[measure][layer]:.3f} ({low[layer]:.3f} to {high[layer]:.3f})")
        print(f"{label:<6}" + "".join(f"{cell:>28}" for cell in cells))


def after_embedding(results: ac.lens.Results) -> ac.lens.Results:
    """Without the embedding, which a logit lens reads so badly that nothing else could be seen beside it."""
    measures = {
        name: replace(each, value=each.value[1:], low=results.interval(name)[0][1:], high=results.interval(name)[1][1:])
        for name, each in results.measures.items()
    }
    return ac.lens.Results(measures, {"layer": results.labels["layer"][1:]}, results.facts)


def main(url: str, out: Path, max_tokens: int | None, fit_tokens: int | None) -> dict[str, ac.lens.Results]:
    """Fit, measure and draw. Returns what was measured of each lens."""
    out.mkdir(parents=True, exist_ok=True)
    every = ac.lens.states(ac.open(url), max_tokens=max_tokens)
    fitted, outside = every.split(HELD_OUT, SEED)
    measured = thinned(outside, MOST_MEASURED)
    lenses = {
        "logit": ac.lens.identity(every),
        "ridge": ac.lens.fit(every, "ridge", held_out=HELD_OUT, seed=SEED),
        "tuned": ac.lens.fit(every, "tuned", held_out=HELD_OUT, seed=SEED, tokens=fit_tokens),
    }
    ac.lens.save(lenses["tuned"], out / "tuned.lens")
    groups = measured.groups
    print(f"fitted on {len(fitted):,} tokens of {fitted.groups.count} {groups.by}s")
    print(
        f"measured on {len(measured):,} tokens of {groups.count} {groups.by}s that no lens was fitted on; 95 % intervals"
    )
    found = {name: ac.lens.evaluate(lens, measured) for name, lens in lenses.items()}
    table("cross-entropy of the next token, nats", {name: (each, "loss") for name, each in found.items()})
    table("KL(final ‖ layer), nats", {name: (each, "kl") for name, each in found.items()})
    table("share whose best is the final one's", {name: (each, "agreement") for name, each in found.items()})
    less = {name: ac.lens.compare(lenses[name], lenses["tuned"], measured) for name in ("logit", "ridge")}
    paired = {f"{name} - tuned": (each, "kl_difference") for name, each in less.items()}
    table("how much more KL(final ‖ layer), nats, paired", paired)

    print(f"\nno state, frequencies of the next token alone: {unigram_loss(fitted, measured):.3f} nats")
    random = np.random.default_rng(SEED)
    mixed = ac.lens.evaluate(lenses["tuned"], replace(measured, target=random.permutation(measured.target)))
    least = int(mixed["loss"].argmin())
    print(
        f"tuned, next tokens shuffled: {mixed['loss'][least]:.3f} nats at best (layer {mixed.labels['layer'][least]})"
    )

    drawn = {f"{name} lens": after_embedding(each) for name, each in found.items()}
    for measure in ("loss", "kl"):
        ac.figures.draw_together(drawn, measure, out / f"{measure}.png")
    sequence = int(every.ds.tokens["sequence"][measured.token[len(measured) // 2]])
    length = int(np.diff(every.ds.sequence_start)[sequence])
    start = min(SHOWN.start, max(0, length - (SHOWN.stop - SHOWN.start)))
    for name in ("logit", "tuned"):
        shown = ac.lens.predictions(lenses[name], every.ds, sequence, start, start + SHOWN.stop - SHOWN.start)
        ac.figures.draw_predictions(shown, out / f"predictions-{name}.png")
    print(f"\npictures in {out}; the tables of predictions are of sequence {sequence}")
    return {**found, "shuffled": mixed}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", nargs="?", default="demo.zarr")
    parser.add_argument(
        "--out", type=Path, default=Path("logit-and-tuned-lens"), help="folder for pictures and the lens"
    )
    parser.add_argument("--max-tokens", type=int, help="tokens of the dataset to look at; all by default")
    parser.add_argument(
        "--fit-tokens", type=int, help="tokens that the tuned lens is trained on; see actcache.lens.fit"
    )
    given = parser.parse_args()
    main(given.url, given.out, given.max_tokens, given.fit_tokens)
