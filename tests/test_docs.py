"""What README and docs say is so."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path

import pytest

import actcache as ac

ROOT = Path(__file__).parent.parent
FILES = ("abc", "bisect", "codeop", "colorsys", "copyreg", "fnmatch", "genericpath", "opcode", "stat", "struct")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "README.md").symlink_to(ROOT / "README.md")
    monkeypatch.chdir(tmp_path)
    sources = tuple(str(Path(sysconfig.get_path("stdlib")) / f"{name}.py") for name in (*FILES, "argparse"))
    ac.build(ac.Spec(model="examples/tiny-gpt", corpus=sources), "demo.zarr")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert ac.open("readme.zarr").n_tokens > 500


def test_the_python_about_modules_of_ones_own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from tests.test_capturable import example

    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("def f(x):\n    return x\n" * 20)
    monkeypatch.chdir(tmp_path)
    model = example("value_myopic_gpt").ValueMyopicGPT(vocabulary=4096, block_size=32, width=16, layers=2)
    names = {"model": model, "cnn": example("cnn").CNN(), "images": example("cnn").gratings(5)[0]}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/own-modules.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    assert ac.open("my-gpt.zarr")["loss"].shape == (ac.open("my-gpt.zarr").n_tokens,)
    assert ac.open("my-cnn.zarr").sites == ["conv1", "conv3"]


def test_the_python_about_reading_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    sources = tuple(
        str(Path(sysconfig.get_path("stdlib")) / f"{name}.py") for name in ("abc", "argparse", "ast", "base64")
    )
    ac.build(ac.Spec(model="examples/tiny-gpt", corpus=sources), "demo.zarr")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/reading.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert names["state"]["batches"] == 1  # type: ignore[index]


def test_the_python_about_lenses_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    sources = tuple(str(Path(sysconfig.get_path("stdlib")) / f"{name}.py") for name in FILES)
    ac.build(ac.Spec(model="examples/tiny-gpt", corpus=sources), "demo.zarr")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/lenses.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert {path.name for path in tmp_path.iterdir()} >= {
        "logit.csv",
        "tuned.lens",
        "table.svg",
        "table.csv",
        "transfer.svg",
        "loss.svg",
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (page.parent / link).exists(), link


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"(?:`|^ {4})make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE))
        assert named <= targets, page
