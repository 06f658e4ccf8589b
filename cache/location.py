"""Where a dataset is and how to get there, without any secret: this is what travels to other processes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from actcache.schemas.errors import InvalidInput


@dataclass(frozen=True)
class LocalCache:
    """Where what is read of a remote dataset is kept, and how much at most.

    Attributes:
        folder: an absolute path, on whatever machine reads.
        limit: bytes that the folder may hold.
        manifests: keys of the manifests of the root that the dataset was opened with; None before that.
    """

    folder: str
    limit: int
    manifests: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Location:
    """A URL and the public part of how to reach it. Credentials are found anew in each process."""

    scheme: str
    host: str
    path: str
    endpoint_url: str | None = None
    profile: str | None = None
    anonymous: bool = False
    cache: LocalCache | None = None

    @classmethod
    def of(
        cls,
        url: str | Path | Location,
        *,
        endpoint_url: str | None = None,
        profile: str | None = None,
        anonymous: bool = False,
    ) -> Location:
        """Parse a local path, `file://`, `s3://bucket/prefix`, `http(s)://…` or `memory://name`.

        Raises:
            InvalidInput: another scheme, or an S3 URL without a bucket.
        """
        if isinstance(url, Location):
            return url
        text = str(url)
        check_endpoint(endpoint_url)
        if not text:
            raise InvalidInput("an empty URL; give a path, s3://bucket/name or https://…")
        scheme = urlsplit(text).scheme if "://" in text else "file"
        if scheme == "file":
            path = text.removeprefix("file://")
            return cls("file", "", str(Path(path).expanduser().absolute()))
        if scheme not in ("s3", "http", "https", "memory"):
            raise InvalidInput(f"{text}: scheme {scheme!r} is not one of a local path, s3, http, https")
        parts = urlsplit(text)
        if parts.query or parts.fragment:
            raise InvalidInput(f"{text}: a query or fragment has no meaning in a dataset's URL; leave it out")
        if parts.username or parts.password:
            raise InvalidInput(
                f"{scheme}://{parts.hostname}: no user or password in a URL; use a profile or the environment"
            )
        if not parts.netloc:
            raise InvalidInput(f"{text}: no {'bucket' if scheme == 's3' else 'host'} in the URL")
        path = "/".join(piece for piece in parts.path.split("/") if piece)
        if {".", ".."} & set(path.split("/")):
            raise InvalidInput(f"{text}: '.' and '..' have no meaning in a URL")
        if scheme != "s3":
            return cls(scheme, parts.netloc, path)
        return cls("s3", parts.netloc, path, endpoint_url, profile, anonymous)

    @property
    def url(self) -> str:
        """The URL as a user would write it."""
        if self.scheme == "file":
            return self.path
        return f"{self.scheme}://{self.host}" + (f"/{self.path}" if self.path else "")

    @property
    def name(self) -> str:
        """The last piece of the URL."""
        return self.url.rstrip("/").rsplit("/", 1)[-1]

    def child(self, name: str) -> Location:
        """The location of something below this one."""
        return replace(self, path=f"{self.path.rstrip('/')}/{name}" if self.path else name)

    def __str__(self) -> str:
        return self.url


def check_endpoint(endpoint_url: str | None) -> None:
    """Refuse an S3 endpoint that is no URL, or that holds a password, which would travel with every graph.

    Raises:
        InvalidInput: it does.
    """
    if endpoint_url is None:
        return
    parts = urlsplit(endpoint_url)
    if parts.username or parts.password:
        raise InvalidInput(f"endpoint {parts.scheme}://{parts.hostname}: no user or password in a URL; use a profile")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise InvalidInput(f"endpoint {endpoint_url!r}: not a URL such as https://s3.example.org")
