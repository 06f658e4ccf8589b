"""How much memory there is, and how much a piece of work takes at its peak."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_GROUPS = Path("/sys/fs/cgroup")


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
    return min([available, *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    """What the control groups of this process, and those around them, leave (Linux, both versions of them)."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        base = _GROUPS / "memory" if kinds else _GROUPS
        most, taken = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else ("memory.max", "memory.current")
        folder = base / path.strip("/")
        while folder == base or base in folder.parents:
            with suppress(OSError, ValueError):  # there is no such group, or it has no limit
                cache = _kilobytes(folder / "memory.stat", "inactive_file", unit=1)
                yield max(0, int((folder / most).read_text()) - int((folder / taken).read_text()) + cache)
            folder = folder.parent


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


def _kilobytes(file: Path, name: str, unit: int = 1024) -> int:
    """A number that a file of the system gives, in bytes: the first of its lines that begins with a name."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    words = (line.replace(":", " ").split() for line in lines)
    return next((int(word[1]) * unit for word in words if word[:1] == [name]), 0)
