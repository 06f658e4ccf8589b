"""A forecast as text."""

from __future__ import annotations

from collections.abc import Iterator

from actcache.jobs.cost import BreakEven
from actcache.jobs.forecast import Forecast


def lines(found: Forecast) -> Iterator[str]:
    """A forecast in a dozen lines, each of a name and what it says."""
    for name, text in _facts(found):
        yield f"  {name:<10}  {text}"


def _facts(found: Forecast) -> Iterator[tuple[str, str]]:
    about = "" if found.exact else "about "
    yield (
        "tokens",
        f"{about}{found.n_tokens:,} in {found.n_sequences:,} sequences of {found.n_documents:,} documents ({found.basis})",
    )
    yield (
        "bytes",
        f"{size(found.raw_bytes)} raw, about {size(found.stored_bytes)} stored "
        f"({found.raw_bytes / found.stored_bytes:.2f}×, by a sample): {found.sites} sites, {found.stored_as}",
    )
    yield (
        "objects",
        f"{about}{found.objects:,} in {found.blocks:,} blocks of {found.block_tokens:,} tokens; "
        f"{found.put_requests:,} PUTs, {found.get_requests:,} GETs to read every site",
    )
    yield (
        "waste",
        f"{found.recomputed:.1%} of the tokens run twice, {found.padded:.1%} of the positions pads "
        f"(batches of {found.batch_tokens:,})",
    )
    memory = found.memory
    yield (
        "memory",
        f"at most {size(memory.peak)} a worker: {size(memory.resident)} model and libraries, {size(memory.forward)} forward pass, "
        f"{size(memory.pipeline)} for {memory.blocks_at_once} blocks under way",
    )
    if memory.device is not None:
        yield "GPU memory", f"at most {size(memory.device)}: {size(memory.model)} of it the model"
    left = "" if found.tokens_left == found.n_tokens else f" for the {found.tokens_left:,} tokens left"
    yield (
        "time",
        f"about {duration(found.seconds)}{left} on {found.workers} worker{'s' if found.workers != 1 else ''} like this one "
        f"({found.tokens_per_second:,.0f} tokens/s each, {size(found.bytes_per_second)}/s to the store; {found.device})",
    )
    cost, money = found.cost, found.currency
    spent = "" if cost.build_compute is None else f", compute {_money(cost.build_compute)} ({found.compute})"
    yield "build", f"requests {_money(cost.build_requests)}{spent} {money}"
    yield (
        "storage",
        f"{_money(cost.storage_month)} {money} a month; reading all of it {_money(cost.read_in_region)} in the region, "
        f"{_money(cost.read_over_internet)} over the internet ({found.provider}, prices as of {found.prices_as_of})",
    )
    if cost.recompute is not None:
        yield (
            "instead",
            f"computing it anew costs {_money(cost.recompute)} {money} a pass; keeping it is cheaper "
            f"{_often(cost.break_even_in_region)} in the region, {_often(cost.break_even_over_internet)} over the internet",
        )


def _often(even: BreakEven | None) -> str:
    if even is None or even.passes_a_month is None:
        return "never"
    return f"from {even.passes_a_month:.2g} passes a month on"


def _money(amount: float) -> str:
    return f"{amount:,.2f}" if amount >= 0.01 or amount == 0 else f"{amount:.1g}"


def size(count: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"


def duration(seconds: float) -> str:
    """A time span in its two largest units."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    for unit, length, small, part in (("days", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit} {int(seconds % length // part)} {small}"
    return f"{seconds:.0f} s"
