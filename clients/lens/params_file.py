"""`params.pt` of the package tuned-lens: a state dict as torch saves it. Needs torch.

A file can come from anywhere. Before torch sees it, its size is bounded, and its pickle is scanned, not run: it may name nothing but
what a state dict of float tensors is made of. torch then loads it with `weights_only=True`.
"""

from __future__ import annotations

import pickletools
from collections import OrderedDict
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import numpy as np
import torch

from actcache.schemas.errors import ActcacheError, InvalidInput

NAMED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch FloatStorage",
    "torch HalfStorage",
    "torch BFloat16Storage",
}
"""All that the pickle of a lens names."""
NEVER = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
"""Other ways of naming and calling, which torch's pickles have no use for."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SLACK = 1 << 20
"""Bytes that are not values: the pickle, names, alignment."""


def write(path: Path, weight: np.ndarray, bias: np.ndarray, translators: list[int]) -> None:
    """Write `0.weight`, `0.bias`, `1.weight`, … of translators by number, float32. One that is named again is stored once.

    Raises:
        OSError: it cannot be written.
    """
    tensors = {
        number: (torch.tensor(weight[number], dtype=torch.float32), torch.tensor(bias[number], dtype=torch.float32))
        for number in set(translators)
    }
    state: OrderedDict[str, torch.Tensor] = OrderedDict()
    for layer, number in enumerate(translators):
        state[f"{layer}.weight"], state[f"{layer}.bias"] = tensors[number]
    try:
        torch.save(state, path)
    except RuntimeError as error:  # torch's own, of a full disk
        raise OSError(str(error).splitlines()[0]) from None


def read(path: Path, layers: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights (layers, d, d) and biases (layers, d), float32.

    Raises:
        InvalidInput: it is no such file, it is larger than so many values need, or it has other names, shapes or dtypes, or values
            that are not finite.
        OSError: it cannot be read.
    """
    most = 2 * 4 * layers * (width * width + width) + SLACK
    if (size := path.stat().st_size) > most:
        raise InvalidInput(f"{path}: {size:,} bytes, and {layers} translators of {width} dimensions take less")
    try:
        _scan(path, most)
        state = torch.load(path, map_location="cpu", weights_only=True)
        return _arrays(path, state, layers, width)
    except (ActcacheError, OSError):
        raise
    except Exception as error:  # zipfile, pickletools and torch raise anything on strange bytes
        said = " ".join(str(error).split())[:100]
        raise InvalidInput(f"{path}: no parameters as torch saves them: {type(error).__name__}: {said}") from None


def _scan(path: Path, most: int) -> None:
    """Refuse an archive that unpacks to more than it is, and a pickle that names anything else than tensors."""
    try:
        archive = ZipFile(path)
    except BadZipFile:
        raise InvalidInput(f"{path}: no parameters as torch saves them: not a zip file") from None
    with archive:
        members = archive.infolist()
        packed = any(m.compress_type != ZIP_STORED or m.compress_size != m.file_size for m in members)
        if packed or sum(member.file_size for member in members) > most:
            raise InvalidInput(f"{path}: unpacks to more than it is; torch saves parameters without compression")
        pickles = [member for member in members if member.filename.endswith(".pkl")]
        if len(pickles) != 1 or len({member.filename for member in members}) < len(members):
            raise InvalidInput(f"{path}: no parameters as torch saves them: {len(pickles)} pickles, or a name twice")
        if pickles[0].file_size > SLACK:
            raise InvalidInput(f"{path}: a pickle of {pickles[0].file_size:,} bytes, which no lens needs")
        for operation, value, _ in pickletools.genops(archive.read(pickles[0])):
            if operation.name in NEVER or (operation.name == "GLOBAL" and value not in NAMED):
                named = "" if value is None else f" {str(value)[:60]!r}"
                raise InvalidInput(
                    f"{path}: its pickle has {operation.name}{named}, which no lens needs; nothing of it was run"
                )


def _arrays(path: Path, state: Any, layers: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    shapes = {"weight": (width, width), "bias": (width,)}
    wanted = {f"{layer}.{role}" for layer in range(layers) for role in shapes}
    if not isinstance(state, dict) or set(state) != wanted:
        raise InvalidInput(f"{path}: other names than 0.weight, 0.bias, … {layers - 1}.bias, of {layers} translators")
    out = {role: np.empty((layers, *shape), np.float32) for role, shape in shapes.items()}
    for layer in range(layers):
        for role, shape in shapes.items():
            name = f"{layer}.{role}"
            tensor = state[name]
            if not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPES or tuple(tensor.shape) != shape:
                found = (
                    f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                    if isinstance(tensor, torch.Tensor)
                    else "no tensor"
                )
                raise InvalidInput(f"{path}: {name} is {found}, not floats of shape {shape}")
            out[role][layer] = tensor.float().numpy()
            if not np.isfinite(out[role][layer]).all():
                raise InvalidInput(f"{path}: {name} has values that are not finite")
    return out["weight"], out["bias"]
