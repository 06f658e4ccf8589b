"""Where a model's sites are read, and how its logits are made: what looking at a model once tells about it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from actcache.schemas.record import Record
from actcache.schemas.sites import FINAL_NORM, MODULE

ANATOMY_VERSION = 2
"""Raised whenever the search finds other things in the same model."""


class Tap(Record):
    """One site: the input or output of a module, times a factor.

    `module` is the path below the model (empty for the model itself), `factor` what the model multiplies the module's
    output by before it adds it to the residual stream.
    """

    module: str
    at: Literal["input", "output"]
    factor: float = 1.0

    def meaning(self) -> str:
        """The tap in words."""
        times = "" if self.factor == 1.0 else f" × {self.factor:.9g}"
        return f"{self.at} of {self.module or 'the whole module'}{times}"


class NormParts(Record):
    """A norm: x̂ · gain + bias, where x̂ is x / rms(x), of the centred x for a layer norm.

    `weight` and `bias` are the names of its parameters; `unit_offset` says that the gain is 1 + weight.
    """

    kind: Literal["layer_norm", "rms_norm"]
    eps: float
    weight: str | None = None
    unit_offset: bool = False
    bias: str | None = None


class HeadStep(Record):
    """One operation between the last block's output and the logits.

    A norm or a linear map of a module, the first so many rows of the result, a scale by a factor, or a soft cap at it.
    """

    op: Literal["norm", "linear", "first", "scale", "softcap"]
    module: str | None = None
    norm: NormParts | None = None
    rows: int | None = None
    factor: float | None = None


class Anatomy(Record):
    """A decoder-only model taken apart.

    `blocks` are the paths of the blocks in order, `taps` every site in model order, `head` the steps from the last block's
    output to the logits, `modules` the width of each module that gives one vector a token, `widths` that of
    each site where it is not `d_model`, `max_context` the longest
    sequence that the config allows, `attention` the implementation that the model was loaded with.
    """

    blocks: tuple[str, ...]
    d_model: int
    vocab_size: int
    max_context: int | None
    attention: str
    taps: dict[str, Tap]
    head: tuple[HeadStep, ...]
    modules: dict[str, int]
    widths: dict[str, int] = Field(default_factory=dict)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def sites(self) -> list[str]:
        """Every named site, in model order; any module can be asked for besides."""
        return list(self.taps)

    @property
    def module_sites(self) -> list[str]:
        """A site for each module that gives one vector a token, in the order of the calls' ends."""
        return [MODULE + path for path in self.modules]

    def tap(self, site: str) -> Tap:
        """Where a site is read."""
        return Tap(module=site.removeprefix(MODULE), at="output") if site.startswith(MODULE) else self.taps[site]

    def named_modules(self, sites: Iterable[str]) -> dict[str, str] | None:
        """The module of each of some sites that the user named; None for a model whose sites are found."""
        return None if self.blocks else {site: self.tap(site).module for site in sites}

    def meaning(self, site: str) -> str:
        """Where a site is read, in words."""
        norm = self.final_norm if site == FINAL_NORM else None
        return self.tap(site).meaning() + (f", as {norm.module} normalises it" if norm is not None else "")

    def width(self, site: str) -> int:
        """Length of a site's vectors."""
        if site.startswith(MODULE):
            return self.modules[site.removeprefix(MODULE)]
        return self.widths.get(site, self.d_model)

    @property
    def unembedding(self) -> int:
        """Index in `head` of the step that makes logits: the last linear one."""
        return max(index for index, step in enumerate(self.head) if step.op == "linear")

    @property
    def final_norm(self) -> HeadStep | None:
        """The norm of the last block's output, if that is how the head begins."""
        return self.head[0] if FINAL_NORM in self.taps else None
