"""A hub on this machine: one dataset at one commit, served as the Hugging Face hub serves it."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(BaseHTTPRequestHandler):
    """Answers what the hub's clients ask of a dataset `org/name`."""

    protocol_version = "HTTP/1.1"
    commit: str
    files: dict[str, bytes]
    requests: list[str]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.requests.append(f"{self.command} {path}")
        tree = re.fullmatch(r"/api/datasets/org/name/tree/[^/]+(?:/(.*))?", path)
        file = re.fullmatch(r"/datasets/org/name/resolve/[^/]+/(.*)", path)
        if re.fullmatch(rf"/api/datasets/org/name(/revision/(main|{self.commit}))?", path):
            names = [{"rfilename": name} for name in self.files]
            self._json({"id": "org/name", "sha": self.commit, "private": False, "tags": [], "siblings": names})
        elif tree:
            self._json(self._tree(tree[1] or ""))
        elif file and file[1] in self.files:
            self._file(self.files[file[1]])
        else:
            self._json({"error": "not found"}, 404)

    def _tree(self, folder: str) -> list[dict[str, object]]:
        found: dict[str, dict[str, object]] = {}
        for name, data in self.files.items():
            if name.startswith(f"{folder}/" if folder else ""):
                rest = name[len(folder) + 1 if folder else 0 :]
                path = name[: len(name) - len(rest)] + rest.split("/")[0]
                oid = hashlib.sha1(data).hexdigest()
                kind = "directory" if "/" in rest else "file"
                found[path] = {"type": kind, "oid": oid, "size": len(data) if kind == "file" else 0, "path": path}
        return list(found.values())

    def _file(self, data: bytes) -> None:
        whole, status, wanted = len(data), 200, self.headers.get("Range")
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            end = min(int(last) + 1 if last else whole, whole)
            data, status = data[int(first) : end], 206
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{whole}"
        self._answer(status, data, headers)

    def _json(self, document: object, status: int = 200) -> None:
        headers = {"Content-Type": "application/json"} | ({"X-Error-Code": "EntryNotFound"} if status == 404 else {})
        self._answer(status, json.dumps(document).encode(), headers)

    def _answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data)), "X-Repo-Commit": self.commit}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def serving(commit: str, files: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """The URL of a hub that has these files, and the requests that it got."""
    requests: list[str] = []
    handler = type("OneHub", (Hub,), {"commit": commit, "files": files, "requests": requests})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
