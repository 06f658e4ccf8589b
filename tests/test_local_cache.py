"""The local cache: what was read once is read from disk, never more than its bound, and never anything but the remote's bytes."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import actcache as ac
from actcache.cache import cache_folder as folder_module
from actcache.cache.cache_index import ABANDONED_AFTER, INDEX, INDEX_GROWTH, STAGING, CacheIndex, path_of
from actcache.cache.local_cache import DEFAULT_BYTES, LEAST_BYTES, CachedStore, with_local_cache
from actcache.cache.location import LocalCache, Location
from actcache.cache.remote_store import RemoteStore
from actcache.cache.store import Store, open_store
from actcache.schemas.canonical import sha256
from actcache.schemas.errors import Corrupt, InvalidInput, NotFound, StoreError, Unsupported
from actcache.schemas.manifest import find_object, manifest_bytes, manifest_key
from actcache.schemas.plan import StoredObject
from tests.counting_server import CountingServer, serving

LIMIT = 3 << 20


@pytest.fixture(autouse=True)
def fresh_process() -> None:
    """What a process remembers of a folder is forgotten, as in a process of its own; loopback is asked without a proxy."""
    folder_module.cache_folder.cache_clear()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1", prepend=",")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys that are read from any remote store of this process."""
    keys: list[str] = []

    def counted(method):
        def read(store, key, *args):
            keys.append(key)
            return method(store, key, *args)

        return read

    for name in ("get", "get_range", "get_end", "size"):
        monkeypatch.setattr(RemoteStore, name, counted(getattr(RemoteStore, name)))
    return keys


class World:
    """Objects of random bytes and their manifest, without a root: the location names the manifest."""

    def __init__(self, store: Store, sizes: list[int], seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.store = store
        self.objects = {f"a/c/{number}/0": rng.bytes(size) for number, size in enumerate(sizes)}
        entries = [StoredObject(key=key, size=len(data), sha256=sha256(data)) for key, data in self.objects.items()]
        manifest = manifest_bytes(entries)
        self.manifest = manifest_key(sha256(manifest))
        for key, data in {**self.objects, self.manifest: manifest}.items():
            store.put_new(key, data)

    def location(self, folder: Path, limit: int = LIMIT, url: str | None = None) -> Location:
        base = self.store.location if url is None else Location.of(url)
        return replace(base, cache=LocalCache(str(folder), limit, (self.manifest,)))

    def cached(self, folder: Path, limit: int = LIMIT) -> CachedStore:
        """A store as a fresh process would have it."""
        folder_module.cache_folder.cache_clear()
        store = open_store(self.location(folder, limit))
        assert isinstance(store, CachedStore)
        return store


def in_memory(sizes: list[int], seed: int = 0) -> World:
    return World(open_store(f"memory://{uuid.uuid4()}"), sizes, seed)


def real_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def kept(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "objects").rglob("*") if path.is_file())


@pytest.fixture
def server(built: str, tmp_path: Path) -> Iterator[CountingServer]:
    """A web server with a dataset."""
    (tmp_path / "www").mkdir()
    (tmp_path / "www/ds").symlink_to(built)
    with serving(tmp_path / "www") as running:
        yield running


EPOCH = """
import sys
import actcache as ac
ds = ac.open(sys.argv[1], local_cache=sys.argv[2])
for name in ds:
    ds[name].compute()
ds.resid[1, 7:9].compute(), ds["loss"].compute(), ds.tokens["position"], ds.norm, ds.statistics, ds.head
"""


def epoch(url: str, folder: Path) -> None:
    subprocess.run([sys.executable, "-c", EPOCH, url, str(folder)], check=True)


def test_a_second_epoch_asks_for_the_root_alone(server: CountingServer, built: str, tmp_path: Path):
    url = f"{server.url}/ds"
    ds, plain = ac.open(url, local_cache=tmp_path / "cache"), ac.open(built)
    assert [path for path, _ in server.asked] == ["ds/zarr.json"], "opening reads the root alone"
    numbers = []
    for _ in range(2):
        for site in ds.sites:
            assert np.array_equal(ds[site].compute(), plain[site].compute())
        assert np.array_equal(ds.resid[1, 7:9].compute(), plain.resid[1, 7:9].compute())
        numbers.append(len(server.asked))
        server.asked.clear()
    assert numbers[0] > len(ds.sites)
    assert numbers[1] == 0
    epoch(url, tmp_path / "cache")
    server.asked.clear()
    epoch(url, tmp_path / "cache")
    assert server.asked == [("ds/zarr.json", None)], "another process, too"


