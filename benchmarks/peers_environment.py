"""Environments of other libraries, each below .peers/ with the versions of its file in `peers_env/`, and sides that run in them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
ENVIRONMENTS, REQUIREMENTS = ROOT / ".peers", Path(__file__).parent / "peers_env"


class Unavailable(Exception):
    """A peer that cannot be installed, or that fails, and why."""


def environment(peer: str) -> Path:
    """The Python of a peer's environment, made if it is not there or if other versions are asked for.

    Raises:
        Unavailable: pip cannot install it.
    """
    folder, requirements = ENVIRONMENTS / peer, REQUIREMENTS / f"{peer}.txt"
    python, installed = folder / "bin" / "python", folder / ".installed"
    wanted = requirements.read_text(encoding="utf-8")
    if installed.is_file() and installed.read_text(encoding="utf-8") == wanted:
        return python
    print(f"  {peer}: installing {', '.join(wanted.split())} into {folder}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    variables = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}  # pip's own cache
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", "--requirement", str(requirements)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, env=variables)
        if done.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            raise Unavailable(f"cannot be installed: {_last_line(done)}")
    installed.write_text(wanted, encoding="utf-8")
    return python


def run_side(python: Path, module: str, *arguments: str, home: str) -> Mapping[str, Any]:
    """What a module prints last, a line of JSON, run by that Python without a network. Libraries keep their files in `home`.

    Raises:
        Unavailable: it fails.
    """
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": home, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [str(python), "-m", module, *arguments], capture_output=True, text=True, cwd=ROOT, env=variables
    )
    if done.returncode:
        raise Unavailable(f"it fails: {_last_line(done)}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or [f"exit status {done.returncode}"])[-1].strip()
