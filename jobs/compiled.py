"""Running a model's blocks compiled by `torch.compile`. What is between the blocks, and every hook there, is as before."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from actcache.jobs.capture import read_sites
from actcache.jobs.inputs import Inputs
from actcache.jobs.parts import ModelParts
from actcache.jobs.proof import largest, relative_error, tolerance
from actcache.schemas.errors import ProofFailed, Unsupported


def compile_blocks(parts: ModelParts) -> None:
    """Have every block compiled when it is first called: once for all shapes, so that no bit depends on what ran before."""
    for block in parts.blocks:
        block.forward = torch.compile(block.forward, dynamic=True)


def compile_proven(parts: ModelParts, sites: Sequence[str], inputs: Inputs, dtype: str) -> float:
    """Compile the blocks; the largest relative error of any site of a batch against the blocks as they were.

    Raises:
        ProofFailed: it is beyond what rounding explains.
        Unsupported: torch cannot compile here.
    """
    before = read_sites(parts, inputs, sites)
    compile_blocks(parts)
    try:
        after = read_sites(parts, inputs, sites)
    except Exception as error:  # torch's compilers raise what they like, where there is no C++ compiler too
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise Unsupported(f"--compile: torch cannot compile this model here: {first}; leave it out") from error
    found, most = (
        largest(*(relative_error(after[site], before[site]) for site in sites)),
        tolerance(dtype, len(parts.blocks)),
    )
    if not found <= most:
        raise ProofFailed(
            f"--compile: the compiled blocks differ from the model by {found:.3g} (tolerance {most:.3g}); build without it"
        )
    return found
