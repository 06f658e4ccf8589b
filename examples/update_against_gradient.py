"""Does each block take a step down the gradient of the loss? `python examples/update_against_gradient.py [DATASET] [TOKENS]`.

Works from a dataset alone, by default the `demo.zarr` that `make demo` builds. What the numbers mean, and what would
contradict that, is in docs/examples/update-against-gradient.md.
"""

from __future__ import annotations

import sys

import actcache as ac


def main(url: str, tokens: int) -> None:
    """Print, by block, what the logit lens finds, and then a lens fitted on other documents than it is tried on."""
    ds = ac.open(url)
    read = ac.lens.states(ds)
    report("logit lens", ac.lens.alignment(ac.lens.identity(read), ds, tokens))


def report(title: str, found: ac.lens.Results) -> None:
    """A line a block: the cosine, what it is more than that of other updates, and than that towards other targets."""
    low, high = found.interval("excess")
    low_target, high_target = found.interval("excess_target")
    print(f"{title}: {found.facts['tokens']:,} tokens of {found.facts['documents']} documents")
    print("block  cosine  random  over other updates      over other targets      nats to first order  nats in fact")
    for block, label in enumerate(found.labels["block"]):
        each = {name: found[name][block] for name in found}
        print(
            f"{label:5} {each['cosine']:7.3f} {each['cosine_random']:7.3f}"
            f"  {each['excess']:6.3f} ({low[block]:.3f} to {high[block]:.3f})"
            f"  {each['excess_target']:6.3f} ({low_target[block]:.3f} to {high_target[block]:.3f})"
            f"  {each['predicted_decrease']:19.3f}  {each['decrease']:12.3f}"
        )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "demo.zarr", int(sys.argv[2]) if len(sys.argv) > 2 else 20_000)
