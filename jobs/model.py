"""Loading a model for capture, and its stored head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from actcache.jobs.parts import PARTS, ModelParts
from actcache.schemas.dtypes import numpy_dtype
from actcache.schemas.errors import InvalidInput
from actcache.schemas.spec import ResolvedSpec


def load_parts(folder: Path, spec: ResolvedSpec) -> ModelParts:
    """Load a model in evaluation mode, in the spec's compute dtype and attention, on the best device there is.

    Raises:
        InvalidInput: transformers cannot load it, or weights are missing in the files.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, spec.execution.compute_dtype),
            attn_implementation=spec.execution.attention,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers, safetensors and torch raise what they like
        raise InvalidInput(f"{folder}: the model cannot be loaded: {first_line(error)}") from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise InvalidInput(f"{folder}: {len(missing)} weights are missing in the files (first: {missing[0]})")
    model.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")
    return PARTS[spec.model.family](model)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind where there is none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@dataclass(frozen=True)
class HeadParts:
    """A head as it is stored: operations, and arrays in the compute dtype."""

    operations: tuple[dict[str, str | float], ...]
    arrays: dict[str, np.ndarray]


def head_parts(parts: ModelParts) -> HeadParts:
    """Final norm and unembedding of a model, as the operations of `actcache.cache.head`."""
    norm = parts.final_norm
    gain = norm.weight if norm.weight is not None else torch.ones(norm.normalized_shape)
    bias = norm.bias if norm.bias is not None else torch.zeros_like(gain)
    return HeadParts(
        (
            {"op": "layer_norm", "eps": float(norm.eps), "gain": "norm_gain", "bias": "norm_bias"},
            {"op": "linear", "weight": "unembedding"},
        ),
        {
            "norm_gain": to_numpy(gain),
            "norm_bias": to_numpy(bias),
            "unembedding": to_numpy(parts.unembedding.weight),
        },
    )


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as numpy with the same bits; bfloat16 as `ml_dtypes.bfloat16`."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))
    return tensor.numpy()
