"""A model's anatomy: remembered, or found by loading the model and looking. No torch here unless it must be loaded."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from typing import Any

from pydantic import ValidationError

from actcache.jobs.families import OWN, overrides
from actcache.jobs.memory import recall, remember
from actcache.jobs.source import ModelSource
from actcache.jobs.torch_half import torch_half
from actcache.schemas.anatomy import ANATOMY_VERSION, Anatomy
from actcache.schemas.canonical import digest
from actcache.schemas.errors import Unsupported
from actcache.schemas.spec import ModelIdentity


@dataclass(frozen=True)
class Studied:
    """A model's anatomy, and the loaded model if it had to be loaded for that."""

    anatomy: Anatomy
    model: Any = None


def study(source: ModelSource, identity: ModelIdentity, compute_dtype: str, attention: str | None) -> Studied:
    """The anatomy of a model in a compute dtype; `attention` None chooses the best that the family has.

    Raises:
        InvalidInput: transformers cannot load the model.
        ProofFailed: one of its identities does not hold.
        Unsupported: it cannot be taken apart, or torch and transformers are not installed.
    """
    if identity.family == OWN:
        own: Any = source
        return Studied(own.anatomy(), own.module)
    asked = [
        identity.document(),
        compute_dtype,
        attention,
        overrides(identity.family),
        _transformers(),
        ANATOMY_VERSION,
    ]
    name = f"anatomy {digest(asked)}"
    known = recall(name)
    if known is not None:
        try:
            return Studied(Anatomy.model_validate_json(known))
        except ValidationError:
            pass  # kept by another version: it is found anew
    module = torch_half("model")
    model, attention = module.load_model(source.folder, identity.family, compute_dtype, attention)
    with torch_half("determinism").deterministic():
        anatomy: Anatomy = module.proven(model, attention, compute_dtype, source.name)
    remember(name, anatomy.model_dump_json())
    return Studied(anatomy, model)


def _transformers() -> str:
    try:
        return metadata.version("transformers")
    except metadata.PackageNotFoundError:
        raise Unsupported("building needs transformers; pip install 'actcache[jobs]'") from None
