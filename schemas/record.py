"""The base of every stored record: immutable, serialised canonically, tolerant of fields of later minor versions."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from actcache.schemas.canonical import canonical, digest
from actcache.schemas.errors import Corrupt


class Record(BaseModel):
    """A stored record. Fields it does not know are ignored, so that a later minor version stays readable."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    def document(self) -> dict[str, Any]:
        """The record as plain JSON data."""
        return self.model_dump(mode="json")

    def to_bytes(self) -> bytes:
        """The record's canonical JSON."""
        return canonical(self.document())

    def content_hash(self) -> str:
        """The SHA-256 of the record's canonical JSON."""
        return digest(self.document())

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Parse a stored record.

        Raises:
            Corrupt: the bytes are not this record; the message names `where` and the first problem.
        """
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise Corrupt(f"{where}: not a valid {cls.__name__} record: {first_problem(error)}") from error


def first_problem(error: ValidationError) -> str:
    """The first problem of a validation error on one line, with its location and how many more there are."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    place = ".".join(str(part) for part in problems[0]["loc"]) or "the whole"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{place}: {problems[0]['msg'].removeprefix('Value error, ')}{more}"
