"""A user's bad days: what stops a build says so on one line, and the same build goes on once the trouble is over."""

from __future__ import annotations

import os
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import actcache
from actcache.cache.store import open_store
from actcache.jobs.progress import Progress, Silent
from actcache.schemas.plan import PLAN_KEY, TOKENS_KEY
from actcache.schemas.receipt import RECEIPTS, receipt_key
from actcache.schemas.root import ROOT_KEY
from actcache.schemas.spec import Spec

from .crash import BLOCK, CONTEXT, Fault, run, small_spec
from .s3.server import Key, Server

SITE = "blocks.0.hook_resid_pre"


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    return small_spec(tmp_path_factory.mktemp("spec"))


@pytest.fixture(scope="module")
def sealed(spec: Spec, tmp_path_factory: pytest.TempPathFactory) -> actcache.BuildResult:
    """A build that had no trouble."""
    return actcache.build(spec, tmp_path_factory.mktemp("sealed") / "dataset")


@dataclass
class Disk:
    """A file system of a size of its own, in memory."""

    folder: Path

    def remount(self, options: str) -> None:
        _mount("-o", f"remount,{options}", str(self.folder))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        _mount("-t", "tmpfs", "-o", "size=1m", "actcache-test", str(folder))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a file system cannot be mounted here: {error}")
    yield Disk(folder)
    # Lazily: objects that were read are still mapped.
    subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=60)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, timeout=60, capture_output=True)


def check_refused(error: BaseException, *words: str) -> None:
    """The message is one line with these words in it."""
    message = str(error)
    assert "\n" not in message
    for word in words:
        assert word in message


def check_resumes(spec: Spec, url: str | Path, sealed: actcache.BuildResult) -> actcache.BuildResult:
    """The same build goes on to the manifest that it must have, and leaves nothing behind."""
    result = actcache.build(spec, url)
    assert result.state == "built"
    assert result.manifest == sealed.manifest
    report = actcache.verify(url, full=True)
    assert report.ok, report.problems
    assert report.unexpected == []
    return result


class AfterFirstBlock(Silent):
    """A reporter that does something as soon as a receipt exists."""

    def __init__(self, action: Callable[[], object]) -> None:
        self._action: Callable[[], object] | None = action

    def progress(self, state: Progress) -> None:
        if state.blocks and self._action is not None:
            action, self._action = self._action, None
            action()


def test_a_full_disk_stops_the_build_which_resumes_with_more_space(
    disk: Disk, spec: Spec, sealed: actcache.BuildResult
) -> None:
    """The disk is full again and again, so that nearly every stage meets it."""
    url = disk.folder / "dataset"
    stages = set()
    for pages in range(8, 200, 8):
        disk.remount(f"size={pages * os.sysconf('SC_PAGE_SIZE')}")
        try:
            result = actcache.build(spec, url)
        except actcache.StoreError as error:
            check_refused(error, str(url), "free some space", "run the same command again, it resumes")
            assert not (url / ROOT_KEY).exists()
            stages.add(
                "blocks" if (url / receipt_key(0)).exists() else "head" if (url / TOKENS_KEY).exists() else "tokens"
            )
        else:
            break
    assert stages == {"tokens", "head", "blocks"}
    assert result.state == "built"
    assert result.manifest == sealed.manifest
    report = actcache.verify(url, full=True)
    assert report.ok
    assert report.unexpected == []


