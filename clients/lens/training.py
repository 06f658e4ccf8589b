"""Training a tuned lens from the cache: all layers at once, streaming, resumable. Needs torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

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
FEWEST_TOKENS = 256
STEPS = 200
MOST_EPOCHS = 4
LOGIT_BYTES = 64 << 20
"""Logits that are made at once."""
REPORT_EVERY = 10
LOOKED_AT = 256
"""Tokens of a batch whose KL is reported."""
FIRST_AGAIN = 5
"""The step before which the curvature is measured a second time."""
DRAWN = 8
"""Tokens for each dimension of a state that the curvature is measured on."""


@dataclass(frozen=True)
class Progress:
    """Where a training stands.

    Attributes:
        step, steps: steps done, and in all.
        tokens: tokens seen.
        kl: mean KL to the final prediction by layer, in nats, over some tokens of the last batch that was looked at, before its step.
    """

    step: int
    steps: int
    tokens: int
    kl: np.ndarray

    @property
    def text(self) -> str:
        """The tokens and the mean KL over layers, in words."""
        return f"{self.tokens:,} tokens  KL {np.mean(self.kl):.3f} nats"


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
        """For so many tokens; by default 200 steps of 16 tokens a dimension, or as many as four epochs have; 256 tokens a step at least.

        Where an epoch is a few steps they are larger, so that it is divided into steps of equal size.

        Raises:
            InvalidInput: fewer than one token.
        """
        _checked_tokens(tokens)
        least = max(FEWEST_TOKENS, TOKENS_A_DIMENSION * read.width)
        a_epoch = max(1, len(read) // least)
        size = len(read) // a_epoch if a_epoch < STEPS else least
        return cls(size, max(1, round(tokens / size)) if tokens else min(STEPS, MOST_EPOCHS * a_epoch))


def check(tokens: int | None, device: str | None, precision: Precision) -> None:
    """Refuse what nothing can be trained with.

    Raises:
        InvalidInput: fewer than one token, no such device or precision.
    """
    _checked_tokens(tokens)
    _dtype(precision, _device(device))


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
        self.precision = "bfloat16" if self.dtype == torch.bfloat16 else "float32"
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
            names = [self.read.sites[layer] for layer in self._layers]
            states = {name: torch.from_numpy(batch[name]).to(self.device) for name in names}
            final = torch.from_numpy(self.read.final(batch)).to(self.device)
            if _is_measured(step):
                self._measure_curvature(states, step)
            looked = step % REPORT_EVERY == 0 or step == self.course.steps - 1
            found = self._step(states, final, rate_at(step, self.course.steps), looked)
            kl = found if looked else kl
            last = step + 1 == self.course.steps
            try:
                if report is not None:
                    report(Progress(step + 1, self.course.steps, (step + 1) * self.course.size, kl))
            except BaseException:  # whoever stops it between two steps loses none
                last = True
                raise
            finally:
                if checkpoint is not None:
                    checkpoint.keep(step + 1, self._state, now=last)
        return self._result()

    def _batches(self, first: int) -> Iterator[tuple[int, Batch]]:
        """Batches by step from `first` on, epoch after epoch, all equally large: few tokens would make a step of noise."""
        step = first
        while step < self.course.steps:
            epoch, skipped = divmod(step, len(self.read) // self.course.size)
            batches = self.read.batches(size=self.course.size, shuffle=self.seed, epoch=epoch, drop_last=True)
            batches.load_state_dict({**batches.state_dict(), "batches": skipped})
            for batch in batches:
                if step == self.course.steps:
                    return
                yield step, batch
                step += 1

    def _step(self, states: Mapping[str, Tensor], final: Tensor, rate: float, looked: bool) -> np.ndarray:
        """One step of every translator; KL by layer in nats, if it is looked at."""
        sums = [(torch.zeros_like(each.m), torch.zeros_like(each.c)) for each in self._translators]
        kl = torch.zeros(len(self._layers), device=self.device)
        for low in range(0, len(final), self._rows):
            rows = slice(low, low + self._rows)
            with torch.no_grad():
                wanted = torch.softmax(self._head.logits(final[rows]), -1)
            for place, layer in enumerate(self._layers):
                number = self._number(layer)
                out, white = self._translators[number].output(states[self.read.sites[layer]][rows])
                logits = self._head.logits(out.requires_grad_())
                error = torch.softmax(logits.detach(), -1)
                if looked and not low:
                    kl[place] = _kl(wanted[:LOOKED_AT], error[:LOOKED_AT])
                error -= wanted
                (gradient,) = torch.autograd.grad(logits, out, error)
                sums[number][0].addmm_(gradient.T, white)
                sums[number][1].add_(gradient.sum(0))
        times = np.bincount([self._number(layer) for layer in self._layers]) * len(final)
        for each, (m, c), count in zip(self._translators, sums, times.tolist(), strict=True):
            each.step(m / count, c / count, rate)
        return np.asarray(kl.double().cpu())

    def _measure_curvature(self, states: Mapping[str, Tensor], step: int) -> None:
        """Let every translator know the curvature, from targets drawn of its own predictions."""
        generator = torch.Generator(self.device).manual_seed(self.seed + step)
        gradients: list[list[Tensor]] = [[] for _ in self._translators]
        n = min(DRAWN * self.read.width, self.course.size)
        for low in range(0, n, self._rows):
            rows = slice(low, min(low + self._rows, n))
            for layer in self._layers:
                number = self._number(layer)
                out, _ = self._translators[number].output(states[self.read.sites[layer]][rows])
                logits = self._head.logits(out.requires_grad_())
                error = torch.softmax(logits.detach().float(), -1)
                drawn = torch.multinomial(error, 1, generator=generator)
                error.scatter_add_(1, drawn, torch.full_like(drawn, -1, dtype=error.dtype))
                gradients[number] += torch.autograd.grad(logits, out, error.to(logits.dtype))
        for translator, found in zip(self._translators, gradients, strict=True):
            translator.measure(torch.cat(found))

    def _number(self, layer: int) -> int:
        number = self.lens.translator(layer)
        assert number is not None
        return number

    def _resume(self, checkpoint: Checkpoint | None) -> int:
        """The step to go on with."""
        found = None if checkpoint is None else checkpoint.found()
        if found is None:
            return 0
        step, arrays = found
        for number, translator in enumerate(self._translators):
            prefix = f"{number}."
            own = {name.removeprefix(prefix): each for name, each in arrays.items() if name.startswith(prefix)}
            translator.load({name: torch.from_numpy(each) for name, each in own.items()})
        return step

    def _state(self) -> dict[str, np.ndarray]:
        return {
            f"{number}.{name}": tensor.cpu().numpy()
            for number, translator in enumerate(self._translators)
            for name, tensor in translator.state().items()
        }

    def _result(self) -> Lens:
        weights, biases = zip(*(translator.translator() for translator in self._translators), strict=True)
        weight, bias = (torch.stack(each).cpu().numpy() for each in (weights, biases))
        lens = self.lens
        return Lens("tuned", lens.sites, weight, bias, lens.shared, lens.offset, lens.model)


def _is_measured(step: int) -> bool:
    """Whether the curvature is measured before a step: at the start, and whenever the number of steps since has doubled."""
    return step == 0 or (step >= FIRST_AGAIN and step % FIRST_AGAIN == 0 and (step // FIRST_AGAIN).bit_count() == 1)


def _kl(wanted: Tensor, predicted: Tensor) -> Tensor:
    """Mean over rows of KL(wanted ‖ predicted) in nats."""
    wanted, predicted = wanted.float(), predicted.float()
    least = torch.finfo(torch.float32).tiny
    return (wanted * (wanted.clamp(min=least).log() - predicted.clamp(min=least).log())).sum(-1).mean()


def _checked_tokens(tokens: int | None) -> None:
    if tokens is not None and tokens < 1:
        raise InvalidInput(f"tokens={tokens}: give how many tokens to train on, at least 1")


def _device(asked: str | None) -> torch.device:
    if asked is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInput(f"device={asked!r}: {str(error).splitlines()[0]}") from None
    return device


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of products with the unembedding."""
    if precision not in get_args(Precision):
        raise InvalidInput(f"precision={precision!r}: there is {', '.join(map(repr, get_args(Precision)))}")
    if precision != "auto":
        return torch.float32 if precision == "float32" else torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    able = torch.cpu.get_capabilities() if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32
