"""A model's head as it is stored: a list of operations and the arrays that they name."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from actcache.cache.head import Head
from actcache.jobs.norms import gain_and_bias
from actcache.jobs.parts import ModelParts
from actcache.schemas.anatomy import HeadStep
from actcache.schemas.dtypes import numpy_dtype

Operation = dict[str, str | float]


@dataclass(frozen=True)
class HeadParts:
    """A head as it is stored: operations, and arrays, weights in the compute dtype, norms in float32."""

    operations: tuple[Operation, ...]
    arrays: dict[str, np.ndarray]


def head_parts(parts: ModelParts) -> HeadParts:
    """The steps from the last block's output to the logits, as the operations of `actcache.cache.head`."""
    operations: list[Operation] = []
    arrays: dict[str, np.ndarray] = {}
    for index, step in enumerate(parts.anatomy.head):
        name = "unembedding" if index == parts.anatomy.unembedding else step.op if index == 0 else f"{step.op}_{index}"
        operation, weights = _step(parts, step, name)
        operations.append(operation)
        arrays |= weights
    return HeadParts(tuple(operations), arrays)


def numpy_head(parts: ModelParts) -> Head:
    """A model's head as a reader of the dataset evaluates it: in numpy, float32."""
    head = head_parts(parts)
    return Head(head.operations, {name: array.astype(np.float32) for name, array in head.arrays.items()})


def _step(parts: ModelParts, step: HeadStep, name: str) -> tuple[Operation, dict[str, np.ndarray]]:
    if step.op == "first":
        assert step.rows is not None
        return {"op": "first", "rows": float(step.rows)}, {}
    if step.op in ("scale", "softcap"):
        assert step.factor is not None
        return {"op": step.op, "factor" if step.op == "scale" else "cap": step.factor}, {}
    assert step.module is not None
    module = parts.model.get_submodule(step.module)
    if step.norm is not None:
        gain, bias = gain_and_bias(step.norm, module)
        found = {"gain": gain, "bias": bias}
        operation: Operation = {"op": step.norm.kind, "eps": step.norm.eps}
    else:
        found = {"weight": module.get_parameter("weight"), "bias": getattr(module, "bias", None)}
        operation = {"op": "linear"}
    named = {role: (name if role == "weight" else f"{name}_{role}") for role, t in found.items() if t is not None}
    return operation | named, {named[role]: to_numpy(t) for role, t in found.items() if t is not None}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as numpy with the same bits; bfloat16 as `ml_dtypes.bfloat16`."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))
    return tensor.numpy()
