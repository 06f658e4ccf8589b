"""Added builds in trouble: stopped, raced, abandoned, and roots that strangers wrote. The old dataset stays whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import actcache as ac
from actcache.cache.added import seal_finished
from actcache.cache.local_store import LocalStore
from actcache.cache.roots import finish_root, newest_root
from actcache.cache.store import Store, open_store
from actcache.clients.cli import main
from actcache.schemas.errors import Corrupt
from actcache.schemas.root import root_key
from actcache.schemas.root_document import parse_root, root_bytes
from actcache.schemas.spec import Spec

from .crash import Child, Fault, run, small_spec

ATTENTION, MLP = "blocks.0.hook_attn_out", "blocks.1.hook_mlp_out"
SECOND = root_key(2)


def call(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    return small_spec(tmp_path_factory.mktemp("spec"))


@pytest.fixture(scope="module")
def more(spec: Spec) -> Spec:
    return Spec(model=spec.model)


@pytest.fixture(scope="module")
def first(spec: Spec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    url = tmp_path_factory.mktemp("first") / "ds"
    ac.build(spec, url)
    return url


@pytest.fixture(scope="module")
def grown(first: Path, more: Spec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of two generations. Tests must not change it."""
    url = Path(shutil.copytree(first, tmp_path_factory.mktemp("grown") / "ds"))
    ac.build(more, url, add_sites=ATTENTION)
    return url


@pytest.fixture
def ds(first: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(first, tmp_path / "ds"))


@pytest.fixture
def wide(grown: Path, tmp_path: Path) -> Path:
    """A copy of the dataset of two generations."""
    return Path(shutil.copytree(grown, tmp_path / "wide"))


def check_old(url: Path, first: Path) -> None:
    """What was sealed is whole and is all that a reader sees."""
    ds = ac.open(url)
    assert (ds.sites, ds.manifest) == (ac.open(first).sites, ac.open(first).manifest)
    report = ac.verify(url, full=True)
    assert (report.problems, report.unexpected) == ([], [])


def check_new(url: Path, *sites: str) -> None:
    """The sites are there, and nothing else is left."""
    report = ac.verify(url, full=True)
    assert (report.problems, report.unexpected, report.unfinished) == ([], [], [])
    assert set(sites) <= set(ac.open(url).sites)


def stop(url: Path, spec: Spec, sites: str, at: str) -> None:
    """Add, and be killed while the first object whose key begins like this is written."""
    assert run(spec, str(url), Fault("staging", key=at), add_sites=sites).killed


@pytest.mark.parametrize("at", ["norm/1/c", f"{ATTENTION}/zarr.json", f"{ATTENTION}/c/2", "statistics/", SECOND])
def test_an_interrupted_added_build_is_told_and_resumes(
    ds: Path, first: Path, grown: Path, more: Spec, at: str
) -> None:
    stop(ds, more, ATTENTION, at)
    check_old(ds, first)
    work = ac.verify(ds).unfinished[0]
    assert f"(1 sites: {ATTENTION}) is not finished" in work.what
    assert "unfinished  added build" in call("verify", ds).output
    assert json.loads(call("verify", ds, "--json").stdout)["unfinished"][0]["folders"][0] == "norm/1/"
    assert ac.build(more, ds, add_sites=ATTENTION).manifest == ac.open(grown).generations[1].manifest
    check_new(ds, ATTENTION)


def test_whoever_finds_the_root_not_written_over_does_it(ds: Path, first: Path, more: Spec, spec: Spec) -> None:
    stop(ds, more, ATTENTION, "zarr.json")
    check_old(ds, first)
    old, new = (ds / "zarr.json").read_bytes(), (ds / SECOND).read_bytes()
    assert call("seal", ds).exit_code == 0
    assert (ds / "zarr.json").read_bytes() == new
    again: list[Callable[[], object]] = [
        lambda: ac.build(more, ds, add_sites=ATTENTION),
        lambda: ac.build(spec, ds),
        lambda: call("seal", ds),
        lambda: ac.build(more, ds, add_sites=MLP),
    ]
    for finish in again:
        (ds / "zarr.json").write_bytes(old)
        assert ac.open(ds).sites == ac.open(first).sites
        report = ac.verify(ds, full=True)
        assert (report.problems, report.unexpected) == ([], [])
        assert "zarr.json is older than" in report.unfinished[0].what
        assert all("is sealed" in work.what for work in report.unfinished[1:])
        finish()
        check_new(ds, ATTENTION)
    assert MLP in ac.open(ds).sites
    assert newest_root(open_store(ds)).attributes.generations[1] == parse_root(new, "x").attributes.generations[1]