def test_a_full_temporary_folder_stops_the_build_on_one_line(
    disk: Disk, spec: Spec, sealed: actcache.BuildResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens are spooled there before their number is known."""
    url = tmp_path / "dataset"
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(disk.folder))
        (disk.folder / "other").write_bytes(bytes(1 << 20))  # the whole disk
        with pytest.raises(actcache.StoreError) as caught:
            actcache.build(spec, url)
        check_refused(caught.value, str(disk.folder), "space")
    check_resumes(spec, url, sealed)


def test_a_read_only_disk_stops_the_build_and_not_the_reading(
    disk: Disk, spec: Spec, sealed: actcache.BuildResult
) -> None:
    new, begun = disk.folder / "new", disk.folder / "begun"
    actcache.build(spec, begun, stage="tokenise")
    disk.remount("ro")
    for url in (new, begun):
        with pytest.raises(actcache.StoreError) as caught:
            actcache.build(spec, url)
        check_refused(caught.value, str(url), "Read-only file system")
    disk.remount("rw")
    check_resumes(spec, begun, sealed)
    disk.remount("ro")
    assert actcache.build(spec, begun).state == "already sealed"
    assert actcache.open(begun).n_tokens == sealed.n_tokens


@pytest.fixture
def writer_key(s3_server: Server, s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A key of the writer's that can be revoked without harm to other tests. The environment has it."""
    key = s3_server.add_user("writer", uuid.uuid4().hex, uuid.uuid4().hex)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key.access)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key.secret)
    yield key.access
    s3_server.remove_key(key.access)


def test_a_revoked_key_stops_the_build_which_resumes_with_access(
    s3: str, s3_server: Server, writer_key: str, spec: Spec, sealed: actcache.BuildResult
) -> None:
    revoked: list[Key] = []
    reporter = AfterFirstBlock(lambda: revoked.append(s3_server.remove_key(writer_key)))
    try:
        with pytest.raises(actcache.StoreError) as caught:
            actcache.build(spec, s3, reporter=reporter)
        check_refused(caught.value, s3.rstrip("/"), "access refused", "credentials", "run the same command again")
        with pytest.raises(actcache.StoreError) as caught:
            actcache.open(s3)
        check_refused(caught.value, s3.rstrip("/"), "access refused", "credentials")
    finally:
        for key in revoked:
            s3_server.restore_key(key)
    with pytest.raises(actcache.NotSealed):
        actcache.open(s3)
    receipts = open_store(s3).list(RECEIPTS)
    done = sum(receipt_key(block) in receipts for block in range(sealed.blocks_run))
    result = check_resumes(spec, s3, sealed)
    assert done >= 1
    assert result.blocks_run == sealed.blocks_run - done


