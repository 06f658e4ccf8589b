"""The states and the labels that a probe is fitted on and measured on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from actcache.cache.head import Head
from actcache.clients.bootstrap import Groups
from actcache.clients.probe.control import Control, control_of, drawn
from actcache.clients.probe.labels import Labels
from actcache.clients.states import States, numbered, site_labels
from actcache.schemas.errors import InvalidInput, NotFound
from actcache.schemas.quantised import KINDS, Kind
from actcache.schemas.sites import expand

if TYPE_CHECKING:
    from actcache.clients.selection import Selectable


@dataclass(frozen=True)
class Examples:
    """Tokens with their states and with what a probe is to say of each: the labels, and those of control tasks.

    Attributes:
        read: the states of the tokens.
        answers: one array for the labels and one for each control: (token,) numbers of classes, or (token, outputs).
    """

    read: States
    answers: tuple[np.ndarray, ...]

    def split(self, share: float, seed: int) -> tuple[Examples, Examples]:
        """Two parts, of other documents each; about `share` of the tokens are in the second. Raises as `States.split`."""
        first, second = self.read.split(share, seed)
        return self.of(first), self.of(second)

    def of(self, part: States) -> Examples:
        """Those of some of the tokens."""
        places = np.searchsorted(self.read.token, part.token)
        return Examples(part, tuple(answer[places] for answer in self.answers))

    def only(self, keep: np.ndarray) -> Examples:
        """Those tokens, (token,) bool."""
        return self.of(self.read.only(np.flatnonzero(keep)))

    def mapped(self, change: Callable[[np.ndarray], np.ndarray]) -> Examples:
        """With every array of answers changed."""
        return Examples(self.read, tuple(change(answer) for answer in self.answers))

    def with_controls(self, asked: bool | str, draws: int, seed: int, pool: np.ndarray) -> tuple[Examples, Control]:
        """With so many control tasks behind the labels, drawn from `pool`, and what the control is. Raises as `control_of`."""
        control = control_of(asked, self.read, self.answers[0])
        count = 0 if control == "none" else draws
        controls = [drawn(control, self.read, pool, seed, number) for number in range(count)]
        return Examples(self.read, (self.answers[0], *controls)), control


def examples(
    ds: Selectable,
    labels: Labels,
    sites: Sequence[str] | str | None = None,
    max_tokens: int | None = None,
    quantised: str | None = None,
) -> Examples:
    """The tokens of a dataset or a selection that have a label, those among the first `max_tokens`.

    `sites` are names or patterns; by default the states of the residual stream that there are, of a dataset without them all sites.

    Raises:
        NotFound: no such site, in the form asked for.
        InvalidInput: no labelled token; sites of different widths; a token that a selection names twice.
    """
    whole = ds.whole
    if quantised is not None and quantised not in KINDS:
        raise InvalidInput(f"quantised={quantised!r}: there is {', '.join(KINDS)}")
    kind: Kind | None = quantised
    names = _names(ds, sites)
    widths = {name: ds.source(name, kind).shape[1] for name in names}
    if len(set(widths.values())) > 1:
        raise InvalidInput(
            f"{ds.url}: sites of different widths: {', '.join(f'{n} has {w}' for n, w in widths.items())}"
        )
    token = np.sort(ds.index.tokens(0, len(ds.index)))[:max_tokens]
    if (token[1:] == token[:-1]).any():
        raise InvalidInput(f"{ds.url}: a selection that names a token twice")
    token = token[labels.labelled[token]]
    if not len(token):
        raise InvalidInput(f"{ds.url}: no token has a label")
    shown = site_labels(ds, None) if list(names) == ds.residual_states else names
    owner, count = numbered(whole, "document", token)
    read = States(whole, names, shown, Head([], {}), token, token, Groups(owner, count, "document"), 0, kind)
    return Examples(read, (labels.at(token),))


def _names(ds: Selectable, sites: Sequence[str] | str | None) -> tuple[str, ...]:
    if sites is None:
        there = [site for site in ds.residual_states if site in ds.captured]
        names = there or ds.captured
    else:
        asked = [sites] if isinstance(sites, str) else list(sites)
        try:
            names = asked if set(asked) <= set(ds.captured) else expand(asked, ds.captured, ds.model.n_layers)
        except InvalidInput as error:
            raise NotFound(f"{ds.url}: {error}") from None
    if not names:
        raise NotFound(f"{ds.url}: no site to probe")
    if len(set(names)) < len(names):
        raise InvalidInput(f"{ds.url}: a site is named twice")
    return tuple(names)
