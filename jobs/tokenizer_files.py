"""What of a model's tokenizer travels in a dataset: its files, and its backend where they alone would not do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from actcache.jobs.checkpoint import tokenizer_paths
from actcache.schemas.errors import InvalidInput
from actcache.schemas.tokenizer import BACKEND_JSON, MAX_FILE_BYTES, TOKENIZER_JSON


def tokenizer_files(folder: Path, tokenizer: Any) -> dict[str, bytes]:
    """The files to store of a tokenizer that was loaded from a folder, by name; none where one is too large for readers.

    A fast tokenizer decodes with a backend. Where there is no `tokenizer.json`, or its text of some ids is another since
    transformers changed or added to what it says, the backend is among them too.

    Raises:
        InvalidInput: a file cannot be read.
    """
    try:
        files = {path.name: path.read_bytes() for path in tokenizer_paths(folder)}
    except OSError as error:
        raise InvalidInput(f"{error.filename}: cannot be read: {error.strerror}") from None
    if getattr(tokenizer, "is_fast", False):
        backend = tokenizer.backend_tokenizer
        if TOKENIZER_JSON not in files:
            files[TOKENIZER_JSON] = _serialised(backend)
        elif _decodes_otherwise(files[TOKENIZER_JSON], backend):
            files[BACKEND_JSON] = _serialised(backend)
    if any(len(data) > MAX_FILE_BYTES for data in files.values()):
        return {}
    return dict(sorted(files.items()))


def _serialised(backend: Any) -> bytes:
    """A backend as JSON, without what its last call was asked to cut or to fill."""
    document = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def _decodes_otherwise(data: bytes, backend: Any) -> bool:
    from tokenizers import Tokenizer

    try:
        alone = Tokenizer.from_str(data.decode())
    except Exception:  # of an older or a newer format, which transformers takes apart itself
        return True
    return _decoding(alone) != _decoding(backend)


def _decoding(tokenizer: Any) -> tuple[Any, ...]:
    """All that the text of ids depends on."""
    added = {index: token.content for index, token in tokenizer.get_added_tokens_decoder().items()}
    decoder = tokenizer.decoder
    return tokenizer.get_vocab(), added, None if decoder is None else decoder.__getstate__()
