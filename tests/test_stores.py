"""One suite for every store: what is created stays, whole or not at all, and trouble has a name."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import obstore
import pytest

import actcache as ac
from actcache.cache.lease import Lease
from actcache.cache.local_store import STAGING, LocalStore
from actcache.cache.location import Location
from actcache.cache.publish import publish
from actcache.cache.remote_store import RemoteStore
from actcache.cache.store import Store, open_store
from actcache.schemas.canonical import sha256
from actcache.schemas.errors import InvalidInput, NotFound, StoreError, Unsupported
from tests.s3.server import Server

KEYS = ["zarr.json", "blocks.0.hook_resid_post/c/0/0", ".actcache/plan.json", ".actcache/receipts/000001.json"]


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "s3":
        return open_store(request.getfixturevalue("s3"))
    return open_store(tmp_path / "ds" if request.param == "local" else f"memory://{uuid.uuid4()}")


def test_an_object_is_created_once(store: Store):
    for key in KEYS:
        assert store.put_new(key, key.encode())
        assert not store.put_new(key, b"other")
        assert bytes(store.get(key)) == key.encode()
        assert store.size(key) == len(key)
    assert store.list() == {key: len(key) for key in KEYS}
    assert store.list(".actcache/receipts/") == {KEYS[3]: len(KEYS[3])}
    assert store.children("") == ({"blocks.0.hook_resid_post", ".actcache"}, {"zarr.json"})
    folders, names = store.children(".actcache/")
    assert (folders - {"staging"}, names) == ({"receipts"}, {"plan.json"})


def test_ranges(store: Store):
    store.put_new("x", bytes(range(100)))
    assert bytes(store.get_range("x", 10, 5)) == bytes(range(10, 15))
    assert bytes(store.get_range("x", 95, 5)) == bytes(range(95, 100))
    assert bytes(store.get_range("x", 3, 0)) == b""
    assert bytes(store.get_end("x", 4)) == bytes(range(96, 100))
    assert store.put_new("empty", b"")
    assert bytes(store.get("empty")) == b""


def test_what_is_missing(store: Store):
    for read in (store.get, store.size, lambda key: store.get_range(key, 0, 1), lambda key: store.get_end(key, 1)):
        with pytest.raises(NotFound, match="nowhere"):
            read("nowhere")
    assert store.get_or_none("nowhere") is None
    assert store.list() == {}
    assert store.children("") == (set(), set())
    store.delete("nowhere")


def test_one_of_many_racing_writers_wins(store: Store):
    contents = [str(number).encode() * 1000 for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda data: store.put_new("x", data), contents))
    assert won.count(True) == 1
    assert bytes(store.get("x")) == contents[won.index(True)]
    assert set(store.list()) == {"x"}


def test_publish_finds_what_is_there(store: Store):
    mine = publish(store, "x", b"mine")
    assert (mine.stored.sha256, mine.other) == (sha256(b"mine"), None)
    again = publish(store, "x", b"mine")
    assert (again.stored, again.other) == (mine.stored, None)
    assert (mine.created, again.created) == (True, False), "of two writers of equal bytes one created the object"
    other = publish(store, "x", b"yours!")
    assert bytes(other.other or b"") == b"mine"
    assert other.stored == mine.stored


def test_replace_and_delete_are_for_what_may_change(store: Store):
    store.replace(".actcache/leases/x.json", b"1")
    store.replace(".actcache/leases/x.json", b"22")
    assert bytes(store.get(".actcache/leases/x.json")) == b"22"
    store.delete(".actcache/leases/x.json")
    assert store.list() == {}


def test_the_probe_passes_and_leaves_nothing(store: Store):
    store.probe_create_only()
    assert store.list() == {}


def test_a_store_that_overwrites_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch):
    def overwrite(key: str, data: bytes) -> bool:
        store.replace(key, data)
        return True

    monkeypatch.setattr(store, "put_new", overwrite)
    with pytest.raises(Unsupported, match="If-None-Match"):
        store.probe_create_only()
    assert store.list() == {}


def test_a_lease_is_held_by_one_and_given_back(store: Store):
    first, second = Lease(store, "x"), Lease(store, "x")
    assert first.acquire()
    assert not second.acquire()
    with first:
        pass
    second.wait()
    assert second.acquire()


class Dropping(RemoteStore):
    """A store whose connection drops after, or before, the first write took effect."""

    def __init__(self, inner: RemoteStore, after: bool) -> None:
        self.location, self.objects = inner.location, inner.objects
        self.after, self.dropped = after, False

    def put_new(self, key: str, data: bytes | bytearray | memoryview) -> bool:
        if not self.dropped:
            self.dropped = True
            if self.after:
                super().put_new(key, data)
            raise StoreError("connection reset")
        return super().put_new(key, data)


@pytest.mark.parametrize("after", [True, False])
def test_a_dropped_connection_is_looked_into(after: bool):
    inner = open_store(f"memory://{uuid.uuid4()}")
    assert isinstance(inner, RemoteStore)
    store = Dropping(inner, after)
    if after:
        assert publish(store, "x", b"data").other is None
        assert bytes(inner.get("x")) == b"data"
    else:
        with pytest.raises(StoreError, match="reset"):
            publish(store, "x", b"data")
        assert publish(store, "x", b"data").other is None


def test_local_staging_of_the_dead_is_removed_and_of_the_living_kept(tmp_path: Path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    store = LocalStore(Location.of(tmp_path))
    folder = tmp_path / STAGING
    folder.mkdir(parents=True)
    names = {"dead": f"{socket.gethostname()}+{gone.pid}+0", "elsewhere": f"another-host+{gone.pid}+0"}
    names["living"] = f"{socket.gethostname()}+1+0"
    for name in names.values():
        (folder / name).write_bytes(b"half")
    store.clean_staging()
    assert {path.name for path in folder.iterdir()} == {names["elsewhere"], names["living"]}


def test_a_file_is_no_dataset(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="is a file"):
        open_store(tmp_path / "file")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "empty"),
        ("ftp://x/y", "ftp"),
        ("s3://", "bucket"),
        ("http:///x", "host"),
        ("https://user:secret@host/x", "no user or password"),
        ("https://host/x?token=1", "query"),
    ],
)
def test_urls_that_cannot_be(url: str, says: str):
    with pytest.raises(InvalidInput, match=says) as caught:
        Location.of(url)
    assert "secret" not in str(caught.value)


def test_locations_travel_without_secrets(s3: str, monkeypatch: pytest.MonkeyPatch):
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    location = open_store(s3).location
    assert secret.encode() not in pickle.dumps(location)
    assert location.endpoint_url == os.environ["AWS_ENDPOINT_URL"]
    assert Location.of("~/x").path == str(Path.home() / "x")
    assert Location.of("file:///a/b").url == "/a/b"
    assert Location.of("s3://b//x/").url == "s3://b/x"


@pytest.fixture
def public(s3_server: Server, s3: str) -> str:
    """A prefix of the bucket that everyone may read."""
    return f"{s3_server.public_bucket}/{s3.rstrip('/').rsplit('/', 1)[-1]}"


def test_http_reads_and_writes_nothing(public: str, s3_server: Server):
    open_store(f"s3://{public}").put_new("a/b", b"hello")
    http = open_store(f"{s3_server.endpoint}/{public}")
    assert bytes(http.get("a/b")) == b"hello"
    assert bytes(http.get_range("a/b", 1, 3)) == b"ell"
    assert bytes(http.get_end("a/b", 2)) == b"lo"
    assert http.size("a/b") == 5
    with pytest.raises(NotFound):
        http.get("a/c")
    for attempt in (
        lambda: http.put_new("x", b""),
        lambda: http.replace("x", b""),
        lambda: http.delete("a/b"),
        http.list,
    ):
        with pytest.raises(Unsupported, match=r"http\(s\)"):
            attempt()
    with pytest.raises(Unsupported):
        http.children("")


def test_s3_credentials_are_found_as_botocore_finds_them(
    public: str, s3: str, s3_server: Server, monkeypatch, tmp_path: Path
):
    open_store(s3).put_new("x", b"private")
    open_store(f"s3://{public}").put_new("x", b"public")
    config = tmp_path / "config"
    config.write_text(
        f"[profile lab]\nregion=us-east-1\nendpoint_url={s3_server.endpoint}\n"
        f"aws_access_key_id={s3_server.reader_key}\naws_secret_access_key={s3_server.reader_secret}\n"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    reader = open_store(s3, profile="lab")
    assert bytes(reader.get("x")) == b"private"
    assert reader.list() == {"x": 7}
    with pytest.raises(StoreError, match=r"access refused.*AccessDenied|access refused"):
        reader.put_new("y", b"")
    with pytest.raises(StoreError, match="absent"):
        open_store(s3, profile="absent")
    with pytest.raises(StoreError, match="no S3 credentials"):
        open_store(s3, endpoint_url=s3_server.endpoint)
    anonymous = open_store(f"s3://{public}", endpoint_url=s3_server.endpoint, anonymous=True)
    assert bytes(anonymous.get("x")) == b"public"
    assert anonymous.list() == {"x": 6}
    with pytest.raises(StoreError, match="access refused"):
        open_store(s3, endpoint_url=s3_server.endpoint, anonymous=True).get("x")


def test_s3_errors_are_one_line(s3: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(StoreError, match="no bucket 'nobody-has-this'") as caught:
        open_store("s3://nobody-has-this/x").get("x")
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreError, match="SignatureDoesNotMatch") as caught:
        open_store(s3).get("x")
    assert "\n" not in str(caught.value)
    assert "wrong" not in str(caught.value)


def test_large_objects_are_one_conditional_put(s3: str):
    """obstore would cut them into parts, whose condition this server ignores."""
    store = open_store(s3)
    data = bytes(20 << 20)
    assert store.put_new("big", data)
    assert not store.put_new("big", data[:-1])
    assert store.size("big") == len(data)
    assert isinstance(store, RemoteStore)
    assert "-" not in (obstore.head(store.objects, "big")["e_tag"] or "")


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_the_catalog_lists_sealed_and_half_built(
    kind: str, spec: ac.Spec, request: pytest.FixtureRequest, tmp_path: Path
):
    store = open_store(request.getfixturevalue("s3") if kind == "s3" else tmp_path)
    base = store.location
    ac.build(spec.model_copy(update={"sites": "resid", "max_tokens": 60}), base.child("a/one"))
    ac.build(spec.model_copy(update={"sites": "resid", "max_tokens": 60}), base.child("half"), stage="tokenise")
    store.put_new("foreign/zarr.json", b'{"zarr_format":3,"node_type":"group"}')
    store.put_new("notes/readme.txt", b"hello")
    open_store(base.child("broken")).put_new(".actcache/plan.json", b"{")
    found = {entry.url.removeprefix(base.url).strip("/"): entry for entry in ac.catalog(base)}
    assert {name: entry.state for name, entry in found.items()} == {
        "a/one": "sealed",
        "half": "building",
        "broken": "unreadable",
    }
    assert found["a/one"].n_tokens == 60
    assert len(found["a/one"].sites) == 4
    assert found["half"].key == found["a/one"].key
    assert "plan.json" in (found["broken"].problem or "")
    assert [entry.url for entry in ac.catalog(base.child("a/one"))] == [base.child("a/one").url]


def test_links_that_lead_in_circles(tmp_path: Path, spec: ac.Spec):
    ac.build(spec.model_copy(update={"sites": "resid", "max_tokens": 40}), tmp_path / "real/ds")
    (tmp_path / "real/loop").symlink_to(tmp_path)
    (tmp_path / "real/ds/loop").symlink_to(tmp_path / "real/ds")
    (tmp_path / "linked").symlink_to(tmp_path / "real/ds")
    assert [Path(entry.url).name for entry in ac.catalog(tmp_path)] == ["linked", "ds"]
    assert ac.verify(tmp_path / "real/ds", full=True).ok


def test_an_object_over_its_limit_is_not_read(store: Store):
    store.put_new("x", b"12345")
    assert bytes(store.get("x", 5)) == b"12345"
    with pytest.raises(Unsupported, match="5 bytes are more than the 4"):
        store.get("x", 4)


@pytest.mark.parametrize("endpoint", ["http://user:hunter2@host", "host:80", "ftp://x"])
def test_endpoints_that_cannot_be(endpoint: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InvalidInput, match="endpoint") as caught:
        Location.of("s3://b/x", endpoint_url=endpoint)
    assert "hunter2" not in str(caught.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(InvalidInput) as caught:
        open_store("s3://b/x")
    assert "hunter2" not in str(caught.value)


def test_listing_an_absent_bucket_or_with_a_wrong_key(s3: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(StoreError, match="no bucket"):
        ac.catalog("s3://nobody-has-this/x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreError, match=r"cannot be listed: .*(Forbidden|denied|Signature|Access)") as caught:
        ac.catalog(s3)
    assert "\n" not in str(caught.value)


def test_a_foreign_name_in_staging_is_left_alone(tmp_path: Path):
    folder = tmp_path / STAGING
    folder.mkdir(parents=True)
    (folder / ".nfs0001").write_bytes(b"")
    LocalStore(Location.of(tmp_path)).clean_staging()
    assert (folder / ".nfs0001").exists()


def test_a_lease_survives_a_retry_that_had_succeeded():
    """The connection dropped after the write took effect: the lease is ours all the same."""
    inner = open_store(f"memory://{uuid.uuid4()}")
    assert isinstance(inner, RemoteStore)
    assert Lease(Dropping(inner, after=True), "x").acquire()
    assert not Lease(inner, "x").acquire()
