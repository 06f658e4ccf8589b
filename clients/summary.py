"""How a dataset shows itself: as text, and as HTML in notebooks."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape


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
