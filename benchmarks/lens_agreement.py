"""A lens means the same here and in tuned-lens 0.2.0: `agreement` measures one by both on the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

import actcache
from actcache.clients.results import Results
from benchmarks.lens_jobs import Measures
from benchmarks.lens_peer import BATCH, evaluate
from benchmarks.material import THREADS

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Agreement:
    """The largest differences of any layer, in nats a token, of a lens and of the logit lens; all are means over `pairs` tokens."""

    loss: float
    kl: float
    logit_loss: float
    logit_kl: float
    pairs: int
    layers: int
    imported: bool

    @property
    def largest(self) -> float:
        """The largest of all differences, in nats."""
        return max(self.loss, self.kl, self.logit_loss, self.logit_kl)

    @property
    def met(self) -> bool:
        """Whether every difference is at most `TOLERANCE`."""
        return self.largest <= TOLERANCE

    def line(self) -> str:
        """What is printed."""
        way = "its lens, imported" if self.imported else "our lens, exported"
        return (
            f"  {way}: {self.layers} layers on {self.pairs:,} tokens, largest differences in nats: loss {self.loss:.1e}, KL {self.kl:.1e} "
            f"(logit lens {self.logit_loss:.1e}, {self.logit_kl:.1e})"
        )


def agreement(
    model: Path,
    lens: actcache.lens.Lens | Path,
    tokens: Path,
    folder: Path,
    *,
    batch: int = BATCH,
    threads: int = THREADS,
) -> Agreement:
    """Measure a lens in tuned-lens's own environment, by the model, and here, by a dataset built of the same tokens.

    Args:
        model: a folder that `save_pretrained` wrote.
        lens: one of ours, which is exported, or a folder that tuned-lens saved, which is imported.
        tokens: a .npy file of token ids (sequence, position).
        folder: gets the dataset and the exported lens; absent or empty.
        batch: sequences of one forward pass of the peer.
        threads: of the peer.

    Raises:
        Unavailable: the package cannot be installed, or cannot load the lens.
        ValueError: the two sides went over different tokens, or the package finds another unembedding.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = np.load(tokens, mmap_mode="r")
    spec = actcache.Spec(model=str(model), corpus=(str(tokens),), context=rows.shape[1])
    actcache.build(spec, folder / "tokens.zarr")
    ds = actcache.open(folder / "tokens.zarr")
    imported = isinstance(lens, Path)
    if isinstance(lens, Path):
        saved, lens = lens, actcache.lens.import_tuned_lens(lens, ds)
    else:
        saved = actcache.lens.export_tuned_lens(lens, ds, folder / "exported")
    theirs = evaluate(model, saved, tokens, batch=batch, threads=threads)
    if not theirs.same_unembedding:
        raise ValueError(f"{saved}: tuned-lens finds another unembedding than the lens was saved with")
    differences = []
    for ours, peer in ((actcache.lens.evaluate(lens, ds), theirs.tuned), (actcache.lens.logit(ds), theirs.logit)):
        if ours.facts["tokens"] != theirs.pairs:
            raise ValueError(f"{ours.facts['tokens']} tokens here, {theirs.pairs} in tuned-lens")
        differences += _largest(ours, peer)
    return Agreement(*differences, pairs=theirs.pairs, layers=len(theirs.tuned.loss), imported=imported)


def _largest(ours: Results, peer: Measures) -> tuple[float, float]:
    loss, kl = (float(np.abs(ours[name] - getattr(peer, name)).max()) for name in ("loss", "kl"))
    return loss, kl
