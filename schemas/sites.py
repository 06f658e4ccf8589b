"""Names of the points in a model whose output is stored, as TransformerLens names its hooks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from actcache.schemas.errors import InvalidInput

FINAL_NORM = "ln_final.hook_normalized"
MODULE = "module:"
_MEANING = {
    "hook_resid_pre": "residual stream before the block",
    "hook_attn_out": "what attention, or the recurrence in its place, adds to the residual stream",
    "hook_resid_mid": "residual stream between attention and MLP",
    "hook_mlp_out": "what the MLP adds to the residual stream",
    "hook_resid_post": "residual stream after the block, before any final norm",
    "hook_normalized": "residual stream after the final norm's division, before its gain and bias",
}


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


def site_meaning(site: str) -> str:
    """A site in words."""
    if site.startswith(MODULE):
        return f"output of the module {site.removeprefix(MODULE)}"
    return _MEANING.get(site.rsplit(".", 1)[-1], "as the module's description names it")


def is_residual(site: str) -> bool:
    """Whether a site is a state of the residual stream, which the model's head can read."""
    return re.fullmatch(r"blocks\.\d+\.hook_resid_(pre|mid|post)", site) is not None


def expand(
    patterns: str | Iterable[str], available: Sequence[str], n_layers: int, modules: Sequence[str] = ()
) -> list[str]:
    """The sites that patterns choose, in model order, none twice.

    A pattern is `resid`, `all`, a site's name, or a glob with `*`, `?`, `[…]` and `{a,b}`; several are
    separated by spaces or given as a list, and each alternative of a brace must match. `blocks.3.hook_resid_pre` is stored under the name
    `blocks.2.hook_resid_post`, since it is the same tensor. One that begins with `module:` chooses among `modules`, which
    nothing else does, and these come last.

    Raises:
        InvalidInput: a pattern matches none of the model's sites; the message lists what there is.
    """
    wanted = patterns.split() if isinstance(patterns, str) else [p for item in patterns for p in item.split()]
    if not wanted:
        raise InvalidInput("no sites asked for; give e.g. --sites resid")
    aliases = {resid_pre(layer): resid_post(layer - 1) for layer in range(1, n_layers)}
    chosen: set[str] = set()
    everything = {*available, *modules, *aliases}
    for pattern in (part for item in wanted for part in ([item] if item in everything else expand_braces(item))):
        if pattern == "resid":
            matches = [name for name in residual_stream(n_layers) if name in available]
        elif pattern == "all":
            matches = list(available)
        elif pattern.startswith(MODULE):
            matches = _matching(pattern, modules)
        else:
            matches = _matching(pattern, available) + [aliases[pre] for pre in _matching(pattern, list(aliases))]
        if not matches:
            raise InvalidInput(f"no site matches {pattern!r}; {_offer(pattern, available, n_layers, modules)}")
        chosen.update(matches)
    return [name for name in (*available, *modules) if name in chosen]


def _matching(pattern: str, among: Sequence[str]) -> list[str]:
    if pattern in among:  # a name may hold what a glob takes for a wildcard
        return [pattern]
    return [name for name in among if fnmatchcase(name, pattern)]


def _offer(pattern: str, available: Sequence[str], n_layers: int, modules: Sequence[str]) -> str:
    """What a model has, by kind, so that the line stays short for any number of layers."""
    if pattern.startswith(MODULE):
        near = get_close_matches(pattern, modules, 3, 0.4)
        return f"no module of that path gives one vector a token; close: {', '.join(near or modules[:3])}"
    kinds: dict[str, list[int]] = {}
    for name in available:
        if match := re.fullmatch(r"blocks\.(\d+)\.(\w+)", name):
            kinds.setdefault(match.group(2), []).append(int(match.group(1)))
    shown = [f"blocks.{_layers(layers)}.{kind}" for kind, layers in kinds.items()]
    shown += [name for name in available if not name.startswith("blocks.")]
    return f"this model of {n_layers} layers has {', '.join(shown)}"


def _layers(layers: list[int]) -> str:
    if len(layers) == 1:
        return str(layers[0])
    if layers == list(range(layers[0], layers[-1] + 1)):
        return f"{{{layers[0]}…{layers[-1]}}}"
    return "{" + ",".join(map(str, layers[:8])) + (",…}" if len(layers) > 8 else "}")


def expand_braces(pattern: str) -> list[str]:
    """`a.{0,6}.b` as `a.0.b` and `a.6.b`. Braces do not nest."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [rest for part in match.group(1).split(",") for rest in expand_braces(before + part.strip() + after)]
