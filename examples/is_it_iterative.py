"""Do layers hold their predictions in one code? `python examples/is_it_iterative.py demo.zarr`.

Iterative prediction says that each layer refines one and the same guess. Then one translator serves all layers, and the lens of a layer
its neighbours. What it shows, and what it cannot, is in docs/examples/is-it-iterative.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import actcache as ac

HELD_OUT, SEED = 0.2, 0
MOST_COMPARED, MOST_TRANSFERRED = 1 << 15, 1 << 13
"""Held-out tokens, about, that two lenses are compared on, and that every lens reads in every layer."""
ORDERS = 2000


def thinned(read: ac.lens.States, most: int) -> ac.lens.States:
    """Every k-th token, so that all documents stay."""
    return read.only(np.arange(0, len(read), -(-len(read) // most)))


def spoken(results: ac.lens.Results, measure: str, *place: int) -> str:
    """A number with its interval."""
    low, high = results.interval(measure)
    return f"{results[measure][place]:.3f} ({low[place]:.3f} to {high[place]:.3f})"


def others(penalty: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each layer, the lens of another layer that costs least, and the mean over all others: shuffled labels of layers."""
    apart = np.where(np.eye(len(penalty), dtype=bool), np.nan, penalty)
    return np.nanargmin(apart, axis=0), np.nanmean(apart, axis=0)


def ordered(penalty: np.ndarray) -> tuple[float, float]:
    """How penalty and distance of layers correlate (Pearson), and the share of random orders of the layers that correlate as much."""
    count = len(penalty)
    distance = np.abs(np.subtract.outer(np.arange(count), np.arange(count)))
    apart = distance > 0

    def correlation(order: np.ndarray) -> float:
        return float(np.corrcoef(penalty[np.ix_(order, order)][apart], distance[apart])[0, 1])

    own = correlation(np.arange(count))
    random = np.random.default_rng(SEED)
    orders = [np.arange(count), *(random.permutation(count) for _ in range(ORDERS))]
    return own, float(np.mean([correlation(order) >= own - 1e-12 for order in orders]))


def main(url: str, out: Path, max_tokens: int | None, fit_tokens: int | None) -> dict[str, ac.lens.Results]:
    """Fit, measure and draw. Returns the transfer penalties and the comparisons with each layer's own translator."""
    out.mkdir(parents=True, exist_ok=True)
    every = ac.lens.states(ac.open(url), max_tokens=max_tokens)
    _, outside = every.split(HELD_OUT, SEED)
    measured, few = thinned(outside, MOST_COMPARED), thinned(outside, MOST_TRANSFERRED)
    own, shared = (
        ac.lens.fit(every, "tuned", shared=shared, held_out=HELD_OUT, seed=SEED, tokens=fit_tokens)
        for shared in (False, True)
    )
    none = ac.lens.identity(every)
    groups = measured.groups
    print(
        f"measured on {len(measured):,} tokens (transfer: {len(few):,}) of {groups.count} {groups.by}s held out; 95 % intervals"
    )

    moved = ac.lens.transfer(own, few)
    of_shared, of_none = ac.lens.compare(shared, own, measured), ac.lens.compare(none, own, measured)
    found = {"transfer": moved, "shared": of_shared, "none": of_none}
    penalty = moved["penalty"][:-1, :-1]  # the last state is read as it is
    best, mean = others(penalty)
    print("\nloss more than by the layer's own translator, nats")
    print(f"{'layer':<6}{'one shared':>26}{'none (logit lens)':>26}{'best other layer':>36}{'mean of others':>16}")
    for layer, label in enumerate(moved.labels["layer"][:-1]):
        other = f"{moved.labels['lens'][best[layer]]}: {spoken(moved, 'penalty', best[layer], layer)}"
        cells = f"{spoken(of_shared, 'loss_difference', layer):>26}{spoken(of_none, 'loss_difference', layer):>26}"
        print(f"{label:<6}{cells}{other:>36}{mean[layer]:>16.3f}")
    kept = 1 - of_shared["kl_difference"][:-1].sum() / of_none["kl_difference"][:-1].sum()
    print(f"of the KL that own translators take off the logit lens, the shared one takes {kept:.0%}")
    name = "loss_difference_bits_per_byte"
    if name in of_shared:
        print("\none shared translator, bits per byte more than own ones\nlayer")
        for layer, label in enumerate(of_shared.labels["layer"][:-1]):
            print(f"{label:<6}{spoken(of_shared, name, layer):>26}")

    print(f"\ntransfer penalty, nats (lens on layer)\n{'apart':<6}{'mean':>8}{'least':>38}{'most':>38}")
    for apart in range(1, len(penalty)):
        pairs = [(i, j) for i, j in np.ndindex(penalty.shape) if abs(i - j) == apart]
        ends = [pairs[int(np.argmin([penalty[p] for p in pairs]))], pairs[int(np.argmax([penalty[p] for p in pairs]))]]
        labels = moved.labels["layer"]
        said = (f"{labels[i]} on {labels[j]}: {spoken(moved, 'penalty', i, j)}" for i, j in ends)
        print(f"{apart:<6}{np.mean([penalty[pair] for pair in pairs]):>8.3f}" + "".join(f"{each:>38}" for each in said))
    for first, said in enumerate(("all layers", "without the embedding")):
        if len(penalty) > first + 2:
            along, share = ordered(penalty[first:, first:])
            print(f"{said}: penalty and distance correlate by {along:.2f}; {share:.1%} of random orders do as much")

    ac.figures.draw(moved, out / "transfer.png", ["penalty"])
    moved.to_csv(out / "transfer.csv")
    lines = {"own translators": own, "one shared": shared}
    drawn = {name: ac.lens.evaluate(lens, measured) for name, lens in lines.items()}
    ac.figures.draw_together(drawn, "kl", out / "shared.png")
    print(f"\npictures, and all penalties with their intervals, in {out}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", nargs="?", default="demo.zarr")
    parser.add_argument("--out", type=Path, default=Path("is-it-iterative"), help="folder for pictures and numbers")
    parser.add_argument("--max-tokens", type=int, help="tokens of the dataset to look at; all by default")
    parser.add_argument("--fit-tokens", type=int, help="tokens that each lens is trained on; see actcache.lens.fit")
    given = parser.parse_args()
    main(given.url, given.out, given.max_tokens, given.fit_tokens)
