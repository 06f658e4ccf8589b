"""Settings of torch that decide whether a forward pass gives the same bits twice."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any

import torch


class _Settings:
    """What is set while anybody wants it, and what was before; the settings are the process's."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._users = 0
        self._closing = ExitStack()

    def begin(self) -> None:
        with self._lock:
            if self._users == 0:
                self._closing.enter_context(_set())
            self._users += 1

    def end(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._closing.close()


_settings = _Settings()


@contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic kernels where there are any, full float32 products, no tuning by trial; restored when the last user ends.

    A kernel that has no deterministic form still runs: what differs is found by replay, and stored as `mixed_attempts`.
    """
    _settings.begin()
    try:
        yield
    finally:
        _settings.end()


@contextmanager
def _set() -> Iterator[None]:
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.benchmark,
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, and reads it at its first use
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        try:
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.set_float32_matmul_precision("highest")
            torch.backends.cudnn.benchmark = False
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.set_float32_matmul_precision(before[2])
            torch.backends.cudnn.benchmark = before[3]
            torch.utils.deterministic.fill_uninitialized_memory = before[4]  # type: ignore[attr-defined]


def flags() -> dict[str, Any]:
    """The settings as they stand, for the provenance."""
    return {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cublas_workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }
