"""What users of the commands meet: interruptions, files that cannot be, datasets of quantised states alone."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

import actcache as ac
from actcache.clients import tensor_file
from tests.test_lens_cli import call

TRAIN = ("--tokens", 2000, "--max-tokens", 1200)


@pytest.fixture(scope="module")
def int8(spec: ac.Spec, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset that has quantised states alone."""
    url = str(tmp_path_factory.mktemp("int8") / "ds.zarr")
    ac.build(spec.model_copy(update={"quantize": ("int8",), "only_quantized": True, "sites": "resid"}), url)
    return url


def test_ctrl_c_keeps_the_state_of_training_until_the_lens_is_measured(
    built: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    from actcache.clients.cli import lens_fit

    shown = lens_fit._line
    kept = tmp_path / ".a.lens.training"

    def interrupted(state: Any) -> None:
        shown(state)
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(lens_fit, "_line", interrupted)
    stopped = call("lens", "fit", built, "a.lens", *TRAIN)
    assert (stopped.exit_code, kept.exists(), (tmp_path / "a.lens").exists()) == (130, True, False), stopped.output
    assert tensor_file.read(kept, "lens training")[1]["step"] == 2
    monkeypatch.setattr(lens_fit, "_line", shown)
    steps: list[int] = []

    def fails(*_: object) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as broken:
        broken.setattr("actcache.clients.lens.fitting.evaluate", fails)
        assert call("lens", "fit", built, "a.lens", *TRAIN).exit_code == 1
    assert kept.exists()
    monkeypatch.setattr(lens_fit, "_line", lambda state: steps.append(state.step))
    assert call("lens", "fit", built, "a.lens", *TRAIN).exit_code == 0
    assert not steps
    assert not kept.exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.setattr(lens_fit, "_line", shown)
    assert call("lens", "fit", built, "b.lens", *TRAIN).exit_code == 0
    assert (tmp_path / "a.lens").read_bytes() == (tmp_path / "b.lens").read_bytes()


@pytest.mark.parametrize("arguments", [{"device": "nowhere"}, {"precision": "float8"}, {"tokens": 0}])
def test_what_cannot_be_trained_is_refused_before_anything_is_read(
    built: str, reads: list[tuple[str, int]], arguments: dict[str, Any]
):
    ds = ac.open(built)
    reads.clear()
    with pytest.raises(ac.InvalidInput):
        ac.lens.fit(ds, **arguments)
    assert not reads


def test_without_torch_it_is_said_before_anything_is_read(
    built: str, reads: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
):
    ds = ac.open(built)
    monkeypatch.delitem(sys.modules, "actcache.clients.lens.training", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    reads.clear()
    with pytest.raises(ac.Unsupported, match="with torch"):
        ac.lens.fit(ds)
    assert not reads


@pytest.mark.parametrize(
    "line",
    [
        ("lens", "fit", "URL", ".", "--overwrite"),
        ("lens", "fit", "URL", "", "--overwrite"),
        ("lens", "logit", "URL", "--csv", "."),
        ("lens", "logit", "URL", "--plot", "folder.png"),
        ("probe", "fit", "URL", "--labels", "field:position", "--save", "nowhere/a.probe"),
        ("probe", "fit", "URL", "--labels", "field:position", "--save", "."),
    ],
)
def test_files_that_cannot_be_are_refused_before_anything_is_read(
    built: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[tuple[str, int]], line: tuple[str, ...]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    done = call(*(built if part == "URL" else part for part in line))
    assert (done.exit_code, done.stderr.count("\n"), reads) == (2, 1, []), done.output
    assert "a folder; give a file" in done.stderr or "make it first" in done.stderr


def test_a_warning_is_one_line(built: str, tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        done = call("lens", "fit", built, tmp_path / "a.lens", "--kind", "ridge", "--max-tokens", 60, "--json")
    assert done.exit_code == 0, done.output
    assert done.stderr.startswith("actcache: warning: ")
    assert "too few documents" in done.stderr
    assert done.stderr.count("\n") == 1
    assert json.loads(done.stdout)["lens"] == "ridge"


def test_a_dataset_of_quantised_states_alone(int8: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    read = ("--quantized", "int8")
    said = call("geometry", "norms", int8)
    assert said.exit_code == 1
    assert "quantised form alone; read one of int8" in said.stderr
    assert call("lens", "logit", int8, *read, "--plot", "a.png").exit_code == 0
    fitted = call("lens", "fit", int8, "a.lens", "--kind", "ridge", *read, "--max-tokens", 1200)
    assert fitted.exit_code == 0, fitted.output
    assert call("lens", "eval", int8, "--lens", "a.lens", *read, "--max-tokens", 300).exit_code == 0
