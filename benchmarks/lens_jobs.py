"""What the two sides of the lens benchmark tell each other, as JSON. Needs no library, so that either side can import it.

Token ids lie in .npy files of integers, (sequence, position): whole sequences of one length, without padding. Layers are
counted from the embedding: state 0 is what the first block reads, state L - 1 what the last block reads, and the last
entry of a list of L + 1 is the model's own output. All losses and divergences are in nats per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TrainJob:
    """A lens to train. `checkpoints` are steps after which it is saved; `batch` counts sequences of one forward pass.

    `autocast` is bfloat16 autocast of a lens's forward pass, which the package's loop has on every device; the parameters
    are float32 with it and without.
    """

    model: str
    tokens: str
    out: str
    steps: int
    tokens_a_step: int
    checkpoints: Sequence[int]
    batch: int
    autocast: bool
    threads: int
    seed: int


@dataclass(frozen=True)
class Checkpoint:
    """The lens after `step` steps. Seconds count from the first batch on, without those of saving checkpoints.

    `kl` is what was minimised, KL(final ‖ state) by layer (L,), mean over the tokens of this step before its update.
    """

    step: int
    folder: str
    tokens: int
    seconds: float
    cpu_seconds: float
    kl: Sequence[float]


@dataclass(frozen=True)
class Trained:
    """A trained lens in `folder`, in the package's own format. `setup_seconds` load the model and the tokens."""

    folder: str
    steps: int
    tokens: int
    seconds: float
    cpu_seconds: float
    tokens_a_second: float
    setup_seconds: float
    checkpoints: Sequence[Checkpoint]
    batch: int
    autocast: bool
    threads: int
    versions: dict[str, str]


@dataclass(frozen=True)
class EvaluateJob:
    """A lens to evaluate."""

    model: str
    tokens: str
    lens: str
    batch: int
    threads: int


@dataclass(frozen=True)
class Measures:
    """Of one lens, by layer, each (L + 1,); the last entry is the model's own output, so its divergence is 0.

    `loss`, the cross-entropy of the next token, and `kl`, KL(final ‖ layer), are means over every token that has a successor
    in its sequence; `kl_everywhere` is the same over every token, as the package's own evaluation has it.
    """

    loss: Sequence[float]
    kl: Sequence[float]
    kl_everywhere: Sequence[float]


@dataclass(frozen=True)
class Evaluated:
    """Both lenses on the same tokens. `pairs` counts tokens with a successor.

    `same_unembedding` tells whether the lens's hash of the unembedding is the model's; the package only warns of another.
    """

    logit: Measures
    tuned: Measures
    tokens: int
    pairs: int
    same_unembedding: bool
    seconds: float
    versions: dict[str, str]