def test_s3_is_cached_and_no_secret_lies_in_the_folder(s3: str, built: str, tmp_path: Path, asked: list[str]):
    local, remote = open_store(built), open_store(s3)
    for key in local.list():
        remote.put_new(key, bytes(local.get(key)))
    ds, plain = ac.open(s3, local_cache=tmp_path / "cache"), ac.open(built)
    for _ in range(2):
        asked.clear()
        for site in ds.sites:
            assert np.array_equal(ds[site].compute(), plain[site].compute())
    assert asked == []
    assert np.array_equal(ds.zarr[ds.sites[0]][5:9], plain[plain.sites[0]][5:9].compute())
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        secret = os.environ[name].encode()
        assert secret not in pickle.dumps((ds, ds[ds.sites[0]]))
        assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and secret in path.read_bytes()]


def total(pickled: bytes) -> float:
    return float(pickle.loads(pickled).sum().compute(scheduler="synchronous"))  # Dask's threads survive no fork


def test_a_graph_carries_its_cache_to_other_processes(server: CountingServer, tmp_path: Path):
    ds = ac.open(f"{server.url}/ds", local_cache=tmp_path / "cache")
    array = ds[ds.sites[2]]
    wanted = total(pickle.dumps(array))
    assert pickle.loads(pickle.dumps(ds)).sites == ds.sites
    server.asked.clear()
    for method in ("spawn", "fork"):
        with warnings.catch_warnings(), ProcessPoolExecutor(1, mp_context=get_context(method)) as pool:
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking where there are threads
            assert pool.submit(total, pickle.dumps(array)).result() == wanted
    assert server.asked == [], "not even the root"


def test_the_graph_has_the_same_names_with_and_without_a_cache(server: CountingServer, tmp_path: Path):
    plain, cached = (ac.open(f"{server.url}/ds", local_cache=cache) for cache in (None, tmp_path / "cache"))
    assert plain.resid.name == cached.resid.name


def test_a_local_dataset_makes_no_cache(built: str, tmp_path: Path):
    ds = ac.open(built, local_cache=tmp_path / "cache", local_cache_bytes=LIMIT)
    ds[ds.sites[0]].compute()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("folder", "limit", "says"),
    [
        (None, 10**9, "local_cache"),
        ("cache", "50GB", "whole number"),
        ("cache", 1e9, "whole number"),
        ("cache", True, "whole number"),
        ("cache", LEAST_BYTES - 1, "at least"),
        ("cache", 0, "at least"),
        ("cache", -1, "at least"),
        ("s3://bucket/cache", None, "local disk"),
        ("", None, "folder"),
        ("file", None, "is a file"),
    ],
)
def test_caches_that_cannot_be(folder, limit, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(InvalidInput, match=says) as caught:
        ac.open("https://nowhere.invalid/x", local_cache=folder, local_cache_bytes=limit)
    assert "\n" not in str(caught.value)


def test_the_default_bound_does_not_shrink_as_the_cache_fills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    free = [30 * 10**9]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free[0]))  # type: ignore[attr-defined]

    def bound() -> int:
        cache = with_local_cache(Location.of("https://x/y"), tmp_path / "not/yet", None).cache
        assert cache is not None
        return cache.limit

    assert bound() == 15 * 10**9
    CacheIndex(tmp_path / "not/yet").reserve("0" * 64, 10 * 10**9, 15 * 10**9, {})
    free[0] -= 10 * 10**9
    assert bound() == 15 * 10**9
    free[0] = 10**15
    assert bound() == DEFAULT_BYTES


READS = st.tuples(
    st.sampled_from(["get", "range", "end", "size"]),
    st.integers(0, 7),
    st.integers(0, 450_000),
    st.integers(1, 450_000),
    st.booleans(),
)


