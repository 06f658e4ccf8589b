"""Builds in a process of its own and prints its forecast and its peak memory as JSON: `python -m tests.memory_probe SPEC URL`."""

from __future__ import annotations

import json
import sys

import actcache as ac
from actcache.jobs.progress import Silent
from actcache.jobs.resident import peak_bytes


class Hearing(Silent):
    """Keeps the forecast."""

    peak = 0

    def forecast(self, forecast: ac.Forecast) -> None:
        self.peak = forecast.memory.peak


if __name__ == "__main__":
    hearing = Hearing()
    ac.build(ac.Spec(**json.loads(sys.argv[1])), sys.argv[2], reporter=hearing)
    print(
        json.dumps({"planned": hearing.peak, "taken": peak_bytes()})
    )  # getrusage would count the process that began this one
