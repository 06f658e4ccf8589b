"""From token ids to text, with the tokenizer that a dataset carries. No torch and no transformers, and nothing of it is executed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from actcache.schemas.errors import Corrupt, InvalidInput, Unsupported
from actcache.schemas.tokenizer import BACKEND_JSON, TOKENIZER, TOKENIZER_JSON

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_ID = 2**32 - 1
_ONLY_ENCODING = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor")
_BYTE_LEVEL = frozenset(map(chr, [*range(33, 127), *range(161, 173), *range(174, 324)]))
"""The 256 characters that stand for bytes in a byte-level vocabulary (Radford et al. 2019, GPT-2)."""
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
_NO_MODEL = {"type": "WordLevel", "vocab": {}, "unk_token": ""}


class Text:
    """A dataset's tokenizer, as far as it makes text of ids.

    Attributes:
        files: the content of its files by name, as they lay beside the model.
    """

    def __init__(self, files: Mapping[str, bytes], url: str) -> None:
        self.files = dict(files)
        self._url = url

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids (n,), special tokens included.

        It is what `decode(ids, clean_up_tokenization_spaces=False)` of the model's fast tokenizer in transformers gives: an id that
        it does not know adds nothing, and bytes that are no whole character are U+FFFD.

        Raises:
            InvalidInput: they are no ids.
            Unsupported: the package `tokenizers` is missing, or cannot read this tokenizer.
            Corrupt: the tokenizer's file is no such file.
        """
        known, parts = _checked(ids), self._parts
        with _told(parts.where):
            return parts.tokenizer.decode(known, skip_special_tokens=False)

    def strings(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The text of each of some token ids (n,) by itself, to be shown beside it.

        A space with which a token begins is kept, also where a text would not begin with it. A token that is a part of a character
        is U+FFFD, an id that the tokenizer does not know the empty string.

        Raises:
            InvalidInput, Unsupported, Corrupt: as `decode`.
        """
        known, parts = _checked(ids), self._parts
        with _told(parts.where):
            texts = {index: parts.alone(index) for index in set(known)}
        return [texts[index] for index in known]

    def byte_counts(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """How many bytes of UTF-8 each of some token ids (n,) adds to a text in whose midst it stands, (n,) int64.

        A token that is a part of a character counts the bytes of that part, so that the counts of a text's tokens add up to the
        text's own. An id that the tokenizer does not know counts 0.

        Raises:
            InvalidInput, Unsupported, Corrupt: as `decode`.
        """
        known, parts = _checked(ids), self._parts
        with _told(parts.where):
            counts = {index: parts.bytes_of(index) for index in set(known)}
        return np.array([counts[index] for index in known], np.int64)

    def __repr__(self) -> str:
        return f"Text({', '.join(self.files)})"

    @property
    def _name(self) -> str:
        """The file that says how to decode.

        Raises:
            Unsupported: there is none.
        """
        name = next((name for name in (BACKEND_JSON, TOKENIZER_JSON) if name in self.files), None)
        if name is None:
            raise Unsupported(
                f"{self._url}: the tokenizer has no {TOKENIZER_JSON}, only {', '.join(self.files)}; "
                f"load these files, which lie in {TOKENIZER}, with transformers"
            )
        return name

    @cached_property
    def _parts(self) -> _Parts:
        """What decodes. What encoding alone needs of the file is a stranger's too, and is left out."""
        name = self._name
        where = f"{self._url}: {TOKENIZER}{name}"
        try:
            document = json.loads(self.files[name])
        except (ValueError, RecursionError):
            raise Corrupt(f"{where}: not valid JSON") from None
        if not isinstance(document, dict):
            raise Corrupt(f"{where}: no tokenizer")
        document |= dict.fromkeys(_ONLY_ENCODING)
        whole = _made(document, where)
        document |= {"added_tokens": [], "model": _NO_MODEL, "decoder": _keeping_spaces(document.get("decoder"))}
        return _Parts(whole, _made(document, where).decoder, where, _steps(document["decoder"]))


class _Parts(NamedTuple):
    """A tokenizer, its decoder but for what it takes from a text's ends (None where it has none), where it lies, the decoder's steps."""

    tokenizer: Tokenizer
    keeping: Any
    where: str
    steps: frozenset[str]

    def alone(self, index: int) -> str:
        """The text of one id."""
        token = self.tokenizer.id_to_token(index)
        if token is None:
            return ""
        return token if self.keeping is None else str(self.keeping.decode([token]))

    def bytes_of(self, index: int) -> int:
        """The bytes of one id between two others."""
        token = self.tokenizer.id_to_token(index)
        if token is None:
            return 0
        if "ByteLevel" in self.steps:
            return len(token) if _BYTE_LEVEL.issuperset(token) else len(token.encode())
        if "ByteFallback" in self.steps and _BYTE.fullmatch(token):
            return 1
        return self._length("x", token, "x") - self._length("x", "x")

    def _length(self, *tokens: str) -> int:
        text = " ".join(tokens) if self.keeping is None else self.keeping.decode(list(tokens))
        return len(text.encode())


def _made(document: dict[str, Any], where: str) -> Tokenizer:
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise Unsupported("text of token ids needs tokenizers; pip install 'actcache[text]'") from None
    with _told(where):
        return Tokenizer.from_str(json.dumps(document))


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Make one error of whatever the library raises, the panics of its Rust half too, which are no `Exception`."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise Unsupported(f"{where}: this version of tokenizers cannot use it ({said}); another version may") from None


def _steps(decoder: Any) -> frozenset[str]:
    """The types of a decoder's steps, from its JSON."""
    if not isinstance(decoder, dict):
        return frozenset()
    parts = decoder.get("decoders")
    inside = [_steps(part) for part in parts] if isinstance(parts, list) else []
    return frozenset({str(decoder.get("type"))}).union(*inside)


def _keeping_spaces(decoder: Any) -> Any:
    """A decoder's JSON, changed so that it takes nothing from the beginning and the end of what it decodes."""
    if not isinstance(decoder, dict):
        return decoder
    changed = dict(decoder)
    if decoder.get("type") == "Sequence" and isinstance(decoder.get("decoders"), list):
        changed["decoders"] = [_keeping_spaces(part) for part in decoder["decoders"]]
    elif decoder.get("type") == "Strip":
        changed |= {"start": 0, "stop": 0}
    elif decoder.get("type") == "Metaspace":
        changed = {"type": "Metaspace", "replacement": decoder.get("replacement"), "prepend_scheme": "never"}
    return changed


def _checked(ids: Sequence[int] | np.ndarray) -> list[int]:
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InvalidInput(f"token ids are one row of whole numbers (n,), not {array.dtype} {array.shape}")
    if array.size and not 0 <= array.min() <= array.max() <= MAX_ID:
        raise InvalidInput(f"token ids are from 0 to {MAX_ID}, not {array.min()} to {array.max()}")
    known: list[int] = array.tolist()
    return known