@given(st.lists(READS, max_size=25), st.integers(LEAST_BYTES, 2 << 20))
def test_any_reads_give_the_remotes_bytes_within_the_bound(tmp_path_factory, reads, limit: int):
    folder = tmp_path_factory.mktemp("cache")
    world = in_memory([0, 1, 1000, 100_000, 200_000, 300_000, 400_000, 400_000])
    store = world.cached(folder, limit)
    for kind, number, start, length, fresh in reads:
        if fresh:
            store = world.cached(folder, limit)
        key = f"a/c/{number}/0"
        data = world.objects[key]
        if kind == "get":
            assert store.get(key) == data
        elif kind == "range":
            assert store.get_range(key, start, length) == data[start : start + length]
        elif kind == "end":
            assert store.get_end(key, length) == data[-length:]
        else:
            assert store.size(key) == len(data)
        assert real_bytes(folder) <= limit
    shutil.rmtree(folder)


def test_ranges_asked_for_again_are_hits_and_whole_objects_serve_them(tmp_path: Path, asked: list[str]):
    world = in_memory([300_000])
    key, data = "a/c/0/0", world.objects["a/c/0/0"]
    store = world.cached(tmp_path)
    assert store.get_range(key, 1000, 5000) == store.get_range(key, 1000, 5000) == data[1000:6000]
    assert store.get_end(key, 16) == store.get_end(key, 16) == data[-16:]
    assert asked == [world.manifest, key, key]
    assert store.get(key) == data
    assert store.get_range(key, 7, 9) == data[7:16]
    assert asked == [world.manifest, key, key, key]


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path, asked: list[str]):
    world = in_memory([500_000] * 5)
    keys = list(world.objects)
    limit = 3 * 500_000 + INDEX_GROWTH + 100_000
    store = world.cached(tmp_path, limit)
    for key in (*keys[:3], keys[0], keys[3]):  # 1 is the oldest when 3 comes
        store.get(key)
    names = {path.name for path in kept(tmp_path)}
    there = [number for number, key in enumerate(keys) if sha256(world.objects[key]) in names]
    assert there == [0, 2, 3]
    store = world.cached(tmp_path, limit)  # so in another process
    store.get(keys[2])
    store.get(keys[4])
    names = {path.name for path in kept(tmp_path)}
    assert [number for number, key in enumerate(keys) if sha256(world.objects[key]) in names] == [2, 3, 4]


def test_a_hit_is_noted_by_a_process_that_writes_nothing(tmp_path: Path):
    world = in_memory([500_000] * 4)
    keys = list(world.objects)
    limit = 3 * 500_000 + INDEX_GROWTH + 100_000
    store = world.cached(tmp_path, limit)
    for key in keys[:3]:
        store.get(key)
    code = (
        "import sys; from pathlib import Path; from actcache.cache.cache_folder import cache_folder\n"
        "assert cache_folder(sys.argv[1], int(sys.argv[2])).whole(sys.argv[3])"
    )
    digest = sha256(world.objects[keys[0]])
    subprocess.run([sys.executable, "-c", code, str(tmp_path), str(limit), digest], check=True)
    store.get(keys[3])
    assert digest in {path.name for path in kept(tmp_path)}


def test_an_object_larger_than_the_bound_is_read_through(tmp_path: Path, asked: list[str]):
    world = in_memory([LEAST_BYTES, 1000])
    store = world.cached(tmp_path, LEAST_BYTES)
    for _ in range(2):
        assert store.get("a/c/1/0") == world.objects["a/c/1/0"]
        assert store.get("a/c/0/0") == world.objects["a/c/0/0"]
    assert asked.count("a/c/0/0") == 2
    assert asked.count("a/c/1/0") == 1, "nothing was evicted for what has no room at all"


def test_equal_objects_of_two_datasets_are_kept_once_and_their_ranges_apart(tmp_path: Path, asked: list[str]):
    """Nobody can check a range against its object's hash: so a stranger's range must not be served for one's own dataset."""
    first, second = in_memory([300_000]), in_memory([300_000])
    assert first.objects == second.objects
    key = "a/c/0/0"
    a, b = first.cached(tmp_path), second.cached(tmp_path)
    second.store.replace(key, bytes(300_000))
    assert b.get_range(key, 0, 10) == bytes(10), "nothing tells: chunks have checksums, but a stranger makes those too"
    assert a.get_range(key, 0, 10) == first.objects[key][:10]
    a.get(key)
    asked.clear()
    assert b.get(key) == first.objects[key]
    assert asked == []


