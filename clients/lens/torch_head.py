"""A stored head in torch, with gradients: the same operations as `actcache.cache.head`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from actcache.cache.head import Head, Operation
from actcache.schemas.errors import Unsupported


class TorchHead:
    """Logits of states, on a device. Products with matrices are in `dtype`, everything else in float32."""

    def __init__(self, head: Head, device: torch.device, dtype: torch.dtype) -> None:
        self._operations = head.operations
        self._dtype = dtype
        matrices = {str(each["weight"]) for each in head.operations if each["op"] == "linear"}
        self._arrays = {
            name: torch.as_tensor(array).to(device, dtype if name in matrices else torch.float32)
            for name, array in head.arrays.items()
        }

    def logits(self, h: Tensor) -> Tensor:
        """The logits (n, vocabulary) of states (n, d), float32, in the dtype of products.

        Raises:
            Unsupported: an operation that this version does not know.
        """
        for operation in self._operations:
            h = self._apply(operation, h)
        return h

    def _apply(self, operation: Operation, x: Tensor) -> Tensor:
        kind = operation["op"]
        if kind in ("layer_norm", "rms_norm"):
            x = x.float()
            if kind == "layer_norm":
                x = functional.layer_norm(x, x.shape[-1:], eps=float(operation["eps"]))
            else:
                x = functional.rms_norm(x, x.shape[-1:], eps=float(operation["eps"]))
            x = x * self._array(operation, "gain") if "gain" in operation else x
            return x + self._array(operation, "bias") if "bias" in operation else x
        if kind == "linear":
            x = x.to(self._dtype) @ self._array(operation, "weight").T
            return x + self._array(operation, "bias").to(self._dtype) if "bias" in operation else x
        if kind == "first":
            return x[..., : int(operation["rows"])]
        if kind == "scale":
            return x * float(operation["factor"])
        if kind == "softcap":
            cap = float(operation["cap"])
            return torch.tanh(x / cap) * cap
        raise Unsupported(f"the dataset's head uses operation {kind!r}; upgrade actcache")

    def _array(self, operation: Operation, role: str) -> Tensor:
        return self._arrays[str(operation[role])]
