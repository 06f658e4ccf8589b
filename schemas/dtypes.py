"""The stored dtypes, by their Zarr names, and what numpy makes of them."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from actcache.schemas.errors import InvalidInput

ACTIVATION_DTYPES = ("float32", "float16", "bfloat16")
_NUMPY: dict[str, np.dtype] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float64": np.dtype("<f8"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "uint8": np.dtype("u1"),
    "int8": np.dtype("i1"),
}


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype of a Zarr data type that format 1 allows.

    Raises:
        InvalidInput: another data type.
    """
    try:
        return _NUMPY[name]
    except (KeyError, TypeError):
        raise InvalidInput(f"data type {name!r} is not one of {', '.join(_NUMPY)}") from None


def is_float(name: str) -> bool:
    """Whether a data type is a floating-point one."""
    return "float" in name
