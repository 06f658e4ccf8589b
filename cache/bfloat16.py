"""bfloat16 for zarr-python: the registered Zarr extension type, which zarr-python itself does not bring.

Importing actcache registers it. Without it zarr and xarray refuse a group with a bfloat16 array, loudly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeGuard, cast

import ml_dtypes
import numpy as np
import zarr.dtype
import zarr.errors
from zarr.core.dtype.common import HasEndianness, HasItemSize
from zarr.core.dtype.npy.common import check_json_float_v3, float_from_json_v3, float_to_json_v3
from zarr.dtype import ZDType, data_type_registry

# zarr 3.2 moved the class and warns where it was.
DataTypeValidationError: type[Exception] = (
    getattr(zarr.errors, "DataTypeValidationError", None) or zarr.dtype.DataTypeValidationError
)
_NATIVE = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, kw_only=True)
class BFloat16(ZDType[Any, Any], HasEndianness, HasItemSize):
    """Zarr data type `bfloat16`, numpy dtype `ml_dtypes.bfloat16`."""

    dtype_cls = type(_NATIVE)
    _zarr_v3_name: ClassVar[Literal["bfloat16"]] = "bfloat16"

    @property
    def item_size(self) -> int:
        """Bytes of a value."""
        return 2

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> Self:
        """The data type of numpy's `bfloat16`."""
        if dtype == _NATIVE:
            return cls()
        raise DataTypeValidationError(f"{dtype} is not bfloat16")

    def to_native_dtype(self) -> Any:
        """Numpy's `bfloat16`, little-endian as every stored array."""
        return _NATIVE

    @classmethod
    def _from_json_v2(cls, data: Any) -> Self:
        raise DataTypeValidationError("bfloat16 has no Zarr v2 name")

    @classmethod
    def _from_json_v3(cls, data: Any) -> Self:
        if data == cls._zarr_v3_name:
            return cls()
        raise DataTypeValidationError(f"{data!r} is not 'bfloat16'")

    def to_json(self, zarr_format: Any) -> Any:
        """The data type's name in Zarr v3; v2 has none."""
        if zarr_format == 3:
            return self._zarr_v3_name
        raise ValueError("bfloat16 has no Zarr v2 name")

    def _check_scalar(self, data: object) -> TypeGuard[Any]:
        return isinstance(data, int | float | str | np.number | ml_dtypes.bfloat16)

    def cast_scalar(self, data: object) -> Any:
        """A number as bfloat16."""
        if self._check_scalar(data):
            return _NATIVE.type(data)
        raise TypeError(f"cannot make a bfloat16 of {data!r}")

    def default_scalar(self) -> Any:
        """Zero."""
        return _NATIVE.type(0)

    def from_json_scalar(self, data: Any, *, zarr_format: Any) -> Any:
        """A fill value: a number, or 'NaN', 'Infinity', '-Infinity'."""
        if check_json_float_v3(data):
            return _NATIVE.type(float_from_json_v3(data))
        raise TypeError(f"invalid fill value {data!r} of a bfloat16 array")

    def to_json_scalar(self, data: object, *, zarr_format: Any) -> Any:
        """A fill value as JSON."""
        return float_to_json_v3(float(cast("Any", data)))


def register() -> None:
    """Make zarr-python know bfloat16. Doing it twice does nothing."""
    if BFloat16._zarr_v3_name not in data_type_registry.contents:
        data_type_registry.register(BFloat16._zarr_v3_name, BFloat16)