def test_a_wrong_secret_is_refused_at_once(s3: str, spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-it")
    with pytest.raises(actcache.StoreError) as caught:
        actcache.build(spec, s3)
    check_refused(caught.value, s3.rstrip("/"), "access refused", "SignatureDoesNotMatch", "credentials")


def test_a_bucket_that_is_not_there_is_named(s3: str, spec: Spec) -> None:
    with pytest.raises(actcache.StoreError) as caught:
        actcache.build(spec, "s3://actcache-no-such-bucket/dataset")
    check_refused(caught.value, "there is no bucket 'actcache-no-such-bucket'")


def test_a_folder_that_holds_something_else_is_left_alone(spec: Spec, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("\\documentclass{book}")
    with pytest.raises(actcache.InvalidInput) as caught:
        actcache.build(spec, tmp_path)
    check_refused(caught.value, str(tmp_path), "not empty", "'thesis.tex'", "give a URL of its own")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_prefix_that_holds_something_else_is_left_alone(s3: str, spec: Spec) -> None:
    open_store(s3).put_new("2024/thesis.tex", b"1")
    with pytest.raises(actcache.InvalidInput) as caught:
        actcache.build(spec, s3)
    check_refused(caught.value, s3.rstrip("/"), "not empty", "'2024'", "give a URL of its own")
    assert list(open_store(s3).list()) == ["2024/thesis.tex"]


@pytest.mark.parametrize("below", ["", "/dataset"])
def test_a_file_is_no_place_for_a_dataset(spec: Spec, tmp_path: Path, below: str) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(actcache.StoreError) as caught:
        actcache.build(spec, f"{file}{below}")
    check_refused(caught.value, str(file))
    assert file.read_text() == "kept"


@pytest.mark.parametrize("stage", ["tokenise", "all"])
@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("context", CONTEXT // 2, f"context: {CONTEXT} here, {CONTEXT // 2} asked for"),
        ("block_tokens", BLOCK // 2, f"layout.block_tokens: {BLOCK} here, {BLOCK // 2} asked for"),
        ("dtype", "bfloat16", "stored_dtype: float32 here, bfloat16 asked for"),
        ("max_tokens", 100, "max_tokens: None here, 100 asked for"),
        ("head", False, "head: True here, False asked for"),
    ],
)
def test_another_spec_at_the_same_url_is_refused_with_the_difference(
    spec: Spec, sealed: actcache.BuildResult, tmp_path: Path, stage: str, field: str, value: object, told: str
) -> None:
    """On a half-built dataset and on a sealed one; what is there is not touched."""
    url = sealed.url
    if stage == "tokenise":
        url = str(tmp_path / "begun")
        actcache.build(spec, url, stage="tokenise")
    before = open_store(url).list()
    with pytest.raises(actcache.SpecMismatch) as caught:
        actcache.build(spec.model_copy(update={field: value}), url)
    check_refused(caught.value, url, told, "give another URL")
    assert open_store(url).list() == before


def test_another_corpus_at_the_same_url_is_refused(spec: Spec, sealed: actcache.BuildResult, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("another corpus")
    with pytest.raises(actcache.SpecMismatch) as caught:
        actcache.build(spec.model_copy(update={"corpus": (str(tmp_path / "other.txt"),)}), sealed.url)
    check_refused(caught.value, "corpus.content: ", "corpus.files: 10 here, 1 asked for")


def damage_first(data: bytearray) -> bytearray:
    data[0] ^= 1
    return data


def damage_middle(data: bytearray) -> bytearray:
    data[len(data) // 2] ^= 0x80
    return data


def damage_last(data: bytearray) -> bytearray:
    data[-1] ^= 1
    return data


def cut(data: bytearray) -> bytearray:
    return data[:-1]


def empty(data: bytearray) -> bytearray:
    return data[:0]


@pytest.mark.parametrize(
    ("stopped_at", "victim"),
    [(TOKENS_KEY, "token_id/c/0"), (receipt_key(1), f"{SITE}/c/1/0"), (receipt_key(1), "norm/0/c/1/0")],
)
def test_a_damaged_shard_of_a_half_built_block_is_never_sealed(
    spec: Spec, sealed: actcache.BuildResult, tmp_path: Path, stopped_at: str, victim: str
) -> None:
    """The shard has no receipt yet. The message's way out works: remove the shard, run again."""
    url = tmp_path / "dataset"
    assert run(spec, str(url), Fault("staging", key=stopped_at)).killed
    assert not (url / stopped_at).exists()
    whole = (url / victim).read_bytes()
    for harm in (damage_first, damage_middle, damage_last, cut, empty):
        (url / victim).write_bytes(harm(bytearray(whole)))
        with pytest.raises(actcache.Corrupt) as caught:
            actcache.build(spec, url)
        check_refused(caught.value, str(url / victim), "remove it and run again")
        with pytest.raises(actcache.NotSealed):
            actcache.open(url)
    (url / victim).unlink()
    check_resumes(spec, url, sealed)
    assert (url / victim).read_bytes() == whole


@pytest.mark.parametrize("harm", [cut, None])
def test_a_finished_block_that_lost_a_shard_is_never_sealed(
    spec: Spec, tmp_path: Path, harm: Callable[[bytearray], bytearray] | None
) -> None:
    """Here the receipt is there, and the shard is not what it says."""
    url = tmp_path / "dataset"
    assert run(spec, str(url), Fault("staging", key=receipt_key(3))).killed  # two blocks are under way at once
    victim = url / SITE / "c" / "0" / "0"
    assert (url / receipt_key(0)).exists()
    if harm is None:
        victim.unlink()
    else:
        victim.write_bytes(harm(bytearray(victim.read_bytes())))
    with pytest.raises(actcache.Corrupt) as caught:
        actcache.build(spec, url)
    check_refused(caught.value, str(victim))
    with pytest.raises(actcache.NotSealed):
        actcache.open(url)


def test_a_damaged_plan_is_told(spec: Spec, tmp_path: Path) -> None:
    url = tmp_path / "dataset"
    actcache.build(spec, url, stage="tokenise")
    plan = url / PLAN_KEY
    plan.write_bytes(damage_middle(bytearray(plan.read_bytes())))
    with pytest.raises(actcache.Corrupt) as caught:
        actcache.build(spec, url)
    check_refused(caught.value, str(plan))
