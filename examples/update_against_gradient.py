"""Does each block take a step down the gradient of the loss? `python examples/update_against_gradient.py [DATASET] [ridge|tuned] [TOKENS]`.

Works from a dataset alone, by default the `demo.zarr` that `make demo` builds. What the numbers mean, and what would
contradict that, is in docs/examples/update-against-gradient.md.
"""

from __future__ import annotations

import sys

import actcache as ac


def main(url: str, kind: str, tokens: int) -> None:
    """Print, by block, what the logit lens finds, and then a lens that was fitted on the other half of the documents."""
    ds = ac.open(url)
    odd = ds.where(ds.tokens["document"] % 2 == 1)
    report("logit lens", ac.lens.alignment(ac.lens.identity(ac.lens.states(odd)), odd, tokens))
    lens = ac.lens.fit(ds.where(ds.tokens["document"] % 2 == 0), kind)
    report(f"{kind} lens", ac.lens.alignment(lens, odd, tokens))


def report(title: str, found: ac.lens.Results) -> None:
    """A line a block: the cosine, what it is more than that of other updates, and than that towards other targets."""
    low, high = found.interval("excess")
    low_target, high_target = found.interval("excess_target")
    print(f"{title}: {found.facts['tokens']:,} tokens of {found.facts['documents']} documents")
    print(
        "block  cosine  random  over other updates      over other targets      nats to first order  in fact  own lens"
    )
    for block, label in enumerate(found.labels["block"]):
        each = {name: found[name][block] for name in found}
        print(
            f"{label:5} {each['cosine']:7.3f} {each['cosine_random']:7.3f}"
            f"  {each['excess']:6.3f} ({low[block]:.3f} to {high[block]:.3f})"
            f"  {each['excess_target']:6.3f} ({low_target[block]:.3f} to {high_target[block]:.3f})"
            f"  {each['predicted_decrease']:19.3f}  {each['decrease']:7.3f}  {each['decrease_next_lens']:8.3f}"
        )


if __name__ == "__main__":
    given = [*sys.argv[1:], *("demo.zarr", "ridge", "20000")[len(sys.argv) - 1 :]]
    main(given[0], given[1], int(given[2]))
