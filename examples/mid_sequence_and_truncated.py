"""Predictions in mid-sequence, and with less context: `python examples/mid_sequence_and_truncated.py demo.zarr`.

The second half of every sequence is run again, without its first half, and after that of another document.
What it shows is in docs/examples/mid-sequence-and-truncated.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import actcache as ac
from actcache.clients import bootstrap

HELD_OUT, SEED = 0.2, 0
MODEL = Path(__file__).parent / "tiny-gpt"
WAYS = ("truncated", "replaced")
"""What is done to the first half of a sequence: left out, so that positions begin at 0; or another document's, at the same positions."""
AXES = ("own context (tokens)", "layer")


def rows(ds: ac.Dataset, held: ac.lens.States, most: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Full-length held-out sequences: where they start on the token axis, and each way's token ids (row, position)."""
    lengths = np.diff(ds.sequence_start)
    sequences = np.unique(ds.tokens["sequence"][held.token])
    sequences = sequences[lengths[sequences] == (length := lengths.max())]
    start = ds.sequence_start[sequences[:: -(-len(sequences) // most)]]
    donor = np.roll(np.arange(len(start)), len(start) // 2)
    kept = ds.tokens["document"][start] != ds.tokens["document"][start[donor]]  # none is its own donor
    if not kept.any():
        raise ac.InvalidInput(f"{ds.url}: full-length sequences of two held-out documents are needed; give more tokens")
    ids = ds.tokens["token_id"][start[:, None] + np.arange(length)]
    half = length // 2
    return start[kept], {"truncated": ids[kept, half:], "replaced": np.hstack([ids[donor, :half], ids[:, half:]])[kept]}


def run_again(ids: np.ndarray, folder: Path, name: str) -> ac.Dataset:
    """A dataset in which each row of token ids is a document of its own."""
    np.save(folder / f"{name}.npy", ids)
    ac.build(ac.Spec(model=str(MODEL), corpus=(str(folder / f"{name}.npy"),)), folder / f"{name}.zarr")
    return ac.open(folder / f"{name}.zarr")


def log_probabilities(lens: ac.lens.Lens, head: ac.lens.Head, layer: int, state: np.ndarray) -> np.ndarray:
    """What the lens predicts of states (n, d) of a layer, (n, vocabulary)."""
    logits = lens.logits(head, layer, state)
    logits -= logits.max(axis=1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))


def differences(lens: ac.lens.Lens, full: ac.lens.States, other: ac.lens.States) -> np.ndarray:
    """Loss of the other states less that of the full ones, and KL(full ‖ other), nats: (token, 2, layer)."""
    assert (full.target == other.target).all()
    out = np.empty((len(full), 2, full.n_layers))
    for a, b in zip(full.pieces(), other.pieces(), strict=True):
        target = full.target[a.low : a.high, None]
        for layer, pair in enumerate(zip(a.states, b.states, strict=True)):
            whole, less = (log_probabilities(lens, full.head, layer, state) for state in pair)
            out[a.low : a.high, 0, layer] = np.take_along_axis(whole - less, target, 1)[:, 0]
            out[a.low : a.high, 1, layer] = (np.exp(whole) * (whole - less)).sum(axis=1)
    return out


def by_context(found: np.ndarray, own: np.ndarray, full: ac.lens.States) -> ac.lens.Results:
    """Means by the tokens of context that are the document's own, in ranges that double, with intervals from resampled documents."""
    place = np.ceil(np.log2(own)).astype(int)
    ends = 2 ** np.arange(place.max() + 1)
    labels = ["1", "2", *(f"{low // 2 + 1}–{min(low, own.max())}" for low in ends[2:])]
    cell = full.groups.of * len(ends) + place
    tokens, measures = np.bincount(cell, minlength=full.groups.count * len(ends)).reshape(-1, len(ends)), {}
    for number, name in enumerate(("loss_difference", "kl")):
        sums = np.stack([np.bincount(cell, each, tokens.size) for each in found[:, number].T], axis=-1)
        measures[name] = bootstrap.mean(sums.reshape(*tokens.shape, -1), tokens, "nats", AXES)
    return ac.lens.Results(measures, {AXES[0]: labels, "layer": full.labels}, full.facts())


def table(title: str, results: ac.lens.Results, measure: str) -> None:
    """Print a measure with its intervals: context down, layers across."""
    value, (low, high) = results[measure], results.interval(measure)
    print(f"\n{title}\n{'own context':<12}" + "".join(f"{label:>25}" for label in results.labels["layer"]))
    for row, label in enumerate(results.labels[AXES[0]]):
        cells = (f"{v:.3f} ({a:.3f} to {b:.3f})" for v, a, b in zip(value[row], low[row], high[row], strict=True))
        print(f"{label:<12}" + "".join(f"{cell:>25}" for cell in cells))


def main(
    url: str, out: Path, max_tokens: int | None, fit_tokens: int | None, sequences: int
) -> dict[str, ac.lens.Results]:
    """Fit a lens on the full sequences, build the others, compare and draw. Returns the differences of each way."""
    out.mkdir(parents=True, exist_ok=True)
    every = ac.lens.states(ds := ac.open(url), max_tokens=max_tokens)
    lens = ac.lens.fit(every, "tuned", held_out=HELD_OUT, seed=SEED, tokens=fit_tokens)
    start, ids = rows(ds, every.split(HELD_OUT, SEED)[1], sequences)
    length, half = ids["replaced"].shape[1], ids["truncated"].shape[1]
    full = ac.lens.states(ds.at((start[:, None] + np.arange(length - half, length)).ravel()))
    own = np.tile(np.arange(1, half), len(start))  # the last token of a sequence predicts nothing
    found = {}
    for way in WAYS:
        read = ac.lens.states(run_again(ids[way], out, way).where(position__ge=ids[way].shape[1] - half))
        found[way] = by_context(differences(lens, full, read), own, full)
    print(f"{len(full):,} tokens of {len(start)} sequences, {full.groups.count} documents held out; 95 % intervals")
    for way, results in found.items():
        table(f"first half {way}: loss more than in mid-sequence, nats", results, "loss_difference")
        table(f"first half {way}: KL(mid-sequence ‖ {way}), nats", results, "kl")
        for measure in results:
            ac.figures.draw(results, out / f"{way}-{measure}.png", [measure])
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", nargs="?", default="demo.zarr")
    parser.add_argument("--out", type=Path, default=Path("mid-sequence"), help="folder for pictures and two datasets")
    parser.add_argument("--max-tokens", type=int, help="tokens of the dataset to look at; all by default")
    parser.add_argument("--fit-tokens", type=int, help="tokens that the lens is trained on; see actcache.lens.fit")
    parser.add_argument("--sequences", type=int, default=400, help="sequences that are run again, at most")
    given = parser.parse_args()
    main(given.url, given.out, given.max_tokens, given.fit_tokens, given.sequences)
