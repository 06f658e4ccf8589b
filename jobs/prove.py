"""`prove`: whether a model can be captured, shown without building anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actcache.jobs.checkpoint import locate
from actcache.jobs.determinism import deterministic
from actcache.jobs.discover import plain_ids
from actcache.jobs.encode import load_tokenizer
from actcache.jobs.model import load_model, look_at
from actcache.jobs.parts import ModelParts
from actcache.jobs.proof import IDENTITIES, Identity, identities
from actcache.schemas.errors import InvalidInput

SEQUENCES, POSITIONS = 3, 48


@dataclass(frozen=True)
class Proved:
    """A model's sites with where each is read, and the error of every identity that they allow."""

    model: str
    family: str
    n_layers: int
    d_model: int
    compute_dtype: str
    attention: str
    sites: dict[str, str]
    head: list[str]
    identities: dict[str, dict[str, Any]]

    @property
    def holds(self) -> bool:
        """Whether every identity holds, so that a build would store this model."""
        return all(identity["holds"] for identity in self.identities.values())


def prove_model(
    model: str,
    *,
    revision: str | None = None,
    compute_dtype: str | None = None,
    attention: str | None = None,
    text: str | Path | None = None,
) -> Proved:
    """Load a model, take it apart and check every identity on a text file's tokens, or on tokens drawn at random.

    Raises:
        InvalidInput: the model cannot be loaded, or the text is too short.
        Unsupported: the model cannot be taken apart.
    """
    checkpoint = locate(model, revision)
    dtype = compute_dtype or checkpoint.dtype()
    family = checkpoint.family
    with deterministic():
        loaded, attention = load_model(checkpoint.folder, family, dtype, attention)
        anatomy = look_at(loaded, attention, checkpoint.name)
        parts = ModelParts(loaded, anatomy)
        ids, mask = _tokens(parts, checkpoint.folder, text)
        found = identities(parts, ids, mask, dtype)
    return Proved(
        model=checkpoint.name,
        family=family,
        n_layers=anatomy.n_layers,
        d_model=anatomy.d_model,
        compute_dtype=dtype,
        attention=attention,
        sites={site: anatomy.meaning(site) for site in anatomy.sites},
        head=[step.norm.kind if step.norm else step.op for step in anatomy.head],
        identities={name: _shown(name, identity) for name, identity in found.items()},
    )


def _shown(name: str, identity: Identity) -> dict[str, Any]:
    return {
        "says": IDENTITIES[name],
        "error": identity.error,
        "tolerance": identity.tolerance,
        "holds": identity.holds,
    }


def _tokens(parts: ModelParts, folder: Path, text: str | Path | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A few sequences (sequence, position) of different lengths, padded on the right, and their mask."""
    positions = min(POSITIONS, parts.anatomy.max_context or POSITIONS)
    if text is None:
        ids = plain_ids(parts.model, SEQUENCES, positions).cpu()
    else:
        try:
            content = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(f"{text}: cannot be read as text: {error}") from None
        tokens = load_tokenizer(folder)(content, verbose=False)["input_ids"]
        positions = min(positions, len(tokens) // SEQUENCES)
        if positions < 2:
            raise InvalidInput(f"{text}: {len(tokens)} tokens are too few; give a longer text")
        ids = torch.tensor(tokens[: SEQUENCES * positions]).reshape(SEQUENCES, positions)
    mask = torch.ones_like(ids)
    for row in range(SEQUENCES):
        mask[row, positions - row * positions // 4 :] = 0
    return ids * mask, mask
