"""`python -m benchmarks [NAME…] [--seconds N] [--megabytes N] [--steps N] [--json FILE]`: run benchmarks and print their ratios."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import signal
import sys
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path

from benchmarks.material import STEPS, THREADS, Material
from benchmarks.ratio import Result

NAMES = (
    "build",
    "engine",
    "tokenise",
    "writer",
    "quantise",
    "s3_upload",
    "read",
    "read_s3",
    "read_random",
    "read_amplification",
    "read_lazy",
    "read_loader",
    "mixing",
    "chunks",
    "lens_gram",
    "start",
    "lens",
    "peers",
)
ON_REQUEST = ("lens", "peers")
BY_DEFAULT = tuple(name for name in NAMES if name not in ON_REQUEST)
NAMES_HELP = (
    f"any of {', '.join(NAMES)} (default: all but {' and '.join(ON_REQUEST)}, which run only when named: they install other "
    "libraries, each with a torch of its own, into .peers/; lens takes 0.5 GB and hours, peers 5 GB and ten minutes)"
)
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


def main() -> None:
    """Run what the command line names, or everything that installs nothing."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Ratios of two things measured side by side in one run."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=NAMES_HELP)
    parser.add_argument("--seconds", type=float, default=4.0, metavar="N", help="least time a comparison [%(default)s]")
    parser.add_argument("--megabytes", type=int, default=100, metavar="N", help="corpus of tokenise [%(default)s]")
    parser.add_argument(
        "--steps",
        type=int,
        default=STEPS,
        metavar="N",
        help="steps that the peer of lens trains; the rest follows [%(default)s]",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to a file as well")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(NAMES))
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there is {', '.join(NAMES)}")
    os.environ.update(QUIET)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the S3 server and the temporary files go, too
    began, results = time.perf_counter(), []
    print(f"{processor()}, {THREADS} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}")
    print("Each ratio is the median of its rounds, which alternate; in brackets their quartiles.")
    with tempfile.TemporaryDirectory(prefix="actcache-benchmarks-") as folder:
        os.environ["XDG_CACHE_HOME"] = str(
            Path(folder) / "cache"
        )  # no hash of a file of a benchmark is to be remembered
        material = Material(Path(folder), options.seconds, options.megabytes, options.steps)
        results = _run(options.names or list(BY_DEFAULT), material)
    print(f"\n{time.perf_counter() - began:.0f} s; {_verdict(results)}")
    if options.json:
        options.json.write_text(json.dumps([asdict(result) | {"met": result.met} for result in results], indent=1))


def _run(names: list[str], material: Material) -> list[Result]:
    results = []
    for name in names:
        module = importlib.import_module(f"benchmarks.{name}")
        print(f"\n{module.TITLE}", flush=True)
        before = load()
        for result in module.run(material):
            print(result.line(), flush=True)
            results.append(result)
        if before is not None and (after := load()) is not None:
            total, ours = after[0] - before[0], after[1] - before[1]
            print(f"  meanwhile other processes, an S3 server included, had {1 - ours / total:.0%} of the busy time")
    return results


def _verdict(results: list[Result]) -> str:
    with_goal = [result for result in results if result.goal is not None]
    return f"{sum(bool(result.met) for result in with_goal)} of {len(with_goal)} goals met"


def load() -> tuple[float, float] | None:
    """Seconds that all processors were busy since the machine's start, and this process with its children; None off Linux."""
    try:
        with open("/proc/stat", encoding="utf-8") as file:
            ticks = [int(word) for word in file.readline().split()[1:9]]
    except (OSError, ValueError):
        return None
    user, system, children_user, children_system, _ = os.times()
    busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
    return busy, user + system + children_user + children_system


def processor() -> str:
    """The name of the processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
