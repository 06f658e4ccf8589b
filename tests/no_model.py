"""Preloaded by a Dask worker: a node on which the model is not to be found."""

from __future__ import annotations

from actcache.jobs import worker
from actcache.schemas.errors import InvalidInput


def _missing(*_: object) -> None:
    raise InvalidInput("the model is not on this node")


worker.source_of = _missing  # type: ignore[assignment]
