"""What a lens is: an affine map for each state, after which the model's own head reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from actcache.clients.evaluation import MEASURES
from actcache.clients.results import Measure, Results
from actcache.schemas.errors import InvalidInput, NotFound, SpecMismatch

if TYPE_CHECKING:
    from actcache.cache.head import Head
    from actcache.clients.states import States

Kind = Literal["logit", "ridge", "tuned"]


@dataclass(frozen=True, eq=False)
class Lens:
    """Reads each state h of a network as head(h + W h + b) (Belrose et al. 2023, arXiv 2303.08112). W and b of 0 are the logit lens.

    The last state is read as it is, unless the lens looks ahead.

    Attributes:
        kind: `logit`, `ridge` or `tuned`: how it was made.
        sites: the states that it reads, first to last.
        weight: W of each translator, (translator, d, d) float32, so that a row vector h becomes h + h Wᵀ + b.
        bias: b of each translator, (translator, d) float32.
        shared: whether one translator reads all states.
        offset: how many tokens later the prediction is made that it looks for; 0 is the prediction at the same token.
        model: hash of the model whose states it reads.
        facts: how it was made: the dataset's key, tokens, held-out measures; JSON takes it.
    """

    kind: Kind
    sites: tuple[str, ...]
    weight: np.ndarray
    bias: np.ndarray
    shared: bool
    offset: int
    model: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = translator_count(len(self.sites), self.shared, self.offset)
        width = self.weight.shape[-1]
        if self.weight.shape != (count, width, width) or self.bias.shape != (count, width):
            raise InvalidInput(
                f"a lens of {len(self.sites)} states needs weights ({count}, d, d) and biases ({count}, d), "
                f"not {self.weight.shape} and {self.bias.shape}"
            )

    @property
    def width(self) -> int:
        """Dimensions of a state."""
        return int(self.weight.shape[-1])

    def translator(self, layer: int) -> int | None:
        """Which translator reads a state; None for a last state that is read as it is."""
        if layer == len(self.sites) - 1 and not self.offset:
            return None
        return 0 if self.shared else layer

    def translate(self, layer: int, h: np.ndarray) -> np.ndarray:
        """States (n, d) of a layer as h + W h + b, float32."""
        number = self.translator(layer)
        if number is None:
            return h
        return np.asarray(h + (h @ self.weight[number].T + self.bias[number]))

    def logits(self, head: Head, layer: int, h: np.ndarray) -> np.ndarray:
        """What the lens makes of states (n, d) of a layer: logits (n, vocabulary), float32."""
        return head.logits(self.translate(layer, h))

    def check(self, states: States) -> None:
        """Refuse states that the lens was not made for.

        Raises:
            SpecMismatch: they are another model's.
            InvalidInput: other sites, or a prediction at another distance.
        """
        if self.model != states.ds.model_key:
            raise SpecMismatch(
                f"{states.ds.url}: the lens was made for another model ({self.model[:12]}…, and this is {states.ds.model_key[:12]}…); "
                "fit one on a dataset of this model"
            )
        if self.sites != states.sites:
            raise InvalidInput(
                f"{states.ds.url}: the lens reads {', '.join(self.sites)}, not {', '.join(states.sites)}; give sites="
            )
        if self.width != states.width:
            raise InvalidInput(f"{states.ds.url}: the lens reads states of {self.width} dimensions, not {states.width}")
        if self.offset != states.offset:
            raise InvalidInput(
                f"the lens looks {self.offset} tokens ahead; give offset={self.offset}, not {states.offset}"
            )

    def held_out(self) -> Results:
        """What was measured on held-out documents when the lens was made: loss, KL, entropy (nats) and agreement (share) by layer.

        Raises:
            NotFound: nothing was.
        """
        found = self.facts.get("held_out")
        if not found:
            raise NotFound("the lens says nothing of held-out documents; actcache.lens.evaluate measures it")
        labels = {"layer": self.facts["labels"]}
        measures = {name: Measure(np.array(found[name]), unit) for name, unit in MEASURES.items()}
        return Results(measures, labels, {"lens": self.kind, "held-out tokens": found["tokens"]})

    def __repr__(self) -> str:
        shared = ", one translator for all" if self.shared else ""
        ahead = f", {self.offset} tokens ahead" if self.offset else ""
        return f"<actcache {self.kind} lens of {len(self.sites)} states × {self.width}{shared}{ahead}>"


def translator_count(states: int, shared: bool, offset: int) -> int:
    """How many translators a lens of so many states has."""
    return 1 if shared else states if offset else states - 1


def identity(states: States, shared: bool = False) -> Lens:
    """The logit lens (nostalgebraist 2020) of some states: every W and b is 0."""
    count, width = translator_count(states.n_layers, shared, states.offset), states.width
    weight, bias = np.zeros((count, width, width), np.float32), np.zeros((count, width), np.float32)
    return Lens("logit", states.sites, weight, bias, shared, states.offset, states.ds.model_key)
