"""Damage of any kind, to any object, is found and named; in a shard a plain read finds it too."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import actcache as ac


@pytest.fixture
def copy(built: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "copy"))


def keys(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x20
    path.write_bytes(data)


def test_a_whole_dataset_is_ok(copy: Path):
    for full in (False, True):
        report = ac.verify(copy, full=full)
        assert (report.ok, report.unexpected, report.objects) == (True, [], len(keys(copy)))
        assert report.bytes == sum(path.stat().st_size for path in copy.rglob("*") if path.is_file())


def test_one_flipped_byte_in_any_object_is_found_and_named(copy: Path):
    whole = {key: (copy / key).read_bytes() for key in keys(copy)}
    for number, (key, data) in enumerate(whole.items()):
        flip(copy / key, (number * 7919) % len(data))
        report = ac.verify(copy, full=True)
        assert [problem.key for problem in report.problems] == [key]
        (copy / key).write_bytes(data)
    assert ac.verify(copy, full=True).ok


def test_a_flipped_byte_in_a_shard_is_found_on_plain_read(copy: Path):
    ds = ac.open(copy)
    site = ds.sites[2]
    path = copy / site / "c/1/0"
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 50)):
        flip(path, place)
        with pytest.raises(ac.Corrupt, match=rf"{site}/c/1/0"):
            ac.open(copy)[site].compute()
        path.write_bytes(whole)


def test_a_missing_object_is_found_without_full(copy: Path):
    for key in keys(copy):
        if key == "zarr.json":
            continue
        (copy / key).rename(copy / "away")
        report = ac.verify(copy)
        assert [problem.key for problem in report.problems] == [key]
        assert report.unexpected == ([] if "manifest" in key else ["away"])
        (copy / "away").rename(copy / key)
    (copy / "zarr.json").unlink()
    with pytest.raises(ac.NotSealed):
        ac.verify(copy)


def test_a_missing_shard_raises_and_is_never_zeros(copy: Path):
    ds = ac.open(copy)
    (copy / ds.sites[0] / "c/1/0").unlink()
    assert ds[ds.sites[0]][:10].compute().shape == (10, 32)
    with pytest.raises(ac.Corrupt, match="missing"):
        ds[ds.sites[0]].compute()
    with pytest.raises(ac.Corrupt, match="missing"):
        ds[ds.sites[0]][161:162].compute()


def test_a_truncated_object_is_found_without_full(copy: Path):
    for key in (
        "token_id/c/0",
        "blocks.1.hook_mlp_out/c/2/0",
        ".actcache/receipts/000001.json",
        "head/unembedding/zarr.json",
    ):
        whole = (copy / key).read_bytes()
        (copy / key).write_bytes(whole[:-1])
        assert [problem.key for problem in ac.verify(copy).problems] == [key]
        (copy / key).write_bytes(whole)


def test_swapped_shards_of_equal_size_are_found(copy: Path):
    first, second = copy / "sequence/c/0", copy / "document/c/0"
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    assert {p.key for p in ac.verify(copy, full=True).problems} == {"sequence/c/0", "document/c/0"}


def test_another_datasets_root_is_noticed(copy: Path, built_by_dtype: dict[str, str]):
    shutil.copy(Path(built_by_dtype["float16"]) / "zarr.json", copy / "zarr.json")
    report = ac.verify(copy)
    assert not report.ok
    assert report.problems[0].key.startswith(".actcache/manifest-")


def test_what_is_no_dataset(tmp_path: Path):
    with pytest.raises(ac.NotFound, match="no dataset"):
        ac.verify(tmp_path)
    (tmp_path / "zarr.json").write_text('{"zarr_format":3,"node_type":"group","attributes":{}}')
    with pytest.raises(ac.Unsupported, match="no actcache dataset"):
        ac.open(tmp_path)
