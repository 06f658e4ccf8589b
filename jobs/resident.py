"""How much memory there is, and how much a piece of work takes at its peak."""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"))


def resident_bytes() -> int:
    """Bytes of this process that are in memory now."""
    return _status("VmRSS") or peak_bytes()


def peak_bytes() -> int:
    """Most bytes of this process that were in memory, since its start or since `Peak` last began."""
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be taken on a device, on the processor within the limits of its control group."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available = _meminfo("MemAvailable") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        most, taken = (int(path.read_text()) for path in _LIMITS)
    except (OSError, ValueError):  # no control group, or one without a limit
        return available
    return min(available, most - taken)


class Peak:
    """The memory that is taken from here on, beyond what was taken before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            _forget_peak()
            self._before = resident_bytes()

    def wait(self) -> None:
        """Wait until the device has done what it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def taken(self) -> int:
        """Bytes taken at the peak. Where the system does not tell, on the processor at least what is taken now."""
        self.wait()
        peak = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else peak_bytes()
        return max(0, peak - self._before)


def _forget_peak() -> None:
    """Have the system measure the peak from now on (Linux alone)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    return _kilobytes(_STATUS, name)


def _meminfo(name: str) -> int:
    return _kilobytes(Path("/proc/meminfo"), name)


def _kilobytes(file: Path, name: str) -> int:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
