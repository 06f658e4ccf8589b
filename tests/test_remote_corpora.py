"""Corpora behind S3 and HTTP: read once, identified by what the server says, and refused when they change."""

from __future__ import annotations

import email.utils
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

import actcache as ac
from actcache.jobs.corpora.corpus import open_corpus
from actcache.jobs.corpora.document import Document
from actcache.jobs.resolve import resolve

ROWS = [f"row {i} " * 50 for i in range(200)]


def texts(*urls: str, **fields: Any) -> list[tuple[int, int, str]]:
    corpus = open_corpus(ac.Spec(model="m", corpus=urls, **fields))
    return [(d.source, d.row, str(d.content)) for d in corpus.documents() if isinstance(d, Document)]


def files(folder: Path) -> dict[str, Path]:
    """The rows as files of several kinds."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": row}) + "\n" for row in ROWS).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(lines))
    pyarrow.parquet.write_table(pyarrow.table({"text": ROWS}), folder / "c.parquet", row_group_size=50)
    (folder / "d.txt").write_text(ROWS[0])
    return {path.name: path for path in folder.iterdir()}


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder. `validators` says which headers identify a file; `ranges` whether parts are given."""

    validators = ("ETag", "Last-Modified")
    ranges = True
    requests: list[str]

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.requests.append(f"GET {self.path}")
        self._send(body=True)

    def do_HEAD(self) -> None:
        self._send(body=False)

    def _send(self, body: bool) -> None:
        path = Path(self.translate_path(self.path))
        if path.is_dir():
            names = "".join(f'<a href="{entry.name}">{entry.name}</a>' for entry in sorted(path.iterdir()))
            data, status = names.encode(), 200
        elif not path.is_file():
            return self.send_error(404)
        else:
            data, status = path.read_bytes(), 200
        whole, wanted = len(data), self.headers.get("Range")
        if wanted and self.ranges:
            first, last = wanted.removeprefix("bytes=").split("-")
            end = min(int(last) + 1 if last else whole, whole)
            data, status = data[int(first) : end], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes" if self.ranges else "none")
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{end - 1}/{whole}")
        if path.is_file() and "ETag" in self.validators:
            self.send_header("ETag", f'"{path.stat().st_mtime_ns:x}-{whole:x}"')
        if path.is_file() and "Last-Modified" in self.validators:
            self.send_header("Last-Modified", email.utils.formatdate(path.stat().st_mtime, usegmt=True))
        self.end_headers()
        if body:
            self.wfile.write(data)
        return None


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path, type[Handler]]]:
    """A web server on this machine: its URL, its folder, and its handler."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1", prepend=",")
    folder = tmp_path / "web"
    files(folder)
    handler = type("Own", (Handler,), {"requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", folder, handler
    server.shutdown()
    server.server_close()
    thread.join()


EXPECTED = [(0, i, row) for i, row in enumerate(ROWS)]


def test_files_behind_http(web: tuple[str, Path, type[Handler]]):
    url, _, handler = web
    for name in ("a.jsonl", "b.jsonl.zst", "c.parquet"):
        assert texts(f"{url}/{name}") == EXPECTED, name
    assert texts(f"{url}/d.txt") == [(0, 0, ROWS[0])]
    assert handler.requests.count("GET /a.jsonl") == 1  # identified without being fetched, fetched once
    both = texts(f"{url}/*.jsonl*")
    assert both == [*EXPECTED, *((1, i, row) for i, row in enumerate(ROWS))]


def test_a_server_without_ranges(web: tuple[str, Path, type[Handler]]):
    url, _, handler = web
    handler.ranges = False
    assert texts(f"{url}/a.jsonl") == EXPECTED
    with pytest.raises(ac.ActcacheError, match=r"c\.parquet: .*download the file first"):
        texts(f"{url}/c.parquet")


def test_what_identifies_a_file_behind_http(web: tuple[str, Path, type[Handler]], monkeypatch: pytest.MonkeyPatch):
    url, folder, handler = web
    spec = ac.Spec(model="m", corpus=(f"{url}/a.jsonl?signature=secret",))
    corpus = open_corpus(spec)
    (source,) = corpus.sources
    assert (source.name, source.sha256, source.bytes) == ("a.jsonl", None, (folder / "a.jsonl").stat().st_size)
    assert str(source.validator).startswith("etag:")
    assert "secret" not in str(corpus.parts[0].where) + source.model_dump_json()
    monkeypatch.setattr(handler, "validators", ("Last-Modified",))
    other = open_corpus(spec)
    assert str(other.sources[0].validator).startswith("last-modified:")
    assert other.identity() != corpus.identity()
    monkeypatch.setattr(handler, "validators", ())
    with pytest.raises(ac.InvalidInput, match="neither ETag nor Last-Modified"):
        open_corpus(spec)


def test_a_file_behind_http_that_changes_is_refused(web: tuple[str, Path, type[Handler]]):
    url, folder, _ = web
    rows = open_corpus(ac.Spec(model="m", corpus=(f"{url}/a.jsonl",))).documents()
    next(rows)
    lines = (folder / "a.jsonl").read_bytes()
    (folder / "a.jsonl").write_bytes(b"x" * len(lines))
    with pytest.raises(ac.InvalidInput, match=r"a\.jsonl: the file changed since the build began"):
        list(rows)


def test_urls_that_lead_nowhere(web: tuple[str, Path, type[Handler]]):
    url, _, _ = web
    for name, says in (("absent.jsonl", "no such file"), ("*.csv", "no file matches it")):
        with pytest.raises(ac.InvalidInput, match=says):
            texts(f"{url}/{name}")
    with pytest.raises(ac.ActcacheError, match=r"127\.0\.0\.1:1/a\.jsonl"):
        texts("http://127.0.0.1:1/a.jsonl")


def test_a_build_from_http_resumes_and_is_labelled_without_secrets(
    web: tuple[str, Path, type[Handler]], model: Path, tmp_path: Path
):
    url, folder, _ = web
    spec = ac.Spec(model=str(model), corpus=(f"{url}/d.txt?token=secret",), max_tokens=64)
    built = ac.build(spec, tmp_path / "ds")
    assert ac.build(spec, tmp_path / "ds").state == "already sealed"
    assert built.n_tokens == 64
    for path in (tmp_path / "ds").rglob("*.json"):
        assert "secret" not in path.read_text()
    (folder / "d.txt").write_text("other")
    with pytest.raises(ac.SpecMismatch, match=r"corpus\.content"):
        ac.build(spec, tmp_path / "ds")


def test_files_on_s3(s3: str, tmp_path: Path):
    import s3fs

    system = s3fs.S3FileSystem(skip_instance_cache=True)
    for name, path in files(tmp_path / "local").items():
        system.put_file(str(path), f"{s3}deep/{name}")
    for name in ("a.jsonl", "b.jsonl.zst", "c.parquet"):
        assert texts(f"{s3}deep/{name}") == EXPECTED, name
    corpus = open_corpus(ac.Spec(model="m", corpus=(f"{s3}**/*.jsonl*",)))
    assert [source.name for source in corpus.sources] == ["deep/a.jsonl", "deep/b.jsonl.zst"]
    assert all(str(source.validator).startswith("etag:") and source.sha256 is None for source in corpus.sources)
    alone = open_corpus(ac.Spec(model="m", corpus=(f"{s3}deep/a.jsonl",)))
    assert alone.sources[0].validator == corpus.sources[0].validator
    rows = corpus.documents()
    next(rows)
    system.pipe_file(f"{s3}deep/a.jsonl", b"{}")
    with pytest.raises(ac.InvalidInput, match=r"deep/a\.jsonl: the file changed"):
        list(rows)
    for pattern, says in (
        ("deep/absent.txt", "no such file"),
        ("*.csv", "no file matches"),
        ("deep", "a folder; give"),
    ):
        with pytest.raises(ac.InvalidInput, match=says):
            texts(f"{s3}{pattern}")
    with pytest.raises(ac.StoreError, match="no such bucket"):
        texts("s3://there-is-no-such-bucket-here/a.jsonl")


def test_a_build_from_s3_to_s3(s3: str, model: Path, tmp_path: Path):
    import s3fs

    s3fs.S3FileSystem(skip_instance_cache=True).pipe_file(f"{s3}in/a.jsonl", b'{"text": "hello"}\n' * 40)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "hello"}\n' * 40)
    spec = ac.Spec(model=str(model), corpus=(f"{s3}in/*.jsonl",))
    ac.build(spec, f"{s3}out")
    local = ac.Spec(model=str(model), corpus=(str(tmp_path / "a.jsonl"),))
    ac.build(local, tmp_path / "out")
    one, other = ac.open(f"{s3}out"), ac.open(tmp_path / "out")
    assert one.tokens["token_id"].tolist() == other.tokens["token_id"].tolist()
    assert one.key != other.key  # an ETag is not a SHA-256


def test_s3_without_credentials_says_what_to_do(monkeypatch: pytest.MonkeyPatch, model: Path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (
        ("AWS_CONFIG_FILE", "/dev/null"), ("AWS_SHARED_CREDENTIALS_FILE", "/dev/null"), ("AWS_EC2_METADATA_DISABLED", "true"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    with pytest.raises(ac.StoreError, match=r"no S3 credentials .* or --corpus-anonymous for a public bucket"):
        resolve(ac.Spec(model=str(model), corpus=("s3://bucket/a.jsonl",)))
