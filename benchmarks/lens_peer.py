"""tuned-lens 0.2.0 in an environment of its own: `train` a lens, `evaluate` one. See `lens_side` for what is the package's own."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.lens_jobs import Checkpoint, Evaluated, EvaluateJob, Measures, Trained, TrainJob
from benchmarks.material import THREADS
from benchmarks.peers_environment import environment, run_side

PEER, SIDE = "tuned-lens", "benchmarks.lens_side"
STEPS, TOKENS_A_STEP, CHECKPOINTS = 250, 1 << 14, (25, 50, 100, 250)
BATCH = 8  # sequences of 256: as many tokens as one of 2,048, the package's default


def train(
    model: Path,
    tokens: Path,
    out: Path,
    steps: int = STEPS,
    tokens_a_step: int = TOKENS_A_STEP,
    checkpoints: Sequence[int] = CHECKPOINTS,
    *,
    batch: int = BATCH,
    autocast: bool = True,
    threads: int = THREADS,
    seed: int = 42,
) -> Trained:
    """Train a lens of a model on token ids, as `TrainJob` says; `out` gets the lens and `checkpoints/STEP` those on the way.

    Without `autocast` it is float32 throughout, which the package does not offer.

    Raises:
        Unavailable: the package cannot be installed, or training fails.
    """
    job = TrainJob(
        str(model.resolve()),
        str(tokens.resolve()),
        str(out.resolve()),
        steps,
        tokens_a_step,
        tuple(checkpoints),
        batch,
        autocast,
        threads,
        seed,
    )
    done = _done("train", asdict(job))
    return Trained(**{**done, "checkpoints": tuple(Checkpoint(**checkpoint) for checkpoint in done["checkpoints"])})


def evaluate(model: Path, lens: Path, tokens: Path, *, batch: int = BATCH, threads: int = THREADS) -> Evaluated:
    """The measures of a lens saved in the package's format, and of the logit lens, on token ids that were held out.

    Raises:
        Unavailable: the package cannot be installed, or cannot load the lens.
    """
    job = EvaluateJob(str(model.resolve()), str(tokens.resolve()), str(lens.resolve()), batch, threads)
    done = _done("evaluate", asdict(job))
    return Evaluated(**{**done, "logit": Measures(**done["logit"]), "tuned": Measures(**done["tuned"])})


def _done(mode: str, job: Mapping[str, Any]) -> Mapping[str, Any]:
    python = environment(PEER)
    with tempfile.TemporaryDirectory(prefix="actcache-benchmarks-") as home:
        return run_side(python, SIDE, json.dumps({"mode": mode, **job}), home=home)
