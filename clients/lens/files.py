"""Lenses as files: safetensors, with what they are made for inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from actcache.clients import tensor_file
from actcache.clients.evaluation import MEASURES
from actcache.clients.lens.translators import Lens
from actcache.schemas.errors import InvalidInput

KIND = "lens"
MOST = 1 << 31
"""Tokens that a lens looks ahead are fewer."""
KINDS = ("logit", "ridge", "tuned")


def save(lens: Lens, path: str | Path) -> Path:
    """Write a lens as one safetensors file, and give back its path: `weight` (translator, d, d), `bias` (translator, d), the rest as JSON.

    Raises:
        StoreError: the file cannot be written.
    """
    facts = {
        "kind": KIND,
        "lens": lens.kind,
        "sites": list(lens.sites),
        "shared": lens.shared,
        "offset": lens.offset,
        "model": lens.model,
        "facts": dict(lens.facts),
    }
    return tensor_file.write(path, {"weight": lens.weight, "bias": lens.bias}, facts)


def load(path: str | Path) -> Lens:
    """A lens that `save` wrote.

    Raises:
        NotFound: there is no such file.
        InvalidInput: it is no lens.
        Unsupported: a later version wrote it.
    """
    arrays, facts = tensor_file.read(path, KIND)
    try:
        kind, sites, shared, offset, model = (facts[name] for name in ("lens", "sites", "shared", "offset", "model"))
        weight, bias = arrays["weight"], arrays["bias"]
    except KeyError as missing:
        raise InvalidInput(f"{path}: no lens: it lacks {missing}") from None
    types = (
        isinstance(shared, bool),
        isinstance(offset, int) and 0 <= offset < MOST,
        isinstance(model, str),
        kind in KINDS,
    )
    named = isinstance(sites, list) and len(sites) > 1 and all(isinstance(site, str) for site in sites)
    if not (all(types) and named and isinstance(facts.get("facts"), dict)):
        raise InvalidInput(f"{path}: no lens: its facts are not those of one")
    if weight.ndim != 3 or str(weight.dtype) != "float32" or str(bias.dtype) != "float32":
        raise InvalidInput(f"{path}: no lens: weights of shape {weight.shape}, {weight.dtype}")
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise InvalidInput(f"{path}: no lens: it has values that are not finite")
    _check_held_out(path, facts["facts"], len(sites))
    return Lens(kind, tuple(sites), weight, bias, shared, offset, model, facts["facts"])


def _check_held_out(path: str | Path, facts: dict[str, Any], layers: int) -> None:
    """Refuse held-out measures that `Lens.held_out` could not show."""
    if not (found := facts.get("held_out")):
        return
    measures = [found.get(name) for name in MEASURES] if isinstance(found, dict) else []
    right = (
        bool(measures) and isinstance(found.get("tokens"), int),
        *(_is_list(each, layers, (float, int)) for each in measures),
        _is_list(facts.get("labels"), layers, (str,)),
    )
    if not all(right):
        raise InvalidInput(f"{path}: no lens: its held-out measures are not those of {layers} states")


def _is_list(value: Any, length: int, types: tuple[type, ...]) -> bool:
    return isinstance(value, list) and len(value) == length and all(isinstance(each, types) for each in value)
