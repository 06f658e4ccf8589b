"""The published JSON Schemas, made from the models: `python -m actcache.schemas.publish FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pydantic import BaseModel

from actcache.schemas.plan import FORMAT, Plan, StoredObject, TokensRecord
from actcache.schemas.receipt import HeadReceipt, Receipt
from actcache.schemas.root import RootAttributes
from actcache.schemas.spec import Spec

PUBLISHED: dict[str, type[BaseModel]] = {
    "spec": Spec,
    "plan": Plan,
    "tokens": TokensRecord,
    "receipt": Receipt,
    "head-receipt": HeadReceipt,
    "manifest-line": StoredObject,
    "root-attributes": RootAttributes,
}


def schemas() -> dict[str, str]:
    """Every schema by its file's name, as indented JSON."""
    found = {}
    for name, model in PUBLISHED.items():
        schema = model.model_json_schema()
        schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$comment": f"actcache {FORMAT}", **schema}
        found[f"{name}.schema.json"] = json.dumps(schema, indent=2, sort_keys=True) + "\n"
    return found


def main() -> None:
    """Write every schema into a folder."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in schemas().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