def test_wrong_bytes_from_the_remote_are_refused_and_not_kept(tmp_path: Path):
    world = in_memory([1000, 1000, 1000])
    store = world.cached(tmp_path)
    store.get("a/c/2/0")
    before = kept(tmp_path)
    for wrong in (bytes(1000), bytes(999), bytes(1001), b""):
        world.store.replace("a/c/0/0", wrong)
        with pytest.raises(Corrupt, match=r"a/c/0/0: .*; copy it again") as caught:
            store.get("a/c/0/0")
        assert "\n" not in str(caught.value)
    world.store.replace("a/c/1/0", bytes(500))
    with pytest.raises((Corrupt, StoreError)):
        store.get_range("a/c/1/0", 400, 200)
    assert kept(tmp_path) == before
    world.store.replace("a/c/0/0", world.objects["a/c/0/0"])
    assert store.get("a/c/0/0") == world.objects["a/c/0/0"]
    world.store.delete("a/c/1/0")
    with pytest.raises(NotFound):
        store.get("a/c/1/0")


def test_a_wrong_manifest_is_refused_and_a_missing_one_reads_through(tmp_path: Path, asked: list[str]):
    world = in_memory([1000])
    world.store.replace(world.manifest, b"{}")
    with pytest.raises(Corrupt, match="manifest"):
        world.cached(tmp_path).get("a/c/0/0")
    assert kept(tmp_path) == []
    world.store.delete(world.manifest)
    store = world.cached(tmp_path)
    with pytest.warns(RuntimeWarning, match="without the local cache"):
        assert store.get("a/c/0/0") == world.objects["a/c/0/0"]
    assert store.get_end("a/c/0/0", 9) == world.objects["a/c/0/0"][-9:]


def test_limits_and_writes_are_refused(tmp_path: Path):
    store = in_memory([1000]).cached(tmp_path)
    with pytest.raises(Unsupported, match="1,000 bytes are more"):
        store.get("a/c/0/0", 999)
    for attempt in (lambda: store.put_new("x", b""), lambda: store.replace("x", b""), lambda: store.delete("a/c/0/0")):
        with pytest.raises(Unsupported, match="for reading"):
            attempt()
    with pytest.raises(NotFound):
        store.get("nowhere")
    assert set(store.list("a/")) == {"a/c/0/0"}


def test_another_dataset_at_the_same_url_is_not_read_with_old_eyes(spec: ac.Spec, tmp_path: Path):
    url, old = f"memory://{uuid.uuid4()}", tmp_path / "old"
    small = spec.model_copy(update={"sites": "resid", "max_tokens": 320})
    ac.build(small, old)
    remote, source = open_store(url), open_store(old)
    for key in source.list():
        remote.put_new(key, bytes(source.get(key)))
    before = ac.open(url, local_cache=tmp_path / "cache")
    first, second = before.sites[:2]
    was = before[first].compute()
    # The same shapes, other values: a spec with other texts.
    (tmp_path / "other.txt").write_text("".join(reversed(Path(__file__).read_text())))
    ac.build(small.model_copy(update={"corpus": (str(tmp_path / "other.txt"),)}), tmp_path / "new")
    for key in remote.list():
        remote.delete(key)
    source = open_store(tmp_path / "new")
    for key in source.list():
        remote.put_new(key, bytes(source.get(key)))
    after = ac.open(url, local_cache=tmp_path / "cache")
    wanted = ac.open(tmp_path / "new")
    assert not np.array_equal(was, wanted[first].compute())
    for _ in range(2):
        assert np.array_equal(after[first].compute(), wanted[first].compute())
        assert np.array_equal(pickle.loads(pickle.dumps(after))[first].compute(), wanted[first].compute())
    assert np.array_equal(before[first].compute(), was), "the old one is still the old one, as far as it is here"
    with pytest.raises(Corrupt, match=r"another dataset was made at this URL .*; open it again"):
        before[second].compute()


def test_added_sites_are_cached_too(spec: ac.Spec, tmp_path: Path, asked: list[str]):
    ac.build(spec.model_copy(update={"sites": "resid", "max_tokens": 320}), tmp_path / "www/ds")
    with serving(tmp_path / "www") as server:
        before = ac.open(f"{server.url}/ds", local_cache=tmp_path / "cache")
        before[before.sites[0]].compute()
        ac.build(
            spec.model_copy(update={"sites": "resid", "max_tokens": 320}),
            tmp_path / "www/ds",
            add_sites="blocks.*.hook_attn_out",
        )
        after = ac.open(f"{server.url}/ds", local_cache=tmp_path / "cache")
        added = sorted(set(after.sites) - set(before.sites))
        assert added
        wanted = ac.open(tmp_path / "www/ds")
        for _ in range(2):
            asked.clear()
            for name in (*added, before.sites[0]):
                assert np.array_equal(after[name].compute(), wanted[name].compute())
        assert asked == []
        before[before.sites[0]].compute()
        assert asked == []


