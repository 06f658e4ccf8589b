"""What docs and example say of iterative inference runs."""

from __future__ import annotations

import re
from importlib import util
from pathlib import Path

import pytest

import actcache as ac

ROOT = Path(__file__).parent.parent


def test_the_python_about_iterative_inference_runs(built: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "demo.zarr").symlink_to(built)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/iterative-inference.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(block, names := {})  # type: ignore[var-annotated]
    lens, ds = names["lens"], names["ds"]
    found = [ac.lens.trajectories(lens, ds), ac.lens.alignment(lens, ds)]
    found += [ac.lens.error_prediction(lens, ds), ac.lens.future(ds)]
    named = set(re.findall(r"`([a-z_]+)`", text))
    for results in found:
        assert set(results) <= named, "every measure is described"


def test_the_example_prints_a_line_a_block(built: str, capsys: pytest.CaptureFixture[str]):
    spec = util.spec_from_file_location("example", ROOT / "examples/update_against_gradient.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(built, "ridge", 500)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("logit lens: ")
    assert [line.split()[0] for line in lines[2:5]] == ["0", "1", "2"]
    assert lines[5].startswith("ridge lens: ")