def test_a_slow_writer_that_puts_an_old_root_over_a_newer_one_looks_again(
    ds: Path, more: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the claim of one added build and its writing over, another claims and writes the next."""
    honest = LocalStore.replace

    def slow(store: LocalStore, key: str, data: bytes) -> None:
        if key == "zarr.json":
            monkeypatch.setattr(LocalStore, "replace", honest)
            ac.build(more, ds, add_sites=MLP)
        honest(store, key, data)

    monkeypatch.setattr(LocalStore, "replace", slow)
    ac.build(more, ds, add_sites=ATTENTION)
    assert [generation.sites for generation in ac.open(ds).generations[1:]] == [(ATTENTION,), (MLP,)]
    check_new(ds, ATTENTION, MLP)


def test_who_loses_the_claim_of_a_root_takes_the_next(ds: Path, more: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    from actcache.cache import roots

    honest = roots._grown

    def slow(root: object, sealed: object) -> bytes:
        monkeypatch.setattr(roots, "_grown", honest)
        ac.build(more, ds, add_sites=MLP)
        return honest(root, sealed)  # type: ignore[arg-type]

    monkeypatch.setattr(roots, "_grown", slow)
    result = ac.build(more, ds, add_sites=ATTENTION)
    assert result.state == "built"
    found = ac.open(ds)
    assert [generation.sites for generation in found.generations[1:]] == [(MLP,), (ATTENTION,)]
    assert found.generations[2].key == result.key
    layouts = found._root.layouts
    assert layouts["norm/1"].attributes["sites"] == [ATTENTION]
    assert layouts["norm/2"].attributes["sites"] == [MLP]
    for site in (ATTENTION, MLP):
        rows = found[site].compute().astype(float)
        np.testing.assert_allclose(found.norm[site], np.linalg.norm(rows, axis=1), rtol=1e-6)
    check_new(ds, ATTENTION, MLP)


def test_another_spec_for_a_site_that_is_being_added_is_refused_and_names_the_holder(
    ds: Path, first: Path, more: Spec
) -> None:
    stop(ds, more, f"{ATTENTION} {MLP}", f"{MLP}/c/1")
    open_store(ds).clean_staging()
    before = open_store(ds).list()
    for spec, sites, says in (
        (more.model_copy(update={"dtype": "float16"}), ATTENTION, "stored_dtype: float32 here, float16 asked for"),
        (more.model_copy(update={"batch_size": 3}), f"{ATTENTION} {MLP}", "batch_size: .* here, 3 asked for"),
        (more, f"{MLP} blocks.0.hook_mlp_out", "sites: "),
    ):
        with pytest.raises(ac.SpecMismatch, match=f"is held by added build .* not finished.*{says}.*finish it"):
            ac.build(spec, ds, add_sites=sites)
    assert open_store(ds).list() == before
    assert ac.build(more, ds, add_sites="blocks.0.hook_mlp_out").state == "built", "others may be added meanwhile"
    check_old_and(ds, first, "blocks.0.hook_mlp_out")
    assert ac.build(more, ds, add_sites=f"{ATTENTION} {MLP}").state == "built"
    check_new(ds, ATTENTION, MLP)


def check_old_and(url: Path, first: Path, *sites: str) -> None:
    assert set(ac.open(url).sites) == {*ac.open(first).sites, *sites}
    report = ac.verify(url, full=True)
    assert (report.problems, report.unexpected) == ([], [])


def test_an_abandoned_added_build_is_removed_by_its_folders(ds: Path, first: Path, more: Spec) -> None:
    stop(ds, more, ATTENTION, f"{ATTENTION}/c/2")
    for work in ac.verify(ds).unfinished:
        for folder in work.folders:
            shutil.rmtree(ds / folder, ignore_errors=True)
    assert set(open_store(ds).list()) == set(open_store(first).list())
    other = more.model_copy(update={"dtype": "float16"})
    assert ac.build(other, ds, add_sites=ATTENTION).state == "built"
    check_new(ds, ATTENTION)


def test_norms_that_an_abandoned_build_left_are_never_taken_for_anothers(ds: Path, more: Spec) -> None:
    """Only its claim was removed: the number is not used again."""
    stop(ds, more, ATTENTION, SECOND)
    (ds / "norm/1/zarr.json").unlink()
    shutil.rmtree(ds / ATTENTION)
    ac.build(more, ds, add_sites=MLP)
    found = ac.open(ds)
    assert "norm/2" in found._root.layouts
    np.testing.assert_allclose(found.norm[MLP], np.linalg.norm(found[MLP].compute().astype(float), axis=1), rtol=1e-6)
    assert found.generations[1].provenance.mixed_attempts == ()


def test_seal_seals_finished_added_builds_and_says_what_others_lack(ds: Path, first: Path, more: Spec) -> None:
    stop(ds, more, ATTENTION, SECOND)
    stop(ds, more, MLP, f"{MLP}/c/2")
    done = call("seal", ds)
    assert done.exit_code == 1
    assert "added 1 sites: sealed" in done.output
    assert "2 of 4 blocks are missing" in done.output or "blocks are missing (first: block" in done.output
    assert "run the same 'actcache build --add-sites' to go on" in done.output
    check_old_and(ds, first, ATTENTION)
    assert ac.open(ds).generations[1].provenance.replay.status == "not replayed"
    ac.build(more, ds, add_sites=MLP)
    again = json.loads(call("seal", ds, "--json").stdout)
    assert (again["state"], again["added"]) == ("already sealed", [])
    check_new(ds, ATTENTION, MLP)


@pytest.mark.parametrize("sites", [(ATTENTION, ATTENTION), (ATTENTION, MLP), (ATTENTION, f"{ATTENTION} {MLP}")])
@pytest.mark.parametrize("kind", ["local", "s3"])
def test_two_added_builds_at_once(
    request: pytest.FixtureRequest, spec: Spec, more: Spec, tmp_path: Path, kind: str, sites: tuple[str, str]
) -> None:
    """Of the same sites, of others, and of some of the same: then one of the two says who holds them, or finds them sealed."""
    url = f"{request.getfixturevalue('s3')}ds" if kind == "s3" else str(tmp_path / "ds")
    ac.build(spec, url)
    children = [Child(more, url, add_sites=names) for names in sites]
    for child in children:
        child.go()
    outcomes = [child.wait() for child in children]
    for outcome, names in zip(outcomes, sites, strict=True):
        if outcome.error is not None:
            assert isinstance(outcome.error, ac.SpecMismatch)
            assert "is held by added build" in str(outcome.error)
            ac.build(more, url, add_sites=names)
    found = ac.open(url)
    assert {name for names in sites for name in names.split()} <= set(found.sites)
    report = ac.verify(url, full=True)
    assert (report.problems, report.unexpected, report.unfinished) == ([], [], [])


def test_a_damaged_shard_of_an_unfinished_added_build_is_never_sealed(ds: Path, first: Path, more: Spec) -> None:
    stop(ds, more, ATTENTION, "statistics/")
    victim = ds / ATTENTION / "c/1/0"
    victim.write_bytes(victim.read_bytes()[:-1])
    with (
        ThreadPoolExecutor(2) as pool,
        pytest.raises(ac.Corrupt, match=r"its receipt says .*\.actcache/[0-9a-f]{64}/receipts/"),
    ):
        seal_finished(open_store(ds), pool)
    check_old(ds, first)


def test_a_wrong_shard_of_an_added_build_is_noticed_by_its_replay(ds: Path, first: Path, more: Spec) -> None:
    from actcache.cache.encoder import encode_shard
    from actcache.schemas.array import ArrayLayout

    stop(ds, more, ATTENTION, SECOND)
    layout = ArrayLayout.parse(ATTENTION, json.loads((ds / ATTENTION / "zarr.json").read_bytes()))
    with ThreadPoolExecutor(1) as pool:
        for block in range(layout.n_shards):
            low, high = layout.shard_range(block)
            rows = np.ones((high - low, *layout.row_shape), np.float32)
            (ds / layout.shard_key(block)).write_bytes(encode_shard(layout, rows, pool))
    with pytest.raises(ac.ProofFailed, match=f"{ATTENTION}, sequence .* replay differs"):
        ac.build(more, ds, add_sites=ATTENTION)
    check_old(ds, first)


def test_one_flipped_byte_in_any_object_of_two_generations_is_found_and_named(wide: Path) -> None:
    files = sorted(path for path in wide.rglob("*") if path.is_file())
    for number, path in enumerate(files):
        data = path.read_bytes()
        flipped = bytearray(data)
        flipped[(number * 7919) % len(data)] ^= 0x20
        path.write_bytes(bytes(flipped))
        key = path.relative_to(wide).as_posix()
        assert [problem.key for problem in ac.verify(wide, full=True).problems] == [key]
        path.unlink()
        if key != "zarr.json":
            assert [problem.key for problem in ac.verify(wide).problems] == [key]
        path.write_bytes(data)
    check_new(wide)


def document(url: Path) -> tuple[dict, dict]:
    root = json.loads((url / "zarr.json").read_bytes())
    return root["attributes"]["actcache"], root["consolidated_metadata"]["metadata"]


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda a: a["generations"][1].update(key="../../etc"), "no SHA-256"),
        (lambda a: a["generations"][1].update(manifest="x/../../y"), "no SHA-256"),
        (lambda a: a["generations"][1].update(key=a["generations"][0]["key"]), "same key"),
        (lambda a: a["generations"][1].update(sites=[]), "of no site"),
        (lambda a: a["generations"][1].update(sites=a["generations"][0]["sites"]), "named twice"),
        (lambda a: a["generations"][1].update(sites=[MLP]), f"{MLP}.* is missing"),
        (lambda a: a["generations"].pop(), "generation 1, which there is not"),
        (lambda a: a["arrays"].pop("norm/1"), "one array of norms"),
        (lambda a: a["arrays"]["norm/1"].update(generation=0), "one array of norms"),
        (lambda a: a["arrays"][ATTENTION].update(generation=7), "generation 7"),
        (lambda a: a["arrays"].pop(f"statistics/{ATTENTION}"), "statistics.* is missing"),
    ],
)
def test_a_strangers_root_of_two_generations_is_refused_with_a_reason(grown: Path, edit: Callable, says: str) -> None:
    attributes, members = document(grown)
    edit(attributes)
    with pytest.raises(Corrupt, match=says):
        parse_root(root_bytes(attributes, members), "root")


def test_a_claimed_root_that_does_not_go_on_from_the_one_before_is_refused(
    ds: Path, wide: Path, first: Path, more: Spec
) -> None:
    attributes, members = document(wide)
    attributes["generations"][0]["manifest"] = "0" * 64
    (ds / ".actcache/roots").mkdir()
    (ds / SECOND).write_bytes(root_bytes(attributes, members))
    with pytest.raises(Corrupt, match="does not go on from the root before it"):
        ac.build(more, ds, add_sites=ATTENTION)
    assert ac.open(ds).sites == ac.open(first).sites
    report = ac.verify(ds, full=True)
    assert report.ok
    assert "does not go on" in report.unfinished[0].what


@pytest.mark.parametrize("text", ["{}", "[", '{"attributes": {"build": "../../x", "sites": [], "outputs": []}}'])
def test_a_claim_that_is_none_is_told(ds: Path, more: Spec, text: str) -> None:
    (ds / "norm/1").mkdir()
    (ds / "norm/1/zarr.json").write_text(text)
    with pytest.raises(Corrupt, match=r"norm/1/zarr\.json: not the norms of an added build"):
        ac.build(more, ds, add_sites=ATTENTION)
    report = ac.verify(ds)
    assert report.ok
    assert "not the norms of an added build" in report.unfinished[0].what


def test_what_a_later_version_wrote_into_the_root_stays(ds: Path, more: Spec) -> None:
    attributes, members = document(ds)
    attributes |= {"format": "1.7", "later": {"x": 1}}
    attributes["generations"][0]["provenance"]["later"] = [1]
    attributes["arrays"]["token_id"]["later"] = True
    (ds / "zarr.json").write_bytes(root_bytes(attributes, members))
    ac.build(more, ds, add_sites=ATTENTION)
    found, _ = document(ds)
    assert (found["format"], found["later"]) == ("1.7", {"x": 1})
    assert found["generations"][0] == attributes["generations"][0]
    assert found["arrays"]["token_id"]["later"] is True


def test_there_is_a_root_at_every_moment_of_its_writing_over(ds: Path, more: Spec) -> None:
    from threading import Event, Thread

    ended, seen = Event(), []

    def look() -> None:
        while not ended.is_set():
            seen.append(len(ac.open(ds).generations))

    watcher = Thread(target=look)
    watcher.start()
    try:
        ac.build(more, ds, add_sites=ATTENTION)
        ac.build(more, ds, add_sites=MLP)
    finally:
        ended.set()
        watcher.join()
    assert seen == sorted(seen)
    assert seen[0] == 1


def test_a_store_that_shows_what_it_held_before_is_not_written_for_ever(
    ds: Path, more: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    monkeypatch.setattr(LocalStore, "replace", lambda store, key, data: written.append(key))
    with pytest.raises(ac.StoreError, match="an older one was read back"):
        ac.build(more, ds, add_sites=ATTENTION)
    assert written == ["zarr.json"] * 10


def test_finishing_a_root_that_is_finished_writes_nothing(grown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("written")

    store: Store = open_store(grown)
    monkeypatch.setattr(type(store), "replace", refuse)
    assert len(finish_root(store).attributes.generations) == 2
