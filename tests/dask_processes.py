"""A Dask scheduler and workers as processes of their own, on loopback, that a test can kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 60.0


class Processes:
    """A scheduler whose address is in `file`, and its workers. `folder` holds their logs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "scheduler.json"
        self.scheduler = self._start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--no-show")
        self.workers: list[subprocess.Popen] = []
        wait_for(self.file.is_file)

    def add_worker(self, *options: str) -> subprocess.Popen:
        """One more worker, which dies for good when it is killed."""
        self.workers.append(self._start("worker", "--host", "127.0.0.1", "--no-nanny", "--no-dashboard", *options))
        return self.workers[-1]

    def close(self) -> None:
        """Kill what is left."""
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.wait()

    def _start(self, kind: str, *options: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "dask", kind, "--scheduler-file", str(self.file), *options]
        with (self.folder / f"{kind}-{time.monotonic_ns()}.log").open("wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "PYTHONWARNINGS": "ignore"})


@contextmanager
def dask_processes(folder: Path, workers: int) -> Iterator[Processes]:
    """A cluster of its own for a test."""
    running = Processes(folder)
    try:
        for _ in range(workers):
            running.add_worker("--nthreads", "2")
        yield running
    finally:
        running.close()


def wait_for(condition, seconds: float = START_SECONDS) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def children(pid: int) -> set[int]:
    """The processes below one that live."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            child = int(status.parent.name)
            found |= {child} | children(child)
    return found


def kill(pid: int) -> None:
    """End a process as a machine that loses its power would."""
    os.kill(pid, signal.SIGKILL)
