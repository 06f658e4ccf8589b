"""Our lenses against those of tuned-lens 0.2.0 on the same model and tokens, and against plain Adam. Runs only on request.

`--steps N` is how long the peer trains; the tokens of everything else follow from it. `--steps 1` is a trial of the benchmark itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import actcache
from actcache.clients.lens.translators import Lens, identity
from actcache.clients.states import States
from benchmarks import lens_converged, lens_peer
from benchmarks.lens_agreement import TOLERANCE, agreement
from benchmarks.lens_data import Clock, Tokens, built, divergence, fitted, tokens
from benchmarks.lens_jobs import Trained
from benchmarks.lens_peer import CHECKPOINTS, TOKENS_A_STEP
from benchmarks.material import CONTEXT, Material
from benchmarks.peers_environment import Unavailable
from benchmarks.ratio import Result, compare

TITLE = "lens: tuned lenses of the bundled model, trained and measured on the same tokens"
MOST_TOKENS = 1 << 20
"""Tokens that our side is fitted on: a part of the peer's."""
RIDGE_TOKENS = tuple(1 << power for power in range(14, 20))
STEPS = (25, 50, 100, 200)
GOAL, ROUNDS = 50, 3


@dataclass(frozen=True)
class Way:
    """A way to make a lens of ours: of so many of the first tokens, in so many steps; 0 is ridge alone."""

    tokens: int
    steps: int

    def __str__(self) -> str:
        return f"ridge on {self.tokens:,} tokens" + (f" and {self.steps} steps" if self.steps else "")


def run(material: Material) -> Iterator[Result]:
    """Compare with the package, then with Adam."""
    files = tokens(material)
    held_out, _ = built(material, files.held_out, "held-out")
    most = min(MOST_TOKENS, material.steps * TOKENS_A_STEP)
    read, seconds = built(material, files.train, "train", most)
    theirs = material.steps * TOKENS_A_STEP
    print(
        f"  {material.model_name}; the standard library in sequences of {CONTEXT} tokens: {theirs:,} tokens to train on, of which ours\n"
        f"  reads the first {most:,} (a build of {seconds:.0f} s); {len(held_out):,} held-out tokens of other files",
        flush=True,
    )
    try:
        yield from _package(material, files, read, held_out)
    except Unavailable as reason:
        print(f"  tuned-lens: skipped, {reason}", flush=True)
    part = read.only(np.arange(len(read) // 2))
    yield from lens_converged.run(part, held_out)


def _package(material: Material, files: Tokens, read: States, held_out: States) -> Iterator[Result]:
    """tuned-lens trains; ours is made in ever dearer ways until none of its layers is worse."""
    folder = material.folder / "lens"
    steps = material.steps
    checkpoints = sorted({*(step for step in CHECKPOINTS if step < steps), steps})
    peer = lens_peer.train(material.model, files.train, folder / "peer", steps, checkpoints=checkpoints)
    lens = actcache.lens.import_tuned_lens(peer.folder, held_out)
    for way in (lens, fitted(_first(read, RIDGE_TOKENS[0]), 0)):
        agreed = agreement(
            material.model, Path(peer.folder) if way is lens else way, files.held_out, folder / f"agreement-{way.kind}"
        )
        print(agreed.line(), flush=True)
        what = f"{'its lens, imported' if agreed.imported else 'ours, exported'}: loss and KL, largest difference ÷ {TOLERANCE:g} nats"
        ratio = agreed.largest / TOLERANCE
        yield Result("lens", what, ratio, ratio, ratio, 1, 1.0, "lower")
    clock = Clock()
    lenses = {"logit": identity(read), "tuned-lens": lens, "ridge": fitted(read, 0), "ours": fitted(read, None, clock)}
    measured = _table(lenses, held_out)
    print(
        f"  tuned-lens: {peer.seconds:,.0f} s ({peer.cpu_seconds:,.0f} s of processor) for {peer.steps} steps, {peer.tokens:,} tokens; "
        f"ours, the default of fit: {clock.wall:.0f} s ({clock.cpu:.0f} s of processor)",
        flush=True,
    )
    for name, what in (("ours", "tuned lens, by default"), ("ridge", "ridge alone")):
        ratios = measured[name] / measured["tuned-lens"]
        goal = 1.0 if name == "ours" else None
        yield Result(
            "lens",
            f"held-out KL of our {what} ÷ tuned-lens's after {steps} steps, worst layer (in brackets all layers)",
            float(ratios.max()),
            float(ratios.min()),
            float(ratios.max()),
            1,
            goal,
            "lower",
        )
    yield from _race(material, files, read, held_out, peer, measured["tuned-lens"])


def _race(
    material: Material, files: Tokens, read: States, held_out: States, peer: Trained, goal: np.ndarray
) -> Iterator[Result]:
    """The cheapest of our ways that is at least as good in every layer, timed a few times, with its build and without."""
    ways = [Way(count, 0) for count in (*RIDGE_TOKENS, len(read)) if count <= len(read)]
    ways += [Way(len(read), steps) for steps in STEPS]
    for way in ways:
        kl = divergence(fitted(_first(read, way.tokens), way.steps), held_out)
        print(f"    {way}: worst layer {np.max(kl / goal) - 1:+.1%} of tuned-lens's held-out KL", flush=True)
        if np.all(kl <= goal):
            break
    else:
        print("  none of our ways is as good as tuned-lens in every layer")
        return
    clocks, whole = [], []
    for number in range(ROUNDS):
        count = -(-way.tokens // (CONTEXT - 1)) * CONTEXT  # the last token of a sequence predicts none
        again, seconds = built(material, files.train, f"again-{number}", count)
        clock = Clock()
        fitted(_first(again, way.tokens), way.steps, clock)
        clocks.append(clock)
        whole.append(seconds + clock.wall)
    times = {
        "ours": [clock.wall for clock in clocks],
        "ours, with the build": whole,
        "tuned-lens": [peer.seconds] * ROUNDS,
    }
    name = f"{peer.steps} steps of tuned-lens, time to its final held-out KL in every layer"
    yield compare("lens", f"{name} ÷ ours from a dataset ({way})", times, "ours", "tuned-lens", goal=GOAL)
    yield compare("lens", f"{name} ÷ ours with the build", times, "ours, with the build", "tuned-lens")
    cpu = {"ours": [clock.cpu for clock in clocks], "tuned-lens": [peer.cpu_seconds] * ROUNDS}
    yield compare("lens", f"{name} ÷ ours from a dataset, processor time", cpu, "ours", "tuned-lens")


def _first(read: States, count: int) -> States:
    return read.only(np.arange(min(count, len(read))))


def _table(lenses: dict[str, Lens], held_out: States) -> dict[str, np.ndarray]:
    """Print loss and KL of each lens by layer; KL without the last layer is returned."""
    found = {name: actcache.lens.evaluate(lens, held_out) for name, lens in lenses.items()}
    heads = [f"{kind}, {name}" for kind in ("loss", "KL") for name in found]
    print(f"  held-out, nats: {'layer':8}" + "".join(f"{head:>18}" for head in heads))
    for layer, label in enumerate(held_out.labels):
        values: Sequence[float] = [each[kind][layer] for kind in ("loss", "kl") for each in found.values()]
        print(f"  {'':16}{label:8}" + "".join(f"{value:18.4f}" for value in values), flush=True)
    return {name: np.asarray(each["kl"][:-1]) for name, each in found.items()}
