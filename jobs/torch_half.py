"""The modules of this folder that need torch, imported when they are needed: who finds nothing to do must not wait for it."""

from __future__ import annotations

import importlib
from typing import Any

from actcache.schemas.errors import Unsupported


def torch_half(name: str) -> Any:
    """A module of `actcache.jobs` that needs torch.

    Raises:
        Unsupported: torch or transformers is not installed.
    """
    try:
        return importlib.import_module(f"actcache.jobs.{name}")
    except ModuleNotFoundError as error:
        raise Unsupported(f"building needs {error.name}; pip install 'actcache[jobs]'") from None
