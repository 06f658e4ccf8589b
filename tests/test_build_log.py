"""The log of a build: what happened, a JSON object a line, without secrets and without getting in the way."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import actcache as ac
from actcache.clients.cli import main
from actcache.clients.cli.build_log import BuildLog
from actcache.clients.cli.progress import reporter
from actcache.jobs.stages import STAGES
from tests.models import save_gpt2

SECRET = "wJalrXUtnFEMI-this-is-a-secret"


def call(*args: str | Path | int) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def events(path: Path) -> list[dict]:
    """Every line of a log, each of which is one JSON object with time and event."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert list(entry)[:2] == ["time", "event"]
        when = datetime.fromisoformat(entry["time"])
        assert abs(datetime.now(UTC) - when) < timedelta(minutes=5)
        found.append(entry)
    assert [entry["time"] for entry in found] == sorted(entry["time"] for entry in found)
    return found


def of_kind(found: list[dict], name: str) -> list[dict]:
    return [entry for entry in found if entry["event"] == name]


@pytest.fixture
def words(model: Path, corpus: str) -> list[str | Path | int]:
    return ["--model", model, "--corpus", corpus, "--block-tokens", 160]


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state folder, which is not there yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def test_a_log_tells_the_whole_build(words: list, tmp_path: Path):
    log = tmp_path / "new/folder/log.jsonl"
    done = call("build", tmp_path / "ds", *words, "--log", log)
    assert done.exit_code == 0, done.output
    found = events(log)
    (build,), (sealed,), (forecast,) = (of_kind(found, name) for name in ("build", "sealed", "forecast"))
    ds = ac.open(tmp_path / "ds")
    assert (build["url"], build["key"], build["tokens"], build["blocks"]) == (str(tmp_path / "ds"), ds.key, 777, 5)
    assert (sealed["manifest"], sealed["by_us"]) == (ds.manifest, True)
    assert forecast["n_tokens"] == 777
    assert forecast["cost"]["storage_month"] > 0
    blocks = of_kind(found, "block")
    assert sorted(block["block"] for block in blocks) == list(range(5))
    assert sum(block["tokens"] for block in blocks) == 777
    stored = sum(path.stat().st_size for path in (tmp_path / "ds").rglob("*") if path.is_file())
    assert 0.5 * stored < sum(block["bytes"] for block in blocks) < stored
    assert all(not block["found"] and str(os.getpid()) in block["worker"] for block in blocks)
    for entry in (*blocks, *of_kind(found, "progress")):
        assert entry["busy"].keys() == STAGES.keys()
        assert all(0 <= share <= 1 for share in entry["busy"].values())
    stages = [entry["stage"] for entry in of_kind(found, "progress")]
    assert list(dict.fromkeys(stages)) == ["tokenise", "blocks", "replay", "seal"]
    last = of_kind(found, "progress")[-1]
    assert (last["tokens"], last["blocks"], last["blocks_total"], last["failed"]) == (777, 5, 5, 0)
    assert last["limit"] in STAGES
    assert last["busy"][last["limit"]] == max(last["busy"].values()) > 0
    assert found[-1]["event"] == "sealed"
    assert "note" in {entry["event"] for entry in found}, "what is said of recomputed tokens"


def test_by_default_it_is_in_the_state_folder_and_said_where(words: list, tmp_path: Path, state: Path):
    done = call("build", tmp_path / "data set.zarr", *words)
    assert done.exit_code == 0, done.output
    (log,) = (state / "actcache").iterdir()
    assert done.stderr.count("note: log: ") == 1
    assert f"note: log: {log}" in done.stderr
    assert "data-set.zarr" in log.name
    assert log.suffix == ".jsonl"
    assert events(log)[-1]["event"] == "sealed"


def test_who_finds_nothing_to_do_leaves_no_log(words: list, tmp_path: Path, state: Path):
    call("build", tmp_path / "ds", *words, "--log", tmp_path / "first.jsonl")
    again = call("build", tmp_path / "ds", *words)
    assert again.exit_code == 0
    assert "already sealed" in again.stdout
    assert not state.exists()
    assert "log:" not in again.stderr


def test_a_log_is_added_to_and_tells_what_was_resumed(words: list, tmp_path: Path):
    log = tmp_path / "log.jsonl"
    for part in ("1/2", "2/2"):
        assert call("build", tmp_path / "ds", *words, "--part", part, "--log", log).exit_code == 0
    assert call("build", tmp_path / "ds", *words, "--log", log).exit_code == 0
    found = events(log)
    assert sorted(block["block"] for block in of_kind(found, "block")) == list(range(5))
    assert len(of_kind(found, "build")) == 3
    assert len(of_kind(found, "forecast")) == 2, "nothing was left to be forecast for the third"
    assert len(of_kind(found, "sealed")) == 1


def test_the_log_of_a_build_that_fails_ends_with_the_error(corpus: str, tmp_path: Path):
    wild = save_gpt2(tmp_path / "wild", scale=1e6)
    log = tmp_path / "log.jsonl"
    words = ("--model", wild, "--corpus", corpus, "--dtype", "float16", "--block-tokens", 160)
    done = call("build", tmp_path / "ds", *words, "--log", log)
    assert done.exit_code == 1
    found = events(log)
    assert found[-1]["event"] == "ended"
    assert found[-1]["error"].startswith("OutOfRange: ")
    assert "does not fit into float16" in found[-1]["error"]
    assert done.stderr.splitlines()[-1] == f"actcache: error: {found[-1]['error'].removeprefix('OutOfRange: ')}"
    (failed, *_) = of_kind(found, "failed")
    assert (failed["again"], "float16" in failed["error"]) == (False, True)


