"""What hardware and software a worker ran on, as far as it can change bits. No time, no host name."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

from actcache.jobs.determinism import flags
from actcache.jobs.families import overrides
from actcache.jobs.parts import ModelParts
from actcache.schemas.spec import ResolvedSpec

_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "numcodecs", "zarr", "actcache")


def environment(parts: ModelParts, spec: ResolvedSpec, proof: dict[str, float]) -> dict[str, Any]:
    """The record of this worker, with the errors of its proof."""
    cuda = parts.device.type == "cuda"
    return {
        "device": device_name(parts),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "libraries": {name: metadata.version(name) for name in _LIBRARIES},
        "kernels": {
            "attention": spec.execution.attention,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cuda": torch.version.cuda if cuda else None,
            **flags(),
        },
        "config_overrides": overrides(spec.model.family),
        "sites": {site: parts.anatomy.meaning(site) for site in spec.sites},
        "proof": proof,
    }


def device_name(parts: ModelParts) -> str:
    """What a model runs on: the name of the GPU or of the processor."""
    return torch.cuda.get_device_name(parts.device) if parts.device.type == "cuda" else _processor()


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
