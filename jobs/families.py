"""The model families that can be captured, as far as their `config.json` tells. No torch here: planning must be quick."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actcache.schemas.errors import InvalidInput, Unsupported
from actcache.schemas.plan import ModelShape

_SIZES = {"gpt2": ("n_layer", "n_embd", "vocab_size", "n_positions")}
_DEFAULTS = {"gpt2": {"n_layer": 12, "n_embd": 768, "vocab_size": 50257, "n_positions": 1024}}
ATTENTION = {"gpt2": "sdpa"}


def family_of(config: Mapping[str, Any], where: str) -> str:
    """The family of a model.

    Raises:
        Unsupported: this version cannot capture it.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _SIZES:
        raise Unsupported(
            f"{where}: model type {family!r} cannot be captured by this version; it can: {', '.join(_SIZES)}"
        )
    return family


def shape_of(config: Mapping[str, Any], where: str) -> ModelShape:
    """The sizes of a model.

    Raises:
        Unsupported: its family cannot be captured.
        InvalidInput: a size is no positive whole number.
    """
    family = family_of(config, where)
    sizes = [config.get(name, _DEFAULTS[family].get(name)) for name in _SIZES[family]]
    for name, size in zip(_SIZES[family], sizes, strict=True):
        if type(size) is not int or size < 1:
            raise InvalidInput(f"{where}: {name} is {size!r}, not a positive whole number")
    n_layers, d_model, vocabulary, context = sizes
    return ModelShape(n_layers=n_layers, d_model=d_model, vocab_size=vocabulary, max_context=context)
