"""How long it takes until a process has something to say ÷ how long `import zarr` takes, and whether torch stays out."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

from benchmarks.material import Material
from benchmarks.ratio import Result, alternate, compare, timed

TITLE = "start: whole processes ÷ `python -c 'import zarr'`, time"
PEER = "import zarr"
HEAVY = {"torch", "transformers", "matplotlib"}


def run(material: Material) -> Iterator[Result]:
    """Compare the import, the help page and a build that has nothing to do."""
    spec = material.sealed_spec
    again = ["build", str(material.sealed), "--corpus", *spec["corpus"]]  # type: ignore[misc]
    for option in ("model", "context", "sites", "max_tokens", "block_tokens"):
        again += [f"--{option.replace('_', '-')}", str(spec[option])]
    commands = {
        PEER: ["-c", "import zarr"],
        "import actcache": ["-c", "import actcache"],
        "actcache --help": ["-m", "actcache", "--help"],
        "actcache build, already sealed": ["-m", "actcache", *again],
    }
    times = alternate({name: timed(_process(command)) for name, command in commands.items()}, material.seconds)
    for name in commands:
        if name != PEER:
            yield compare("start", f"{name} ÷ {PEER}", times, name, PEER, better="lower")
            heavy = sorted(_imported(commands[name]) & HEAVY)
            print(f"    imports {', '.join(heavy)}" if heavy else f"    imports none of {', '.join(sorted(HEAVY))}")


def _process(command: list[str]) -> Callable[[], object]:
    return lambda: _run(command)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True)


def _imported(command: list[str]) -> set[str]:
    """The modules that a command imports."""
    lines = _run(["-X", "importtime", *command]).stderr.splitlines()
    return {line.rsplit("|", 1)[-1].strip() for line in lines if line.startswith("import time:")}