def test_a_refusal_is_logged_too(words: list, tmp_path: Path):
    log = tmp_path / "log.jsonl"
    assert call("build", tmp_path / "ds", *words, "--stage", "tokenise").exit_code == 0
    assert call("build", tmp_path / "ds", *words, "--max-tokens", 9, "--log", log).exit_code == 1
    assert events(log)[-1]["error"].startswith("SpecMismatch: ")


def test_a_default_place_that_cannot_be_written_fails_nothing(words: list, tmp_path: Path, state: Path):
    state.write_text("a file where the folder should be")
    done = call("build", tmp_path / "ds", *words)
    assert done.exit_code == 0, done.output
    assert "log:" not in done.stderr
    assert ac.verify(tmp_path / "ds").ok


@pytest.mark.parametrize("place", ["{file}/log.jsonl", "{folder}", "/proc/actcache/log.jsonl"])
def test_an_asked_place_that_cannot_be_written_is_told_before_anything_is_done(words: list, tmp_path: Path, place: str):
    (tmp_path / "file").write_text("")
    log = place.format(file=tmp_path / "file", folder=tmp_path)
    done = call("build", tmp_path / "ds", *words, "--log", log)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"actcache: error: --log {log}: cannot be written: ")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "ds").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
class TestAFullDisk:
    def test_an_asked_log_is_told_on_one_line(self, words: list, tmp_path: Path):
        done = call("build", tmp_path / "ds", *words, "--log", "/dev/full")
        assert done.exit_code in (1, 2)
        assert "unexpected" not in done.stderr
        assert "--log /dev/full: cannot be written: No space left on device" in done.stderr.splitlines()[-1]

    def test_a_default_log_is_given_up(self, words: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        from actcache.clients.cli import build_log

        monkeypatch.setattr(build_log, "_default", lambda _: Path("/dev/full"))
        done = call("build", tmp_path / "ds", *words)
        assert done.exit_code == 0, done.output
        assert ac.verify(tmp_path / "ds").ok


def test_a_url_that_is_no_text_is_logged_all_the_same(model: Path, corpus: str, tmp_path: Path):
    """A folder's name may hold any bytes."""
    url, log = Path(os.fsdecode(os.fsencode(tmp_path) + b"/ds-\xff\n")), tmp_path / "log.jsonl"
    try:
        url.mkdir()
    except OSError:
        pytest.skip("this file system takes text alone")
    with reporter(BuildLog(str(url), str(log))) as show:
        ac.build(ac.Spec(model=str(model), corpus=(corpus,)), url, reporter=show)
    found = events(log)
    assert of_kind(found, "build")[0]["url"] == str(url)
    assert found[-1]["event"] == "sealed"


class Web(SimpleHTTPRequestHandler):
    """A web server that says nothing."""

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        if not self._refuses():
            super().do_HEAD()

    def do_GET(self) -> None:
        if not self._refuses():
            super().do_GET()

    def _refuses(self) -> bool:
        status = self.path[1:4]
        if status.isdigit():
            self.send_error(int(status))
        return status.isdigit()

    def end_headers(self) -> None:
        self.send_header("ETag", '"one"')
        super().end_headers()


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1", prepend=",")
    (tmp_path / "web").mkdir()
    (tmp_path / "web/a.txt").write_text("a text of some length " * 20)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Web, directory=str(tmp_path / "web")))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("user", ["", f"me:{SECRET}@"], ids=["query", "password"])
@pytest.mark.parametrize("name", ["a.txt", "absent.txt", "401.txt", "403.txt", "500.txt", "*.csv"])
def test_no_secret_of_a_corpus_or_of_the_environment_is_logged(
    web: str, name: str, user: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for variable in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN"):
        monkeypatch.setenv(variable, SECRET)
    log, corpus = tmp_path / "log.jsonl", f"http://{user}{web}/{name}?token={SECRET}"
    done = call("build", tmp_path / "ds", "--model", model, "--corpus", corpus, "--log", log)
    assert (done.exit_code == 0) == (name == "a.txt"), done.output
    assert events(log)[-1]["event"] == ("sealed" if name == "a.txt" else "ended")
    assert SECRET not in log.read_text()
    assert SECRET not in done.output


def test_no_secret_of_s3_is_logged(s3: str, words: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    secrets = {os.environ[name] for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN") if os.environ.get(name)}
    assert secrets
    done = call("build", f"{s3}log", *words, "--log", tmp_path / "log.jsonl")
    assert done.exit_code == 0, done.output
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    refused = call("build", f"{s3}refused", *words, "--log", tmp_path / "refused.jsonl")
    assert refused.exit_code == 1
    assert events(tmp_path / "refused.jsonl")[-1]["event"] == "ended"
    for path in tmp_path.glob("*.jsonl"):
        assert not any(secret in path.read_text() for secret in (*secrets, SECRET))
