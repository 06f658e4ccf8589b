"""Receipts: the small records that a piece of work is done."""

from __future__ import annotations

from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from actcache.schemas.plan import RECORDS, StoredObject
from actcache.schemas.quantised import BlockDamage
from actcache.schemas.record import Record

RECEIPTS = f"{RECORDS}receipts/"
HEAD_RECEIPT = RECEIPTS + "head.json"


class Receipt(Record):
    """A block is done: every object named here is stored whole.

    `mixed_attempts` names the objects that an earlier attempt wrote with other values than this one computed. `quantised` has
    what quantising did to each quantised array, against the values that this attempt computed.
    """

    block: int
    start: int
    stop: int
    objects: tuple[StoredObject, ...]
    mixed_attempts: tuple[str, ...] = ()
    quantised: dict[str, BlockDamage] = Field(default_factory=dict)

    @model_serializer(mode="wrap")
    def _as_before(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without an empty `quantised`, so that a block of exact arrays has the receipt it always had."""
        document: dict[str, Any] = serialise(self)
        return {name: value for name, value in document.items() if name != "quantised" or value}


class HeadReceipt(Record):
    """The head's arrays are stored. `arrays` are their names below `head/` and `operations` what to do with them."""

    arrays: dict[str, HeadArray]
    operations: tuple[dict[str, str | float], ...]
    objects: tuple[StoredObject, ...]


class HeadArray(Record):
    """Shape and stored dtype of one array of the head."""

    shape: tuple[int, ...]
    dtype: str


HeadReceipt.model_rebuild()


def receipts_of(records: str) -> str:
    """Folder of a build's receipts."""
    return f"{records}receipts/"


def receipt_key(block: int, records: str = RECORDS) -> str:
    """Key of a block's receipt."""
    return f"{receipts_of(records)}{block:06d}.json"


def statistics_key(block: int, records: str = RECORDS) -> str:
    """Key of a block's statistics while building: per site the mean, then the sum of squared deviations, float64."""
    return f"{records}statistics/{block:06d}.f64"
