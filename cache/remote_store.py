"""Object stores: bytes move through obstore, names through s3fs."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import obstore
import obstore.exceptions as failures
from obstore.store import HTTPStore as ObstoreHttp
from obstore.store import MemoryStore as ObstoreMemory
from obstore.store import S3Store as ObstoreS3

from actcache.cache.credentials import s3_access
from actcache.cache.location import Location
from actcache.cache.store import Store
from actcache.schemas.errors import NotFound, StoreError, Unsupported

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

CLIENT: ClientConfig = {"connect_timeout": timedelta(seconds=10), "timeout": timedelta(minutes=10)}
RETRY: RetryConfig = {"max_retries": 8, "retry_timeout": timedelta(minutes=3)}
PART_BYTES = 8 << 20
GAP_BYTES = 512 << 10
ANY_BYTES = 1 << 62
Found = TypeVar("Found")
_memories: dict[str, ObstoreMemory] = {}


class _NotSupported(StoreError):
    """The server answered, but not what was asked, such as a whole object where a range was."""


class RemoteStore(Store):
    """A store behind obstore. One PUT is atomic and carries `If-None-Match: *`."""

    objects: ObstoreS3 | ObstoreHttp | ObstoreMemory
    part_bytes: int | None = PART_BYTES
    gap_bytes = GAP_BYTES

    def get(self, key: str, limit: int | None = None) -> memoryview:
        """See `Store`."""
        with self._translated(key):
            found = obstore.get(self.objects, key)
            self.check_limit(key, int(found.meta["size"]), limit)
            return memoryview(found.bytes())

    def get_range(self, key: str, start: int, length: int) -> memoryview:
        """See `Store`."""
        if length == 0:
            return memoryview(b"")
        with self._translated(key):
            return memoryview(obstore.get_range(self.objects, key, start=start, length=length))

    def get_end(self, key: str, length: int) -> memoryview:
        """See `Store`."""
        with self._translated(key):
            return memoryview(obstore.get(self.objects, key, options={"range": {"suffix": length}}).bytes())

    def get_tail(self, key: str, length: int) -> tuple[memoryview, int]:
        """See `Store`."""
        with self._translated(key):
            found = obstore.get(self.objects, key, options={"range": {"suffix": length}})
            return memoryview(found.bytes()), int(found.meta["size"])

    def size(self, key: str) -> int:
        """See `Store`."""
        with self._translated(key):
            return int(obstore.head(self.objects, key)["size"])

    def put_new(self, key: str, data: bytes | bytearray | memoryview) -> bool:
        """See `Store`. Never multipart: some servers ignore the condition when a multipart upload completes."""
        with self._translated(key):
            try:
                obstore.put(self.objects, key, data, mode="create", use_multipart=False)
            except (failures.AlreadyExistsError, failures.PreconditionError):
                return False
            return True

    def replace(self, key: str, data: bytes) -> None:
        """See `Store`."""
        with self._translated(key):
            obstore.put(self.objects, key, data, use_multipart=False)

    def delete(self, key: str) -> None:
        """See `Store`."""
        with self._translated(key), suppress(FileNotFoundError):
            obstore.delete(self.objects, key)

    def list(self, prefix: str = "") -> dict[str, int]:
        """See `Store`."""
        with self._translated(prefix):
            pages = obstore.list(self.objects, prefix=prefix or None)
            return {str(entry["path"]): int(entry["size"]) for page in pages for entry in page}

    def children(self, prefix: str) -> tuple[set[str], set[str]]:
        """See `Store`."""
        with self._translated(prefix):
            found = obstore.list_with_delimiter(self.objects, prefix=prefix or None)
            folders = {str(name).rstrip("/").rsplit("/", 1)[-1] for name in found["common_prefixes"]}
            return folders, {str(entry["path"]).rsplit("/", 1)[-1] for entry in found["objects"]}

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        where = self.location.child(key) if key else self.location
        _check_process(where)
        try:
            yield
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise StoreError(f"{where}: there is no bucket {self.location.host!r}") from None
            raise NotFound(f"{where}: no such object") from None
        except (failures.PermissionDeniedError, failures.UnauthenticatedError) as error:
            raise StoreError(
                f"{where}: access refused ({_reason(error)}); check the credentials, then run the same command again"
            ) from None
        except failures.NotSupportedError as error:
            raise _NotSupported(f"{where}: the store failed: {_reason(error)}") from None
        except failures.BaseError as error:
            raise StoreError(f"{where}: the store failed: {_reason(error)}") from None


class S3Store(RemoteStore):
    """A prefix of a bucket."""

    def __init__(self, location: Location) -> None:
        self._access = access = s3_access(location)
        # The endpoint is no secret and travels with the location, to workers that lack this environment.
        self.location = replace(location, endpoint_url=access.endpoint_url)
        options: dict[str, Any] = {"region": access.region}
        client: ClientConfig = {**CLIENT}
        if access.endpoint_url:
            options |= {"endpoint": access.endpoint_url, "virtual_hosted_style_request": False}
            client["allow_http"] = access.endpoint_url.startswith("http://")
        if access.credentials is None:
            options["skip_signature"] = True
        self.objects = ObstoreS3(
            location.host,
            prefix=location.path or None,
            client_options=client,
            retry_config=RETRY,
            credential_provider=access.credentials,  # type: ignore[arg-type]  # a plain dict serves as S3Credential
            **options,
        )

    def children(self, prefix: str) -> tuple[set[str], set[str]]:
        """See `Store`."""
        base = "/".join(part for part in (self.location.host, self.location.path) if part)
        try:
            found = self.names.ls(f"{base}/{prefix}".rstrip("/"), detail=True)
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error.__cause__):
                raise StoreError(f"{self.location}: there is no bucket {self.location.host!r}") from None
            return set(), set()
        except Exception as error:  # s3fs lets botocore's and aiohttp's own through
            raise StoreError(f"{self.location}: cannot be listed: {_reason(error)}") from None
        names = [(str(entry["name"]).rstrip("/").rsplit("/", 1)[-1], entry["type"]) for entry in found]
        return {name for name, kind in names if kind == "directory"}, {
            name for name, kind in names if kind != "directory"
        }

    @cached_property
    def names(self) -> Any:
        """The s3fs file system of this location. It finds, and renews, credentials as botocore does."""
        import s3fs

        return s3fs.S3FileSystem(
            anon=self.location.anonymous,
            profile=self.location.profile,
            endpoint_url=self._access.endpoint_url,
            client_kwargs={"region_name": self._access.region},
            use_listings_cache=False,
            skip_instance_cache=True,
        )


class HttpStore(RemoteStore):
    """A dataset behind a plain web server: read-only, without listings.

    Where the server turns out to know no ranges, whole objects are fetched and cut, and readers are told to ask for those.
    """

    _has_ranges = True

    def __init__(self, location: Location) -> None:
        self.location = location
        client: ClientConfig = {**CLIENT, "allow_http": location.scheme == "http"}
        self.objects = ObstoreHttp.from_url(location.url, client_options=client, retry_config=RETRY)

    def get_range(self, key: str, start: int, length: int) -> memoryview:
        """See `Store`."""
        if length == 0:
            return memoryview(b"")
        found = self._if_ranges(super().get_range, key, start, length)
        return self.get(key)[start : start + length] if found is None else found

    def get_end(self, key: str, length: int) -> memoryview:
        """See `Store`."""
        found = self._if_ranges(super().get_end, key, length)
        return _end(self.get(key), length) if found is None else found

    def get_tail(self, key: str, length: int) -> tuple[memoryview, int]:
        """See `Store`."""
        found = self._if_ranges(super().get_tail, key, length)
        if found is None:
            whole = self.get(key)
            return _end(whole, length), len(whole)
        return found

    def _if_ranges(self, ask: Callable[..., Found], *asked: Any) -> Found | None:
        """What a request for a range gives, or None from a server that knows none."""
        if self._has_ranges:
            try:
                return ask(*asked)
            except _NotSupported:
                self._has_ranges = False
                self.part_bytes, self.gap_bytes = None, ANY_BYTES
        return None

    def put_new(self, key: str, data: bytes | bytearray | memoryview) -> bool:
        """Raises `Unsupported`: HTTP is read-only."""
        raise Unsupported(f"{self.location}: http(s) is read-only; write to a local path or s3://")

    def replace(self, key: str, data: bytes) -> None:
        """Raises `Unsupported`: HTTP is read-only."""
        self.put_new(key, data)

    def delete(self, key: str) -> None:
        """Raises `Unsupported`: HTTP is read-only."""
        self.put_new(key, b"")

    def list(self, prefix: str = "") -> dict[str, int]:
        """Raises `Unsupported`: HTTP has no listings."""
        raise Unsupported(f"{self.location}: http(s) has no listings")

    def children(self, prefix: str) -> tuple[set[str], set[str]]:
        """Raises `Unsupported`: HTTP has no listings."""
        raise Unsupported(f"{self.location}: http(s) has no listings")


class MemoryStore(RemoteStore):
    """Objects of this process alone, for tests."""

    def __init__(self, location: Location) -> None:
        self.location = location
        self.objects = _memories.setdefault(location.url, ObstoreMemory())


class _Connections:
    """Whether this process has opened connections, or is a fork of one that had: those of obstore then never answer."""

    opened = False
    lost = False

    @classmethod
    def forked(cls) -> None:
        """Note, in the child, that there was a fork."""
        cls.lost = cls.opened


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_Connections.forked)


def _check_process(where: Location) -> None:
    if _Connections.lost:
        raise StoreError(
            f"{where}: this process was forked from one that had opened connections, which do not work here; start workers "
            "by 'spawn' or 'forkserver' (DataLoader(…, multiprocessing_context='forkserver'))"
        )
    _Connections.opened = True


def _end(data: memoryview, length: int) -> memoryview:
    return data[max(0, len(data) - length) :]


def _reason(error: BaseException) -> str:
    """The cause of a failure on one line: an S3 error's code and message, else the first line."""
    text = str(error)
    if text in ("", "None"):
        text = str(error.__cause__ or type(error).__name__)
    code = re.search(r"<Code>(.*?)</Code>", text)
    message = re.search(r"<Message>(.*?)</Message>", text)
    if code:
        return code.group(1) + (f": {message.group(1)}" if message and message.group(1) else "")
    return " ".join(text.split("\n")[0].split())[:300]