def test_a_store_without_a_root_reads_through_until_there_is_one(built: str, tmp_path: Path, asked: list[str]):
    source, url = open_store(built), f"memory://{uuid.uuid4()}"
    remote = open_store(url)
    for key in source.list():
        if key != "zarr.json":
            remote.put_new(key, bytes(source.get(key)))
    store = open_store(with_local_cache(Location.of(url), tmp_path / "cache", LIMIT))
    with pytest.raises(ac.NotSealed):
        ac.open(url, local_cache=tmp_path / "cache")
    key = ".actcache/tokens.json"
    assert store.get(key) == source.get(key)
    assert kept(tmp_path / "cache") == []
    remote.put_new("zarr.json", bytes(source.get("zarr.json")))
    store.get("zarr.json")
    for _ in range(2):
        asked.clear()
        assert store.get(key) == source.get(key)
    assert asked == []


# What is done to the folder.


def damage_flip(folder: Path) -> None:
    for path in kept(folder):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


def damage_flip_hashes(folder: Path) -> None:
    """In a manifest, the hash of another object: a line that is no less an entry."""
    for path in kept(folder):
        data = path.read_bytes()
        if data.startswith(b'{"key"'):
            path.write_bytes(b"\n".join(_other_hash(line) for line in data.split(b"\n")))


def _other_hash(line: bytes) -> bytes:
    at = line.find(b'"sha256":"') + 10
    return line if not line else line[:at] + (b"0" if line[at : at + 1] != b"0" else b"1") + line[at + 1 :]


def damage_flip_ends(folder: Path) -> None:
    for path in kept(folder):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)


def damage_truncate(folder: Path) -> None:
    for path in kept(folder):
        replaced = path.with_name("x")
        replaced.write_bytes(path.read_bytes()[:-1])
        replaced.rename(path)


def damage_empty(folder: Path) -> None:
    for path in kept(folder):
        path.unlink()
        path.touch()


def damage_files(folder: Path) -> None:
    for path in kept(folder):
        path.unlink()


def damage_folders(folder: Path) -> None:
    shutil.rmtree(folder / "objects")
    shutil.rmtree(folder / STAGING)


def damage_all(folder: Path) -> None:
    shutil.rmtree(folder)


def damage_index(folder: Path) -> None:
    (folder / INDEX).unlink()


def damage_garbage_index(folder: Path) -> None:
    (folder / INDEX).write_bytes(os.urandom(5000))


def damage_half_index(folder: Path) -> None:
    data = bytearray((folder / INDEX).read_bytes())
    data[4096:] = os.urandom(len(data) - 4096)
    (folder / INDEX).write_bytes(data)


def damage_cut_index(folder: Path) -> None:
    os.truncate(folder / INDEX, 4096)


def damage_foreign_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    with sqlite3.connect(folder / INDEX) as rows:
        rows.execute("CREATE TABLE files (x)")
    rows.close()


DAMAGES = {name.removeprefix("damage_"): damage for name, damage in globals().items() if name.startswith("damage_")}


