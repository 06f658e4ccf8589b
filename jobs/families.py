"""The little about model families that their structure does not tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actcache.schemas.errors import Unsupported

OWN = "own"
"""The family of a module of the user's own."""
OVERRIDES: dict[str, dict[str, Any]] = {
    # Its inference halves the stream every few layers to fit float16: another stream than the one that was trained.
    "rwkv": {"rescale_every": 0},
}
"""Settings of a model's config that are changed before it is loaded, by model type."""


def family_of(config: Mapping[str, Any], where: str) -> str:
    """The family of a model: its config's `model_type`.

    Raises:
        Unsupported: the config names none.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or not family:
        raise Unsupported(f"{where}: config.json names no model_type; is this a model of transformers?")
    return family


def overrides(family: str) -> dict[str, Any]:
    """What is changed in a family's config."""
    return OVERRIDES.get(family, {})
