"""`replay`: run stored sequences through the model once more, from the provenance alone, and compare. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from actcache.cache.location import Location
from actcache.cache.opening import read_root
from actcache.cache.store import open_store
from actcache.jobs.torch_half import torch_half
from actcache.schemas.capturable import Capturable
from actcache.schemas.errors import InvalidInput

SEQUENCES = 20


@dataclass
class SiteReplay:
    """How far what is stored of a site, in one form, is from what the model computes here.

    `largest_difference` is that of any element, `relative_error` the largest ‖stored - computed‖ / ‖computed‖ of a sequence;
    `equal` says that every bit is the same.
    """

    largest_difference: float = 0.0
    relative_error: float = 0.0
    tolerance: float = 0.0
    equal: bool = True

    @property
    def holds(self) -> bool:
        """Whether rounding, or the recorded damage of quantising, explains the difference. A NaN it does not."""
        return self.relative_error <= self.tolerance


@dataclass
class Replayed:
    """What replaying found, by stored array. `differs` names what ran here in another version or on another device."""

    url: str
    sequences: list[int] = field(default_factory=list)
    arrays: dict[str, SiteReplay] = field(default_factory=dict)
    differs: dict[str, str] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether every array holds what the model computes."""
        return all(found.holds for found in self.arrays.values())


def replay(
    url: str | Path | Location,
    *,
    sequences: int = SEQUENCES,
    model: str | Path | Capturable | None = None,
    endpoint_url: str | None = None,
    profile: str | None = None,
    anonymous: bool = False,
) -> Replayed:
    """Run some sequences of a sealed dataset through its model again, in the very batches of the build, and compare.

    The sequences are drawn by the dataset's key. The model is the one that the provenance names, at its commit; `model` says
    where it is if that was a local folder or a module of one's own. It must be the same by its content.

    Raises:
        NotFound, NotSealed, Corrupt: there is no sealed dataset, or it is damaged.
        InvalidInput: the model cannot be found or loaded.
        SpecMismatch: it is another model.
        Unsupported: torch and transformers are not installed.
    """
    if sequences < 1:
        raise InvalidInput(f"{sequences} sequences to replay; give at least 1")
    store = open_store(url, endpoint_url=endpoint_url, profile=profile, anonymous=anonymous)
    root = read_root(store)
    replayed: Replayed = torch_half("rerun").rerun(store, root, sequences, model)
    return replayed
