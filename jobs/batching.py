"""How many sequences a forward pass takes: what a spec asks for, or what is found by trial."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from actcache.schemas.errors import InvalidInput
from actcache.schemas.plan import BatchRule
from actcache.schemas.spec import Execution, Spec

TOKENS_PER_BATCH = 8192
ITEMS_PER_BATCH = 256
AUTO = "auto"
LEAST_POSITIONS = 32
"""With fewer rows, matrix products on a processor are split so that their last bits depend on the number of threads."""

Found = Callable[[], int]
"""Finds by trial how many tokens a batch may have."""


def limits_of_tokens(spec: Spec, found: Found) -> dict[str, int]:
    """The fields of an `Execution` that say how large batches of token sequences are.

    Raises:
        InvalidInput: two limits are asked for.
    """
    asked = asked_limits(spec, found)
    return asked or {"batch_tokens": TOKENS_PER_BATCH}


def limits_of_items(spec: Spec, positions: int) -> dict[str, int]:
    """The same for items of a user's own, which are all of one length."""
    return {"batch_size": spec.batch_size or min(max(1, TOKENS_PER_BATCH // positions), ITEMS_PER_BATCH)}


def asked_limits(spec: Spec, found: Found) -> dict[str, int]:
    """What a spec says of the limits; nothing where it leaves them open.

    Raises:
        InvalidInput: two limits are asked for.
    """
    if spec.batch_size is not None and spec.batch_tokens is not None:
        raise InvalidInput("--batch-tokens and --batch-size are two ways to say how large a batch is; give one")
    if spec.batch_size is not None:
        return {"batch_size": spec.batch_size}
    if spec.batch_tokens is None:
        return {}
    return {"batch_tokens": spec.batch_tokens if isinstance(spec.batch_tokens, int) else found()}


def with_limits(execution: Execution, limits: dict[str, int]) -> Execution:
    """An execution with other limits, if there are any."""
    if not limits:
        return execution
    update: dict[str, Any] = {"batch_size": None, "batch_tokens": None, **limits}
    return execution.model_copy(update=update)


def rule_of(execution: Execution, max_context: int | None) -> BatchRule:
    """How an execution's sequences become batches."""
    if execution.batch_tokens is not None:
        least = min(LEAST_POSITIONS, max_context or LEAST_POSITIONS)
        return BatchRule(order="length", tokens=execution.batch_tokens, least_positions=least)
    return BatchRule(size=execution.batch_size)
