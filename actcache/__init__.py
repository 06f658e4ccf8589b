"""actcache: run a GPT model over a corpus once, keep its residual stream, and never run the model again.

Importing this package registers the Zarr data type `bfloat16` with zarr-python. torch and transformers are imported by
`build` and `plan` alone, Dask when the first lazy array is made.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from actcache.cache import bfloat16 as _bfloat16
from actcache.schemas.capturable import Capturable
from actcache.schemas.errors import (
    ActcacheError,
    Corrupt,
    InvalidInput,
    NotFound,
    NotSealed,
    OutOfRange,
    ProofFailed,
    SpecMismatch,
    StoreError,
    Unsupported,
)
from actcache.schemas.spec import Spec

if TYPE_CHECKING:
    from actcache.clients import figures, geometry, lens, probe
    from actcache.clients.dataset import Dataset
    from actcache.clients.joined import Joined
    from actcache.clients.opening import catalog, open, verify
    from actcache.clients.selection import Selection
    from actcache.jobs.build import BuildResult, build
    from actcache.jobs.forecast import Forecast
    from actcache.jobs.planning import plan
    from actcache.jobs.replaying import replay

__version__ = metadata.version("actcache")

_LAZY = {
    "BuildResult": "actcache.jobs.build",
    "Dataset": "actcache.clients.dataset",
    "Forecast": "actcache.jobs.forecast",
    "Joined": "actcache.clients.joined",
    "Selection": "actcache.clients.selection",
    "build": "actcache.jobs.build",
    "catalog": "actcache.clients.opening",
    "figures": "actcache.clients",
    "geometry": "actcache.clients",
    "lens": "actcache.clients",
    "open": "actcache.clients.opening",
    "plan": "actcache.jobs.planning",
    "probe": "actcache.clients",
    "replay": "actcache.jobs.replaying",
    "verify": "actcache.clients.opening",
}
__all__ = [
    "ActcacheError",
    "BuildResult",
    "Capturable",
    "Corrupt",
    "Dataset",
    "Forecast",
    "InvalidInput",
    "Joined",
    "NotFound",
    "NotSealed",
    "OutOfRange",
    "ProofFailed",
    "Selection",
    "Spec",
    "SpecMismatch",
    "StoreError",
    "Unsupported",
    "build",
    "catalog",
    "figures",
    "geometry",
    "lens",
    "open",
    "plan",
    "probe",
    "replay",
    "verify",
]

_bfloat16.register()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'actcache' has no attribute {name!r}")
    if _LAZY[name] == "actcache.clients":
        return import_module(f"actcache.clients.{name}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
