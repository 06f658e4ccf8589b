"""A web server that knows no ranges: it is read by whole objects, each of which is asked for about once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import actcache as ac
from actcache.cache.remote_store import PART_BYTES
from actcache.cache.store import open_store


class Handler(SimpleHTTPRequestHandler):
    """Python's own, which counts what is asked."""

    asked: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        self.asked.append((self.path.lstrip("/"), self.headers["Range"]))
        super().do_GET()

    def log_message(self, *args) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up, as one does that did not ask for a whole object, is no news."""


@pytest.fixture
def served(built: str) -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """The URL of a dataset, and what is asked of its server."""
    handler = type("Counting", (Handler,), {"asked": []})
    with Server(("127.0.0.1", 0), partial(handler, directory=str(Path(built).parent))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/{Path(built).name}", handler.asked
        finally:
            server.shutdown()
            thread.join()


def test_every_read_is_right_and_a_site_takes_a_request_a_shard(served, built: str):
    url, asked = served
    ds, local = ac.open(url), ac.open(built)
    site, other = local.sites[1], local.sites[2]
    rows = [5, 700, 3, 3]
    assert np.array_equal(ds[site][10:20].compute(), local[site][10:20].compute())
    assert np.array_equal(ds.at(rows)[site].compute(), local.at(rows)[site].compute())
    asked.clear()
    assert np.array_equal(ds.rows(other, 0, ds.n_tokens), local.rows(other, 0, ds.n_tokens))
    shards = len(local[other].chunks[0])
    assert shards > 2, "this test could not fail"
    assert len(asked) == len(set(asked)) == shards
    assert {part for _, part in asked} == {None}
    for mine, theirs in zip(ds.batches("resid", 100, shuffle=1), local.batches("resid", 100, shuffle=1), strict=True):
        assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)
    for name in local.tokens:
        assert np.array_equal(ds.tokens[name], local.tokens[name])
    assert np.array_equal(ds[other].compute(), local[other].compute())


def test_a_site_that_is_read_first_takes_few_requests_more(served, built: str):
    url, asked = served
    ds, local = ac.open(url), ac.open(built)
    site = local.sites[1]
    asked.clear()
    assert np.array_equal(ds.rows(site, 0, ds.n_tokens), local.rows(site, 0, ds.n_tokens))
    shards = len(local[site].chunks[0])
    assert shards <= len([key for key, part in asked if part is None]) <= 2 * shards


def test_the_store_cuts(served, built: str):
    url, asked = served
    store, local = open_store(url), open_store(built)
    key = "zarr.json"
    assert store.part_bytes == PART_BYTES
    for _ in range(2):
        assert bytes(store.get_range(key, 5, 20)) == bytes(local.get_range(key, 5, 20))
        assert bytes(store.get_end(key, 7)) == bytes(local.get_end(key, 7))
        tail, size = store.get_tail(key, 9)
        assert (bytes(tail), size) == (bytes(local.get_end(key, 9)), local.size(key))
        assert bytes(store.get_end(key, 1 << 30)) == bytes(local.get(key))
        assert bytes(store.get_range(key, 2, 0)) == b""
        assert store.part_bytes is None
    assert [part for _, part in asked if part] == ["bytes=5-24"], "asked once"
    with pytest.raises(ac.NotFound):
        store.get_end("absent", 5)


def test_the_local_cache_reads_it(served, built: str, tmp_path: Path):
    url, asked = served
    ds, local = ac.open(url, local_cache=tmp_path / "cache"), ac.open(built)
    site = local.sites[1]
    for _ in range(2):
        assert np.array_equal(ds[site][10:20].compute(), local[site][10:20].compute())
        assert np.array_equal(ds[site].compute(), local[site].compute())
    asked.clear()
    assert np.array_equal(ds[site].compute(), local[site].compute())
    assert asked == []
