"""Names of the points in a model whose output is stored, as TransformerLens names its hooks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from actcache.schemas.errors import InvalidInput

_BLOCK_SITES = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
FINAL_NORM = "ln_final.hook_normalized"


def resid_pre(layer: int) -> str:
    """The residual stream before a block."""
    return f"blocks.{layer}.hook_resid_pre"


def resid_mid(layer: int) -> str:
    """The residual stream between a block's attention and its MLP."""
    return f"blocks.{layer}.hook_resid_mid"


def resid_post(layer: int) -> str:
    """The residual stream after a block."""
    return f"blocks.{layer}.hook_resid_post"


def attn_out(layer: int) -> str:
    """What a block's attention adds to the stream."""
    return f"blocks.{layer}.hook_attn_out"


def mlp_out(layer: int) -> str:
    """What a block's MLP adds to the stream."""
    return f"blocks.{layer}.hook_mlp_out"


def residual_stream(n_layers: int) -> list[str]:
    """The whole residual stream, n_layers + 1 states, none twice: what `resid` means."""
    return [resid_pre(0), *(resid_post(layer) for layer in range(n_layers))]


def all_sites(n_layers: int) -> list[str]:
    """Every site of a model whose blocks are attention, then MLP, in model order.

    `resid_pre` of a later block is `resid_post` of the one before and is not named twice.
    """
    names = [resid_pre(0)]
    for layer in range(n_layers):
        names += [f"blocks.{layer}.{kind}" for kind in _BLOCK_SITES if kind != "hook_resid_pre"]
    return [*names, FINAL_NORM]


def is_residual(site: str) -> bool:
    """Whether a site is a state of the residual stream, which the model's head can read."""
    return re.fullmatch(r"blocks\.\d+\.hook_resid_(pre|mid|post)", site) is not None


def expand(patterns: str | Iterable[str], available: Sequence[str], n_layers: int) -> list[str]:
    """The sites that patterns choose, in model order, none twice.

    A pattern is `resid`, `all`, a site's name, or a glob with `*`, `?`, `[…]` and `{a,b}`; several are
    separated by spaces or given as a list. `blocks.3.hook_resid_pre` is stored under the name
    `blocks.2.hook_resid_post`, since it is the same tensor.

    Raises:
        InvalidInput: a pattern matches none of the model's sites; the message lists what there is.
    """
    wanted = patterns.split() if isinstance(patterns, str) else [p for item in patterns for p in item.split()]
    if not wanted:
        raise InvalidInput("no sites asked for; give e.g. --sites resid")
    aliases = {resid_pre(layer): resid_post(layer - 1) for layer in range(1, n_layers)}
    chosen: set[str] = set()
    for pattern in wanted:
        if pattern == "resid":
            matches = [name for name in residual_stream(n_layers) if name in available]
        elif pattern == "all":
            matches = list(available)
        else:
            globs = expand_braces(pattern)
            matches = [name for name in available if any(fnmatchcase(name, g) for g in globs)]
            matches += [post for pre, post in aliases.items() if any(fnmatchcase(pre, g) for g in globs)]
        if not matches:
            shown = ", ".join(available[:8]) + (", …" if len(available) > 8 else "")
            raise InvalidInput(f"no site matches {pattern!r}; this model of {n_layers} layers has: {shown}")
        chosen.update(matches)
    return [name for name in available if name in chosen]


def expand_braces(pattern: str) -> list[str]:
    """`a.{0,6}.b` as `a.0.b` and `a.6.b`. Braces do not nest."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [rest for part in match.group(1).split(",") for rest in expand_braces(before + part.strip() + after)]
