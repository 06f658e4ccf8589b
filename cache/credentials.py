"""S3 credentials, region and endpoint, resolved once the way botocore does, for obstore and s3fs alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from actcache.cache.location import Location, check_endpoint
from actcache.schemas.errors import InvalidInput, StoreError

REFRESH_AFTER = timedelta(minutes=4)


@dataclass(frozen=True)
class S3Access:
    """How to reach S3. `credentials` is None for anonymous access; it never leaves the process."""

    region: str
    endpoint_url: str | None
    credentials: Callable[[], dict[str, Any]] | None


def s3_access(location: Location) -> S3Access:
    """Resolve profile, environment and configuration files.

    Raises:
        StoreError: the profile does not exist, or no credentials are found and the access is not anonymous.
    """
    import botocore.exceptions
    import botocore.session

    try:
        session = botocore.session.Session(profile=location.profile)
        session.get_scoped_config()
    except botocore.exceptions.ProfileNotFound as error:
        raise StoreError(f"{location}: {error}") from None
    check_endpoint(location.endpoint_url)
    try:
        client = session.create_client("s3", endpoint_url=location.endpoint_url, region_name=_region(session))
    except ValueError as error:
        raise InvalidInput(f"{location}: {error}") from None
    endpoint = str(client.meta.endpoint_url)
    region = client.meta.region_name
    check_endpoint(endpoint)
    custom = None if endpoint.rstrip("/").endswith(("amazonaws.com", "amazonaws.com.cn")) else endpoint
    if location.anonymous:
        return S3Access(region, custom, None)
    found = session.get_credentials()
    if found is None:
        raise StoreError(
            f"{location}: no S3 credentials in the environment, the profile or the configuration; "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, give --profile, or --anonymous for a public bucket"
        )

    def credentials() -> dict[str, Any]:
        frozen = found.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + REFRESH_AFTER,
        }

    return S3Access(region, custom, credentials)


def _region(session: Any) -> str:
    return session.get_config_variable("region") or "us-east-1"
