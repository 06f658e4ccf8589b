"""The root's `zarr.json` as bytes: written by the seal, read, and mistrusted, by everybody else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError

from actcache.schemas.array import ArrayLayout, check_name
from actcache.schemas.canonical import canonical, digest
from actcache.schemas.consistency import inconsistency
from actcache.schemas.errors import Corrupt, Unsupported
from actcache.schemas.plan import FORMAT
from actcache.schemas.record import first_problem
from actcache.schemas.root import MAX_ROOT_BYTES, RootAttributes

MAJOR = int(FORMAT.split(".")[0])
ADVICE = "copy it again from where the dataset came"
_OPERATIONS = TypeAdapter(Annotated[tuple[dict[str, str | float], ...], Field(max_length=64)])


def root_bytes(attributes: Mapping[str, Any], members: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The root's bytes: canonical JSON that carries a digest of itself.

    `attributes` is `attributes.actcache` without its digest, `members` the metadata of every array and group below.
    """
    document = _document({**attributes, "digest": ""}, members)
    return canonical(_document({**attributes, "digest": digest(document)}, members))


def _document(attributes: Mapping[str, Any], members: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {"actcache": dict(attributes)},
        "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": dict(members)},
    }


class Root(NamedTuple):
    """A root, read: its attributes, the layout of every array that has a role, and the head's operations."""

    attributes: RootAttributes
    layouts: dict[str, ArrayLayout]
    operations: tuple[dict[str, str | float], ...]


def parse_root(data: bytes, where: str) -> Root:
    """Read a root, which may be a stranger's.

    Raises:
        Corrupt: the bytes are not JSON, not canonical, or do not match their digest.
        Unsupported: it is no actcache dataset, or one of a newer major version.
    """
    if len(data) > MAX_ROOT_BYTES:
        raise Unsupported(f"{where}: {len(data):,} bytes are more than a root may have ({MAX_ROOT_BYTES:,})")
    try:
        document = json.loads(data)
        is_canonical = canonical(document) == data
    except (ValueError, RecursionError):
        raise Corrupt(f"{where}: not valid JSON; {ADVICE}") from None
    attributes = _attributes(document, where)
    stated = attributes.get("digest")
    attributes["digest"] = ""
    if not is_canonical or digest(document) != stated:
        raise Corrupt(f"{where}: its bytes do not match the digest in it; {ADVICE}")
    attributes["digest"] = stated
    _check_format(attributes, where)
    try:
        root = RootAttributes.model_validate(attributes)
    except ValidationError as error:
        raise Corrupt(f"{where}: {first_problem(error)}") from None
    members = _members(document, where)
    layouts = {}
    for name in root.arrays:
        check_name(name)
        if name not in members:
            raise Corrupt(f"{where}: array {name!r} has a role and no metadata")
        layouts[name] = ArrayLayout.parse(name, members[name])
    if problem := inconsistency(root, layouts):
        raise Corrupt(f"{where}: {problem}")
    return Root(root, layouts, _operations(members.get("head"), where))


def _members(document: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        members = document["consolidated_metadata"]["metadata"]
    except (KeyError, TypeError):
        members = None
    if not isinstance(members, dict):
        raise Corrupt(f"{where}: no consolidated metadata; the dataset was not sealed by actcache")
    return members


def _operations(group: Any, where: str) -> tuple[dict[str, str | float], ...]:
    if group is None:
        return ()
    try:
        return _OPERATIONS.validate_python(group["attributes"]["operations"])
    except (KeyError, TypeError, ValidationError):
        raise Corrupt(f"{where}: the head's operations are not a short list of names and numbers") from None


def _attributes(document: Any, where: str) -> dict[str, Any]:
    attributes = document.get("attributes") if isinstance(document, dict) else None
    own = attributes.get("actcache") if isinstance(attributes, dict) else None
    if not isinstance(own, dict) or not isinstance(own.get("format"), str):
        raise Unsupported(f"{where}: a Zarr group, but no actcache dataset; open it with zarr.open_group")
    return own


def _check_format(attributes: dict[str, Any], where: str) -> None:
    major = attributes["format"].split(".")[0]
    if not major.isdecimal() or len(major) > 3 or int(major) > MAJOR:
        raise Unsupported(
            f"{where}: format {attributes['format'][:20]} is newer than this actcache reads ({FORMAT}); upgrade actcache"
        )
