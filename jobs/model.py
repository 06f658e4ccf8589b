"""Loading a model for capture, and looking at it once."""

from __future__ import annotations

import warnings
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import transformers
from torch import nn

from actcache.jobs.discover import discover, plain_ids
from actcache.jobs.families import overrides
from actcache.jobs.parts import ModelParts
from actcache.jobs.proof import prove
from actcache.schemas.anatomy import Anatomy
from actcache.schemas.errors import ActcacheError, InvalidInput, Unsupported

_one_at_a_time = Lock()
"""transformers changes parts of itself while it loads a model; two threads that do leave it changed, and no weights tied."""


def load_model(folder: Path, family: str, compute_dtype: str, attention: str | None) -> tuple[nn.Module, str]:
    """A model in evaluation mode, in the compute dtype, on the best device there is, and its attention implementation.

    `attention` None takes `sdpa` where the family has it, else `eager`.

    Raises:
        InvalidInput: transformers cannot load it, or weights are missing in the files.
        Unsupported: transformers has no causal language model of this type, or not with that attention.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kind = _class_of(folder, family)
    attention = attention or ("sdpa" if kind._supports_sdpa else "eager")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        for name, value in overrides(family).items():
            setattr(config, name, value)
        with _one_at_a_time:
            model, loading = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=getattr(torch, compute_dtype),
                attn_implementation={"": attention, "text_config": attention},  # no other part of a model is run
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # transformers, safetensors and torch raise what they like
        raise InvalidInput(f"{folder}: the model cannot be loaded: {first_line(error)}") from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise InvalidInput(f"{folder}: {len(missing)} weights are missing in the files (first: {missing[0]})")
    model.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")
    return model, attention


def _class_of(folder: Path, family: str) -> Any:
    """The class that transformers has for a causal language model of this type."""
    mapping = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if family not in mapping:
        raise Unsupported(
            f"{folder}: transformers {transformers.__version__} has no causal language model of type {family!r}; upgrade it, "
            "or describe the model with actcache.Capturable (code that comes with a model is never run)"
        )
    return getattr(transformers, mapping[family])


def look_at(model: nn.Module, attention: str, where: str) -> Anatomy:
    """The anatomy of a loaded model.

    Raises:
        OutOfRange: it computes NaN.
        Unsupported: it cannot be taken apart, or does not run on token ids alone.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return discover(model, attention, where)
    except ActcacheError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        raise Unsupported(
            f"{where}: a {type(model).__name__} cannot be run on token ids alone: {first_line(error)}"
        ) from error


def proven(model: nn.Module, attention: str, compute_dtype: str, where: str) -> Anatomy:
    """The anatomy of a loaded model whose identities hold on tokens drawn at random.

    So a model that cannot be captured is refused before anything is stored. A build proves them again on its own tokens.

    Raises:
        OutOfRange, Unsupported: as `look_at`.
        ProofFailed: an identity does not hold.
    """
    anatomy = look_at(model, attention, where)
    ids = plain_ids(model)
    prove(ModelParts(model, anatomy), ids, torch.ones_like(ids), compute_dtype)
    return anatomy


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind where there is none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
