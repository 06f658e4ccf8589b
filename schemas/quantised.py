"""Quantised sites: what their arrays are called, how they are cut, and the records of what quantising cost.

A value is code · scale, where a scale serves a group of neighbouring dimensions of one token:

- `int8`: codes are whole numbers from -127 to 127
- `fp8`: codes are the bits of float8_e4m3fn (4 bits of exponent, 3 of mantissa, no infinity), stored as uint8

Scales are float32 with the 8 significant bits of a bfloat16, at least 2^-126; so an int8 value is exact in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from actcache.schemas.array import ArrayLayout
from actcache.schemas.record import Record

Kind = Literal["int8", "fp8"]
KINDS: tuple[Kind, ...] = ("int8", "fp8")
STORED: dict[Kind, str] = {"int8": "int8", "fp8": "uint8"}
LARGEST_CODE: dict[Kind, int] = {"int8": 127, "fp8": 448}
GROUP = 32
CHUNK_BYTES = 512 << 10
_ENCODING: dict[Kind, str] = {"int8": "int8", "fp8": "float8_e4m3fn"}


class Quantisation(Record):
    """How sites are quantised: the kinds, the dimensions that share a scale, and whether exact arrays are left out."""

    kinds: tuple[Kind, ...]
    group: int = GROUP
    only: bool = False


class BlockDamage(Record):
    """What quantising did to one site in one block.

    `squared_error` and `squared_norm` are Σ‖x - q‖² and Σ‖x‖² over its tokens. `errors` counts the tokens by their
    relative error ‖x - q‖ / ‖x‖: pairs of the error's first 16 bits as a float64 (sign, exponent, 4 bits of the mantissa) and a
    number of tokens; `largest` is the largest of them. `kl` is the sum, and `largest_kl` the largest, of KL(head(x) ‖ head(q))
    in nats over `kl_tokens` of its tokens; None where no head was at hand, or a logit was not finite.
    """

    squared_error: float
    squared_norm: float
    errors: tuple[tuple[int, int], ...]
    largest: float
    kl: float | None = None
    largest_kl: float | None = None
    kl_tokens: int = 0


class Damage(Record):
    """What quantising did to a site, over the whole dataset.

    `relative_error` is sqrt(Σ‖x - q‖² / Σ‖x‖²); `median_token_error` (within 1/32 of itself) and `largest_token_error` are of
    the tokens' own relative errors. `kl` is the mean, and `largest_kl` the largest, KL(head(x) ‖ head(q)) in nats of the
    `kl_tokens` tokens that were looked at; `kl_note` says why there is none.
    """

    relative_error: float
    median_token_error: float
    largest_token_error: float
    kl: float | None
    largest_kl: float | None
    kl_tokens: int
    kl_note: str | None = None


def parse_kinds(value: str | Iterable[str]) -> tuple[str, ...]:
    """Kinds as asked for, in words separated by commas or spaces, in the order of `KINDS`, none twice.

    Raises:
        ValueError: a kind that there is not.
    """
    texts = [value] if isinstance(value, str) else list(value)
    words = {word for text in texts for word in (text.replace(",", " ").split() if isinstance(text, str) else [text])}
    for word in words - set(KINDS):
        raise ValueError(f"{word!r} is not one of {', '.join(KINDS)}")
    return tuple(kind for kind in KINDS if kind in words)


def quantised_name(site: str, kind: str) -> str:
    """Name of a site's codes."""
    return f"{site}.{kind}"


def scale_name(site: str, kind: str) -> str:
    """Name of the scales of a site's codes."""
    return f"{quantised_name(site, kind)}.scale"


def quantised_layouts(site: ArrayLayout, kind: Kind, group: int) -> tuple[ArrayLayout, ArrayLayout]:
    """The arrays of a site's codes, (token, width), and of their scales, (token, ⌈width / group⌉)."""
    (rows, width), (token, dimension) = site.shape, site.dimensions
    codes, scales = quantised_name(site.name, kind), scale_name(site.name, kind)
    about: dict[str, Any] = {"of": site.name, "group": group}
    formula = f"value [token, i] is code [token, i] · scale [token, i // {group}]"
    return (
        _layout(
            codes,
            (rows, width),
            STORED[kind],
            site,
            (token, dimension),
            about | {"scale": scales, "encoding": _ENCODING[kind], "meaning": formula},
        ),
        _layout(scales, (rows, groups(width, group)), "float32", site, (token, f"{dimension}_group"), about),
    )


def groups(width: int, group: int) -> int:
    """Number of scales a token has; the last group may be short."""
    return -(-width // group)


def error_bound(kind: Kind, group: int) -> float:
    """The largest relative error ‖x - q‖ / ‖x‖ that quantising can cause in any vector that is not next to nothing.

    With t the largest magnitude of a group, its scale is at most s = t / largest code · (1 + 2⁻⁸), and its norm at least t. int8 errs by
    s / 2 at most, so the group by √group · s / 2; fp8 by a 16th of the value or, where that is subnormal, by s · 2⁻¹⁰.
    """
    scale = (1 + 2**-8) / LARGEST_CODE[kind]
    if kind == "int8":
        return math.sqrt(group) * scale / 2
    return 2**-4 + math.sqrt(group) * scale * 2**-10


def quantised_problems(
    roles: Mapping[str, Any], layouts: Mapping[str, ArrayLayout], n_tokens: int, widths: Mapping[str, int]
) -> Iterator[str]:
    """What cannot be about the quantised arrays of a root, which may be a stranger's. Kinds of a later version pass."""
    for name, role in roles.items():
        if role.role != "quantised" or role.kind not in KINDS:
            continue
        if role.of not in widths or name != quantised_name(role.of, role.kind):
            yield f"array {name!r} is quantised of {role.of!r}, which is no site of its name"
            return
        if type(role.group) is not int or not 1 <= role.group <= 1 << 20:
            yield f"array {name!r} has scales for groups of {role.group!r} dimensions"
            return
        width = widths[role.of]
        scales = layouts.get(role.scale or "")
        wanted = (n_tokens, groups(width, role.group))
        codes = layouts[name]
        if codes.shape != (n_tokens, width) or codes.dtype != STORED[role.kind]:
            yield f"array {name!r} is {codes.dtype} {codes.shape}, not {STORED[role.kind]} {(n_tokens, width)}"
        if scales is None:
            yield f"array {name!r} has no scales; {role.scale!r} is missing"
        elif scales.shape != wanted or scales.dtype != "float32":
            yield f"array {role.scale!r} is {scales.dtype} {scales.shape}, not float32 {wanted}"


def _layout(
    name: str,
    shape: tuple[int, int],
    dtype: str,
    site: ArrayLayout,
    dimensions: tuple[str, str],
    attributes: dict[str, Any],
) -> ArrayLayout:
    """Cut as the site is, with as many of its chunks in one as fit into 512 KiB: these rows are shorter."""
    row = ArrayLayout(name, shape, dtype, 1, 1, dimensions).row_bytes
    fit = max(1, CHUNK_BYTES // max(1, row * site.chunk_rows))
    together = next(
        count for count in range(min(fit, site.chunks_per_shard), 0, -1) if not site.chunks_per_shard % count
    )
    return ArrayLayout(name, shape, dtype, site.shard_rows, site.chunk_rows * together, dimensions, attributes)
