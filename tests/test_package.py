"""What importing costs, what it leaves behind, and what the package promises."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import actcache as ac
from actcache.schemas.publish import schemas

ROOT = Path(__file__).parent.parent
HEAVY = ["torch", "transformers", "datasets", "matplotlib", "dask", "distributed", "s3fs", "xarray", "pandas"]


def modules_after(code: str) -> set[str]:
    script = f"{code}\nimport sys, json; print('\\n' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd="/")
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import actcache",
        "from actcache.clients.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "import actcache as ac; ac.open; ac.catalog; ac.build; ac.Dataset; ac.lens; ac.figures; ac.geometry; ac.probe",
    ],
)
def test_nothing_heavy_is_imported(code: str):
    assert not modules_after(code) & set(HEAVY)


def test_that_check_can_fail():
    assert "xarray" in modules_after("import xarray")


def test_no_folder_of_ours_is_a_module_of_its_own():
    names = modules_after("import actcache, actcache.clients.cli, actcache.jobs.build")
    assert not names & {"cache", "schemas", "jobs", "clients"}
    assert {"actcache.cache", "actcache.schemas", "actcache.jobs", "actcache.clients"} <= names


@pytest.mark.parametrize("name", ["cache", "schemas", "jobs", "clients"])
def test_links_resolve(name: str):
    link = ROOT / "actcache" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert (link / "__init__.py").is_file()


def test_help_takes_less_than_a_second_of_processor_time():
    def spent() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "actcache", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    assert min(spent() for _ in range(5)) < 1.0


def test_public_names_are_all_there_and_documented():
    assert sorted(ac.__all__) == ac.__all__
    for name in ac.__all__:
        assert getattr(ac, name).__doc__, name
    assert set(ac.__all__) <= set(dir(ac))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = ac.nonsense


def test_the_error_tree():
    assert issubclass(ac.NotFound, KeyError)
    assert issubclass(ac.InvalidInput, ValueError)
    assert issubclass(ac.OutOfRange, ac.InvalidInput)
    assert issubclass(ac.StoreError, OSError)
    for name in (
        "NotFound",
        "NotSealed",
        "SpecMismatch",
        "InvalidInput",
        "Corrupt",
        "StoreError",
        "Unsupported",
        "ProofFailed",
    ):
        assert issubclass(getattr(ac, name), ac.ActcacheError)
    assert str(ac.NotFound("no site 'x'")) == "no site 'x'"


def test_published_schemas_are_those_of_the_models():
    folder = ROOT / "schemas" / "json"
    assert {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()} == schemas()


def test_the_installed_package_has_its_version_and_types():
    assert ac.__version__
    assert (ROOT / "actcache" / "py.typed").is_file()