@pytest.mark.parametrize("fresh", [False, True], ids=["same process", "fresh process"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_whatever_is_done_to_the_folder_heals(damage, fresh: bool, tmp_path: Path, asked: list[str]):
    world = in_memory([200_000] * 30)
    folder = tmp_path / "cache"
    store = world.cached(folder)

    def read(number: int) -> None:
        for key, data in list(world.objects.items())[:number]:
            assert store.get_range(key, 100, 1000) == data[100:1100]
            assert store.get(key) == data
            assert store.get_range(key, 150, 100) == data[150:250]
            assert real_bytes(folder) <= LIMIT

    read(10)
    asked.clear()
    read(10)
    assert asked == [], "ten have room"
    damage(folder)
    if fresh:
        store = world.cached(folder)
    read(10)
    asked.clear()
    read(10)
    assert asked == [], "they are all there again"
    read(30)
    asked.clear()
    for key in list(world.objects)[-5:]:
        store.get(key)
    assert asked == [], "it keeps new ones"


@pytest.mark.parametrize("seed", range(8))
def test_any_bytes_in_the_index_heal_or_are_read_past(seed: int, tmp_path: Path):
    """Some damage SQLite does not notice: then too every byte is right, and nothing outside the folder is touched."""
    rng = np.random.default_rng(seed)
    world = in_memory([200_000] * 20)
    store = world.cached(tmp_path)
    for key in world.objects:
        store.get(key)
    data = bytearray((tmp_path / INDEX).read_bytes())
    for _ in range(40):
        data[rng.integers(len(data))] = rng.integers(256)
    (tmp_path / INDEX).write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for fresh in (world.cached(tmp_path), world.cached(tmp_path)):
            for key, wanted in world.objects.items():
                assert fresh.get(key) == wanted


def test_names_in_a_hostile_index_lead_nowhere(tmp_path: Path):
    world = in_memory([300_000] * 12)
    precious = tmp_path / "precious"
    precious.write_text("x")
    folder = tmp_path / "cache"
    store = world.cached(folder)
    store.get("a/c/0/0")
    with sqlite3.connect(folder / INDEX) as rows:
        rows.execute("INSERT INTO files VALUES ('../../../precious', 5, 0, '../../precious')")
        rows.execute("INSERT INTO files VALUES (?, 5, 0, ?)", (str(precious), str(precious)))
    rows.close()
    for key in world.objects:
        store.get(key)
    assert precious.exists()
    assert real_bytes(folder) <= LIMIT


def test_an_unwritable_folder_is_read_past_with_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    world = in_memory([1000, 1000])
    (tmp_path / "file").touch()
    store = world.cached(tmp_path / "file/cache")
    with pytest.warns(RuntimeWarning, match=r"local cache .*file/cache: Not a directory"):
        store.size("a/c/0/0")  # reads the manifest
    for _ in range(2):
        for key, data in world.objects.items():
            assert store.get(key) == data
            assert store.get_range(key, 5, 10) == data[5:15]


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root writes anywhere")
def test_a_read_only_folder_still_serves_what_it_has(tmp_path: Path):
    with serving(tmp_path / "www") as server:
        world = World(open_store(tmp_path / "www"), [1000, 1000])
        folder = tmp_path / "cache"
        store = open_store(world.location(folder, url=server.url))
        store.get("a/c/0/0")
        folder.chmod(0o755)
        for path in sorted(folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        folder.chmod(0o555)
        for above in tmp_path.parents:
            if above.stat().st_uid == os.geteuid() and above != Path("/") and above.stat().st_mode & 0o077 == 0:
                above.chmod(0o755)
        tmp_path.chmod(0o755)
        server.asked.clear()
        code = (
            "import sys, pickle, warnings; warnings.simplefilter('ignore')\n"
            "from actcache.cache.store import open_store\n"
            "store = open_store(pickle.loads(bytes.fromhex(sys.argv[1])))\n"
            "print([len(store.get(f'a/c/{n}/0')) for n in (0, 1, 0, 1)])"
        )
        command = [sys.executable, "-c", code, pickle.dumps(world.location(folder, url=server.url)).hex()]
        if os.geteuid() == 0:
            command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "HOME": "/tmp"})
        folder.chmod(0o755)
        for path in folder.rglob("*"):
            path.chmod(0o755)
        if "PermissionError" in done.stderr and "site-packages" in done.stderr:
            pytest.skip("nobody else may read this Python")
        assert done.stdout.strip() == "[1000, 1000, 1000, 1000]", done.stderr
        assert [path for path, _ in server.asked] == ["a/c/1/0", "a/c/1/0"]


def test_a_full_disk_is_read_past(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    world = in_memory([100_000, 100_000])
    store = world.cached(tmp_path)
    rename = os.rename

    def full(*paths) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "rename", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        store.size("a/c/0/0")  # reads the manifest
    for key, data in world.objects.items():
        assert store.get(key) == data
    assert kept(tmp_path) == []
    assert CacheIndex(tmp_path).total() == 0
    assert list((tmp_path / STAGING).iterdir()) == []
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(folder_module, "PAUSE_SECONDS", 0.0)
    store = world.cached(tmp_path)
    store.get("a/c/0/0")
    assert len(kept(tmp_path)) == 2, "the manifest and the object"


def test_a_locked_index_delays_no_reader_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("actcache.cache.cache_index.BUSY_SECONDS", 0.1)
    world = in_memory([1000])
    store = world.cached(tmp_path)
    store.size("a/c/0/0")
    holder = sqlite3.connect(tmp_path / INDEX, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    assert store.get("a/c/0/0") == world.objects["a/c/0/0"]
    holder.execute("COMMIT")
    holder.close()
    assert store.get("a/c/0/0") == world.objects["a/c/0/0"]
    assert len(kept(tmp_path)) == 2


# Several at once.


def read_at_random(location: Location, seed: int, number: int, digests: dict[str, str]) -> int:
    store = open_store(location)
    rng = np.random.default_rng(seed)
    keys = list(digests)

    def one(choice: tuple[int, bool, int]) -> int:
        key = keys[choice[0]]
        if choice[1]:
            data = bytes(store.get(key))
            assert sha256(data) == digests[key]
        else:
            whole = sha256(bytes(store.get_range(key, 0, choice[2])) + bytes(store.get_range(key, choice[2], 1 << 30)))
            assert whole == digests[key]
        return 1

    choices = [
        (int(rng.integers(len(keys))), bool(rng.integers(2)), int(rng.integers(1, 5)) * 20_000) for _ in range(number)
    ]
    with ThreadPoolExecutor(3) as pool:
        return sum(pool.map(one, choices))


class Watch:
    """Looks at the size of a folder all the time.

    Under the index's lock, where nothing is evicted, and by inode, so that it adds up what is there at one moment.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.most, self.looks = folder, 0, 0
        self._stop = Event()
        self._thread = Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        index = CacheIndex(self.folder)
        while not self._stop.wait(0.01):
            with index._transaction():
                found = [*(self.folder / STAGING).glob("*"), *self.folder.rglob("*")]
                sizes = {}
                for path in found:
                    with suppress(FileNotFoundError):
                        status = path.stat()
                        sizes[status.st_ino] = status.st_size if path.is_file() else 0
            self.most = max(self.most, sum(sizes.values()))
            self.looks += 1

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._stop.set()
        self._thread.join()


def test_processes_at_once_read_right_and_keep_the_bound(tmp_path: Path):
    (tmp_path / "www").mkdir()
    world = World(open_store(tmp_path / "www"), [150_000] * 40)
    digests = {key: sha256(data) for key, data in world.objects.items()}
    limit = 2 << 20  # the data are 6 MB
    with (
        serving(tmp_path / "www") as server,
        Watch(tmp_path / "cache") as watch,
        ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool,
    ):
        location = world.location(tmp_path / "cache", limit, server.url)
        jobs = [pool.submit(read_at_random, location, seed, 150, digests) for seed in range(4)]
        assert [job.result() for job in jobs] == [150] * 4
    assert watch.looks > 20
    assert watch.most <= limit
    there = sum(path.stat().st_size for path in kept(tmp_path / "cache"))
    assert CacheIndex(tmp_path / "cache").total() == there > limit // 2
    assert list((tmp_path / "cache" / STAGING).iterdir()) == []


def test_threads_that_want_one_object_at_once(tmp_path: Path):
    world = in_memory([500_000])
    store = world.cached(tmp_path)
    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(lambda _: bytes(store.get("a/c/0/0")), range(64))) == {world.objects["a/c/0/0"]}
    assert len(kept(tmp_path)) == 2
    assert CacheIndex(tmp_path).total() == sum(path.stat().st_size for path in kept(tmp_path))


def test_ranges_that_are_held_hold_no_files_open(tmp_path: Path):
    world = in_memory([200_000, 200_000])
    store = world.cached(tmp_path)
    store.get("a/c/1/0")
    before = len(os.listdir("/proc/self/fd"))
    held = [store.get_range(f"a/c/{n % 2}/0", n // 4 * 10, 10) for n in range(100)]
    assert len(held) == 100
    assert len(os.listdir("/proc/self/fd")) <= before + 1, "the manifest's"


KILLED = """
import os, pickle, sys, time
from pathlib import Path
from actcache.cache.cache_index import CacheIndex
staged = CacheIndex(Path(sys.argv[1])).reserve("f" * 64, 2_000_000, int(sys.argv[2]), {})
staged.write_bytes(bytes(1_500_000))
print("writing", flush=True)
time.sleep(600)
"""


def test_the_room_of_a_killed_writer_is_taken_back(tmp_path: Path, asked: list[str]):
    world = in_memory([200_000] * 10)
    writer = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), str(LIMIT)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"writing\n"
    store = world.cached(tmp_path)
    store.get("a/c/0/0")
    assert CacheIndex(tmp_path).total() > 2_200_000, "as long as it lives, its room is its own"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    store = world.cached(tmp_path)
    store.get("a/c/1/0")
    assert CacheIndex(tmp_path).total() < 500_000, "at once, not when its turn to go comes"
    for key in world.objects:
        store.get(key)
    asked.clear()
    for key in world.objects:
        store.get(key)
    assert asked == [], "all ten have room again"
    assert list((tmp_path / STAGING).iterdir()) == []
    assert CacheIndex(tmp_path).total() == sum(path.stat().st_size for path in kept(tmp_path))


def test_readers_killed_anywhere_leave_a_cache_that_works(tmp_path: Path):
    (tmp_path / "www").mkdir()
    world = World(open_store(tmp_path / "www"), [150_000] * 40)
    digests = {key: sha256(data) for key, data in world.objects.items()}
    limit, folder = 2 << 20, tmp_path / "cache"
    code = (
        "import pickle, sys; from tests.test_local_cache import read_at_random\n"
        "print('go', flush=True); read_at_random(*pickle.loads(bytes.fromhex(sys.argv[1])))"
    )
    with serving(tmp_path / "www") as server:
        location = world.location(folder, limit, server.url)
        for seed in range(6):
            given_ = pickle.dumps((location, seed, 100_000, digests)).hex()
            reader = subprocess.Popen([sys.executable, "-c", code, given_], stdout=subprocess.PIPE)
            assert reader.stdout is not None
            assert reader.stdout.readline() == b"go\n"
            time.sleep(0.3 + 0.11 * seed)
            assert reader.poll() is None
            reader.kill()
            reader.wait()
            reader.stdout.close()
            assert real_bytes(folder) <= limit
        assert read_at_random(location, 99, 100, digests) == 100
    assert real_bytes(folder) <= limit
    assert list((folder / STAGING).iterdir()) == []


def test_a_writer_of_another_host_is_given_an_hour(tmp_path: Path):
    index = CacheIndex(tmp_path)
    index.total()
    (tmp_path / STAGING).mkdir()
    fresh, old = (tmp_path / STAGING / f"elsewhere+1+{uuid.uuid4().hex}" for _ in range(2))
    for path in (fresh, old):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - ABANDONED_AFTER - 60,) * 2)
    index.reclaim()
    assert fresh.exists()
    assert not old.exists()


def test_room_that_was_taken_back_is_not_written_to(tmp_path: Path):
    index = CacheIndex(tmp_path)
    staged = index.reserve("a" * 64, 1_000_000, LIMIT, {})
    assert staged is not None
    staged.write_bytes(bytes(1_000_000))
    assert index.reserve("b" * 64, 2_500_000, LIMIT, {}) is not None
    with pytest.raises(FileNotFoundError):
        staged.rename(path_of(tmp_path, "a" * 64))


def test_the_folder_is_its_owners_alone(tmp_path: Path):
    in_memory([1000]).cached(tmp_path / "cache").get("a/c/0/0")
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0


# The manifest.

KEY = st.text("abcdefghijklmnopqrstuvwxyzABZ0189_.-:/", min_size=1, max_size=30)


@given(st.sets(KEY, max_size=60), KEY)
def test_a_key_is_found_in_a_manifest(keys: set[str], other: str):
    entries = {key: StoredObject(key=key, size=len(key), sha256=sha256(key.encode())) for key in keys}
    manifest = manifest_bytes(entries.values())
    for key in keys | {other}:
        assert find_object(manifest, key, "here") == entries.get(key)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b'{"key":"a","sha256":"../../x","size":3}',
        b'{"key":"a","sha256":"' + b"0" * 64 + b'","size":-3}',
        b'{"key":"a","sha256":"' + b"0" * 64 + b'"}',
        b"\xff\xfe",
    ],
)
def test_a_line_that_is_no_entry_is_refused(line: bytes):
    with pytest.raises(Corrupt, match="here"):
        find_object(line + b"\n", "a", "here")
