"""Finding by trial how large a batch may be: as large as the device's memory allows, and no larger than makes it faster."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from actcache.jobs.capture import keep_nothing, run
from actcache.jobs.determinism import deterministic
from actcache.jobs.inputs import TokenInputs
from actcache.jobs.parts import ModelParts
from actcache.jobs.resident import Peak, available_bytes
from actcache.schemas.anatomy import Anatomy
from actcache.schemas.errors import InvalidInput

MEMORY_SHARE = 0.6
"""The part of the memory that is free now that a forward pass may take; the pipeline and other programs have the rest."""
FASTER = 1.03
"""A batch twice as large must be faster by this factor, now or at the next doubling."""
MOST_TOKENS = 1 << 19
ROUNDS = 2


@dataclass(frozen=True)
class Trial:
    """One size of batch: its tokens, tokens a second, and the bytes that its forward pass took."""

    tokens: int
    speed: float
    taken: int


@deterministic()
def batch_tokens(model: nn.Module, anatomy: Anatomy, sites: tuple[str, ...], context: int) -> int:
    """Tokens of the batch that is best here, a power of two times the context, of sequences of a whole context.

    Sizes are doubled until memory ends or speed does.

    Raises:
        InvalidInput: not even one sequence fits.
    """
    parts = ModelParts(model, anatomy)
    most = MEMORY_SHARE * available_bytes(parts.device)
    trials: list[Trial] = []
    tokens = context
    while tokens <= MOST_TOKENS and (not trials or 2 * trials[-1].taken <= most):
        found = _try(parts, sites, tokens // context, context)
        if found is None or found.taken > most:
            break
        trials.append(found)
        if len(trials) > 2 and max(part.speed for part in trials[-2:]) < FASTER * trials[-3].speed:
            break
        tokens *= 2
    if parts.device.type == "cuda":
        torch.cuda.empty_cache()  # a worker of this machine may need what the trial took
    if not trials:
        raise InvalidInput(
            f"a batch of one sequence of {context} tokens takes more than {most / 1e9:.1f} GB, which is what may be used here; "
            "give a shorter --context, or use a machine with more memory"
        )
    fastest = max(part.speed for part in trials)
    return next(part.tokens for part in trials if part.speed * FASTER >= fastest)


def _try(parts: ModelParts, sites: tuple[str, ...], count: int, length: int) -> Trial | None:
    """Run a batch; None where there is no room for it."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, parts.anatomy.vocab_size, (count, length), generator=generator).to(parts.device)
    inputs, peak = TokenInputs(ids, torch.ones_like(ids)), Peak(parts.device)
    best = float("inf")
    try:
        for _ in range(ROUNDS):
            began = time.perf_counter()
            run(parts, inputs, sites, keep_nothing)
            peak.wait()
            best = min(best, time.perf_counter() - began)
    except (torch.OutOfMemoryError, MemoryError):
        return None
    except RuntimeError as error:
        if "memory" not in str(error):  # how torch says on a processor that it got none
            raise
        return None
    return Trial(count * length, count * length / best, peak.taken())
