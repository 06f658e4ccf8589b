"""How a dataset shows itself: as text, and as HTML in notebooks."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from html import escape

MOST_REPEATED = 3
_SEEN = {" ": "\N{OPEN BOX}", "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\N{RIGHTWARDS ARROW TO BAR}"}
_LONG_RUN = re.compile(rf"([{''.join(_SEEN.values())}])\1{{{MOST_REPEATED},}}")


def summary(facts: Mapping[str, str]) -> str:
    """Facts as aligned lines under a title."""
    width = max(map(len, facts))
    return "\n".join(["<actcache.Dataset>", *(f"  {name:<{width}}  {value}" for name, value in facts.items())])


def html_summary(facts: Mapping[str, str]) -> str:
    """Facts as an HTML table. Every value is escaped: it may be a stranger's."""
    rows = "".join(
        f"<tr><th style='text-align:left'>{escape(name)}</th><td style='text-align:left'>{escape(value)}</td></tr>"
        for name, value in facts.items()
    )
    return f"<div><b>actcache.Dataset</b><table>{rows}</table></div>"


def printable(value: str) -> str:
    """A value without control characters, which a stranger could use to rewrite a terminal."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in value)


def visible(text: str) -> str:
    """The text of a token so that all of it is seen, and in its own cell: spaces, line ends and tabs as signs.

    A run of more than three is one with its number (`␣×8`). Control characters are as `printable` shows them; a mark that
    would stand on the character before the cell stands on a dotted circle.
    """
    shown = printable("".join(_SEEN.get(character, character) for character in text))
    shown = _LONG_RUN.sub(lambda run: f"{run[1]}×{len(run[0])}", shown)
    return f"\N{DOTTED CIRCLE}{shown}" if shown and unicodedata.category(shown[0]).startswith("M") else shown
