"""Training a tuned lens from the cache: all layers at once, streaming, resumable. Needs torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from actcache.clients.buffered import Batch
from actcache.clients.lens.checkpoint import Checkpoint
from actcache.clients.lens.natural import Natural, rate_at
from actcache.clients.lens.ridge import Gram
from actcache.clients.lens.torch_head import TorchHead
from actcache.clients.lens.translators import Lens
from actcache.clients.states import States
from actcache.schemas.errors import InvalidInput

Precision = Literal["auto", "float32", "bfloat16"]

TOKENS_A_DIMENSION = 16
"""Tokens of a step for each dimension of a state: the noise of a natural-gradient step is that of d² numbers from so many tokens."""
STEPS = 200
MOST_EPOCHS = 4
LOGIT_BYTES = 64 << 20
"""Logits that are made at once."""
REPORT_EVERY = 10


@dataclass(frozen=True)
class Progress:
    """Where a training stands.

    Attributes:
        step, steps: steps done, and in all.
        tokens: tokens seen.
        kl: mean KL to the final prediction by layer over the last batch that was looked at, in nats.
    """

    step: int
    steps: int
    tokens: int
    kl: np.ndarray


@dataclass(frozen=True)
class Course:
    """How long to train.

    Attributes:
        size: tokens of a step.
        steps: how many steps.
    """

    size: int
    steps: int

    @classmethod
    def of(cls, read: States, tokens: int | None) -> Course:
        """For so many tokens; by default 200 steps of 16 tokens a dimension, or as many as four epochs have.

        Raises:
            InvalidInput: fewer than one token.
        """
        if tokens is not None and tokens < 1:
            raise InvalidInput(f"tokens={tokens}: give how many tokens to train on, at least 1")
        size = min(TOKENS_A_DIMENSION * read.width, len(read))
        wanted = tokens or min(STEPS * size, MOST_EPOCHS * len(read))
        return cls(size, max(1, round(wanted / size)))


class Training:
    """Trains the translators of a lens by KL(final ‖ lens) in nats, averaged over tokens.

    Args:
        read: the states to fit on.
        lens: where to begin.
        grams: what the states' covariances are, one a translator.
        course: how long.
        seed: decides the order of tokens, and what the curvature is measured with.
        device: where torch computes; by default a GPU if there is one.
        precision: of products with the unembedding. `auto` is bfloat16 where the processor multiplies it faster.

    Raises:
        InvalidInput: no such device or precision.
    """

    def __init__(
        self,
        read: States,
        lens: Lens,
        grams: Sequence[Gram],
        course: Course,
        *,
        seed: int = 0,
        device: str | None = None,
        precision: Precision = "auto",
    ) -> None:
        self.read = read
        self.lens = lens
        self.course = course
        self.seed = seed
        self.device = _device(device)
        self.dtype = _dtype(precision, self.device)
        self._head = TorchHead(read.head, self.device, self.dtype)
        weights, biases = (torch.as_tensor(each).to(self.device) for each in (lens.weight, lens.bias))
        self._translators = [Natural(*each) for each in zip(grams, weights, biases, strict=True)]
        self._rows = max(64, LOGIT_BYTES // (read.vocabulary * self.dtype.itemsize))
        self._layers = [layer for layer in range(read.n_layers) if lens.translator(layer) is not None]

    def run(self, report: Callable[[Progress], None] | None = None, checkpoint: Checkpoint | None = None) -> Lens:
        """Train to the end, from where the checkpoint stands if there is one.

        Raises: as reading rows; `InvalidInput` if the checkpoint is of another training.
        """
        kl = np.full(len(self._layers), np.nan)
        first = self._resume(checkpoint)
        for step, batch in self._batches(first):
            states = {site: torch.from_numpy(rows).to(self.device) for site, rows in batch.items() if site != "token"}
            final = states["final" if self.read.offset else self.read.sites[-1]]
            looked = step % REPORT_EVERY == 0 or step == self.course.steps - 1
            if step == 0:
                self._measure(states, final)
            found = self._step(states, final, rate_at(step, self.course.steps), looked)
            if looked:
                kl = found
            if report is not None:
                report(Progress(step + 1, self.course.steps, (step + 1) * self.course.size, kl))
            if checkpoint is not None:
                checkpoint.keep(step + 1, self._state)
        return self._result()

    def _batches(self, first: int) -> Iterator[tuple[int, Batch]]:
        """Batches by step, epoch after epoch."""
        step = first
        a_epoch = len(self._epoch(0))
        while step < self.course.steps:
            epoch, skipped = divmod(step, a_epoch)
            batches = self._epoch(epoch)
            batches.load_state_dict({**batches.state_dict(), "batches": skipped})
            for batch in batches:
                if step == self.course.steps:
                    return
                yield step, batch
                step += 1
