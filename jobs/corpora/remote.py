"""Files behind S3 or HTTP: read through fsspec, identified by what the server says of them, so that they move once."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, cast
from urllib.parse import urlsplit

from actcache.cache.credentials import s3_access
from actcache.cache.location import Location
from actcache.jobs.corpora.files import changed
from actcache.jobs.corpora.streams import PORTION, stream
from actcache.schemas.errors import ActcacheError, InvalidInput, StoreError
from actcache.schemas.plan import Source

BLOCK = 8 << 20
CONNECT_SECONDS, READ_SECONDS = 10, 120


@dataclass(frozen=True)
class Access:
    """How to reach a corpus on S3, beside what the environment says. Nothing secret."""

    endpoint_url: str | None = None
    profile: str | None = None
    anonymous: bool = False


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a server. `url` may hold a signature, so that no message or record has its query."""

    url: str
    source: Source
    system: Any

    @property
    def where(self) -> str:
        """See `CorpusFile`."""
        return without_query(self.url)

    def read(self) -> bytes:
        """See `CorpusFile`."""
        with self.open() as opened:
            return opened.read()

    def open(self, *, seekable: bool = False) -> IO[bytes]:
        """See `CorpusFile`.

        Raises:
            StoreError: the server refuses or fails.
        """
        if seekable:
            with _translated(self.where):
                opened = self.system.open(self.url, "rb", block_size=BLOCK)
            if type(opened).__name__ == "HTTPStreamFile":  # it calls itself seekable, too
                opened.close()
                raise InvalidInput(f"{self.where}: the server gives no ranges of it; download the file first")
            return cast("IO[bytes]", _Seekable(opened, self.where))
        return stream(self._portions())

    def check_unchanged(self) -> None:
        """See `CorpusFile`."""
        with _translated(self.where):
            self.system.invalidate_cache()
            info = self.system.info(self.url)
        if (_size(info), _validator(info, self.where)) != (self.source.bytes, self.source.validator):
            raise changed(self.where)

    def _portions(self) -> Iterator[bytes]:
        web = urlsplit(self.url).scheme in ("http", "https")
        size = 0
        with _translated(self.where):
            # Over HTTP one request for all of it: not every server gives ranges.
            opened = self.system.open(self.url, "rb", **({"block_size": 0} if web else {"block_size": BLOCK}))
        with opened:
            while True:
                with _translated(self.where):
                    data = opened.read(PORTION)
                if not data:
                    break
                size += len(data)
                yield bytes(data)
        if self.source.bytes is not None and size != self.source.bytes:
            raise StoreError(
                f"{self.where}: ended after {size} of {self.source.bytes} bytes; run the same command again"
            )


class _Seekable(io.RawIOBase):
    """A remote file read out of order, its errors in the words of this package."""

    def __init__(self, opened: Any, where: str) -> None:
        self._opened, self._where = opened, where

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._opened.seek(offset, whence))

    def tell(self) -> int:
        return int(self._opened.tell())

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        with _translated(self._where):
            data = self._opened.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._opened.close()
        super().close()


def remote_files(pattern: str, access: Access) -> list[RemoteFile]:
    """The file of a URL, or those that match it as a glob, by name.

    Raises:
        InvalidInput: there is none, or the server says nothing that identifies it.
        StoreError: the server refuses or fails.
    """
    scheme, shown = urlsplit(pattern).scheme, without_query(pattern)
    system = _s3(pattern, access) if scheme == "s3" else _web()
    magic = "*" in pattern if scheme != "s3" else any(character in pattern for character in "*?[")
    with _translated(shown):
        if magic:
            infos: dict[str, Any] = system.glob(pattern, detail=True)
        else:
            infos = {pattern: system.info(pattern)}
            if infos[pattern].get("type") == "directory":
                raise InvalidInput(f"{shown}: a folder; give a glob such as '{shown.rstrip('/')}/**/*.jsonl'")
    files = []
    for found in sorted(name for name, info in infos.items() if info.get("type") != "directory"):
        url = found if "://" in found else f"{scheme}://{found}"
        info = infos[found]
        if scheme != "s3" and magic:  # a listing of web pages says nothing of the files
            with _translated(without_query(url)):
                info = system.info(url)
        name = _name(without_query(url), shown if magic else None)
        source = Source(name=name, bytes=_size(info), validator=_validator(info, without_query(url)))
        files.append(RemoteFile(url, source, system))
    if not files:
        raise InvalidInput(f"{shown}: no such file, and no file matches it as a glob")
    return files


def without_query(url: str) -> str:
    """A URL as it may be shown: signatures stand in the query, and a password may stand before the host."""
    return re.sub(r"//[^/@]*@", "//", url.split("?", 1)[0]) if url.startswith(("http://", "https://")) else url


def _name(url: str, pattern: str | None) -> str:
    """The last piece of a URL, or what follows the fixed part of the pattern that found it."""
    if pattern is None:
        return url.rstrip("/").rsplit("/", 1)[-1]
    fixed = re.split(r"[*?\[]", pattern, maxsplit=1)[0].rsplit("/", 1)[0] + "/"
    return url.removeprefix(fixed)


def _size(info: dict[str, Any]) -> int | None:
    size = info.get("size", info.get("Size"))
    return None if size is None else int(size)


def _validator(info: dict[str, Any], where: str) -> str:
    for name, prefix in (("ETag", "etag"), ("Last-Modified", "last-modified")):
        if info.get(name):
            return f"{prefix}:{info[name]}".replace('"', "")
    raise InvalidInput(
        f"{where}: the server gives neither ETag nor Last-Modified, so nothing says whether the file changes; "
        "download it first"
    )


def _s3(url: str, access: Access) -> Any:
    import s3fs

    bucket = urlsplit(url).netloc
    if not bucket:
        raise InvalidInput(f"{url}: no bucket in the URL")
    try:
        found = s3_access(Location("s3", bucket, "", access.endpoint_url, access.profile, access.anonymous))
    except StoreError as error:
        raise StoreError(str(error).replace("--anonymous", "--corpus-anonymous")) from None
    return s3fs.S3FileSystem(
        anon=access.anonymous,
        profile=access.profile,
        endpoint_url=found.endpoint_url,
        client_kwargs={"region_name": found.region},
        use_listings_cache=False,
        skip_instance_cache=True,
    )


def _web() -> Any:
    import aiohttp
    from fsspec.implementations.http import HTTPFileSystem

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
    return HTTPFileSystem(client_kwargs={"trust_env": True, "timeout": timeout}, skip_instance_cache=True)


@contextmanager
def _translated(where: str) -> Iterator[None]:
    try:
        yield
    except ActcacheError:
        raise
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error.__cause__):
            raise StoreError(f"{where}: there is no such bucket") from None
        cause = error.__cause__
        said = f" ({_shown(str(cause))[:200]})" if cause is not None and not str(cause).startswith("An") else ""
        raise InvalidInput(f"{where}: no such file{said}") from None
    except PermissionError as error:
        raise StoreError(f"{where}: access refused ({_first(error)}); check the credentials") from None
    except Exception as error:  # fsspec lets whatever botocore and aiohttp raise through
        raise StoreError(f"{where}: cannot be read: {_first(error)}; run the same command again") from None


def _first(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return _shown(text.splitlines()[0])[:300]


def _shown(text: str) -> str:
    """The words of a library's error on one line, each URL in them as it may be shown."""
    return re.sub(r"https?://[^\s'\"()]+", lambda found: without_query(found[0]), " ".join(text.split()))
