"""From texts to token ids: exactly what the tokenizer's own call gives, at the speed of what it is built on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from actcache.jobs.corpora.document import Bad, Messages
from actcache.jobs.model import first_line
from actcache.schemas.errors import InvalidInput

PIECE = 1 << 20
LONGEST = 1 << 24
COMPARED, COMPARED_TEXTS = 1 << 12, 64
PROBES = ("", "a", " It's 12\n\n é  🦜 ", "x" * 100)
_CUT = re.compile(r"[^\W_](?=[ \n])")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer beside a model.

    Raises:
        InvalidInput: transformers cannot load it.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise what they like
        raise InvalidInput(f"{folder}: the tokenizer cannot be loaded: {first_line(error)}") from error


class Encoder:
    """A tokenizer as it is used for a corpus. `special` asks for the tokens that it adds to a text by itself."""

    def __init__(self, tokenizer: Any, special: bool) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._backend = _backend(tokenizer)
        self._compared = False
        self._compare(list(PROBES))  # before any thread is at work: a call also sets what it was left to set

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, int32."""
        return self.begin(texts)()

    def begin(self, texts: list[str]) -> Callable[[], list[np.ndarray]]:
        """Tokenise; what is left, lists of ids becoming arrays, another thread may do while the next texts are tokenised.

        A fast tokenizer's call does nothing to a text that its backend does not do, beside making lists of what it
        found. The beginnings of the first texts are encoded both ways: where ids differ, the call is used for all.
        """
        if not texts:
            return list
        if not self._compared and self._backend is not None:
            self._compared = True
            self._compare([text[:COMPARED] for text in texts[:COMPARED_TEXTS]])
        if self._backend is not None:
            return partial(_arrays, self._backend.encode_batch_fast(texts, add_special_tokens=self._special))
        called = self._called(texts)
        return lambda: called

    def pieces(self, text: str) -> Iterator[str]:
        """A text in pieces whose ids, one after the other, are those of the whole text.

        Only a GPT-2 tokenizer is known to cut a text wherever a space follows a letter or digit, whatever stands around.
        A text for another one is one piece.

        Raises:
            Bad: the text is too long for the memory that tokenising it at once takes, and cannot be cut.
        """
        start = 0
        while len(text) - start > PIECE and self._cuts:
            found = _CUT.search(text, start + PIECE // 2)
            if found is None:
                break
            yield text[start : found.end()]
            start = found.end()
        if len(text) - start > LONGEST:
            raise Bad(
                "too long to tokenise",
                f"a text of {len(text):,} characters; this tokenizer takes at most {LONGEST:,} at once: split the text",
            )
        yield text[start:] if start else text

    def chat(self, messages: Messages) -> str:
        """A conversation as the tokenizer's chat template writes it.

        Raises:
            Bad: the template refuses it.
        """
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False))
        except Exception as error:  # a template raises whatever its author thought of
            raise Bad(
                "refused by the chat template", f"the chat template refuses the messages: {first_line(error)}"
            ) from None

    def _compare(self, texts: list[str]) -> None:
        if self._backend is not None:
            called = self._called(texts)
            found = _arrays(self._backend.encode_batch_fast(texts, add_special_tokens=self._special))
            if any(not np.array_equal(one, other) for one, other in zip(called, found, strict=True)):
                self._backend = None

    @cached_property
    def _cuts(self) -> bool:
        return self._backend is not None and _cuts_exactly(self._backend, self._special)

    def _called(self, texts: list[str]) -> list[np.ndarray]:
        encoded = self._tokenizer(texts, add_special_tokens=self._special, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
        return [np.asarray(ids, np.int32) for ids in encoded]


def _arrays(encodings: list[Any]) -> list[np.ndarray]:
    return [np.array(encoding.ids, np.int32) for encoding in encodings]


def _backend(tokenizer: Any) -> Any:
    """What a fast tokenizer is built on, None where its class has a call of its own."""
    from transformers import PreTrainedTokenizerFast
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    kind = type(tokenizer)
    if not getattr(tokenizer, "is_fast", False) or not issubclass(kind, PreTrainedTokenizerFast):
        return None
    for name, base in (("_encode_plus", PreTrainedTokenizerFast), ("__call__", PreTrainedTokenizerBase)):
        if getattr(kind, name) is not getattr(base, name):
            return None
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


def _cuts_exactly(backend: Any, special: bool) -> bool:
    """Whether ids do not change when a text is cut between a letter or digit and a space or line end.

    So it is for byte-level BPE behind GPT-2's regular expression: no alternative of it goes on from one to
    whitespace or looks behind, and merges never cross its borders. Nothing may be added at the ends, nor change the text
    before, and no added token may hold or swallow whitespace.
    """
    document = json.loads(backend.to_str())
    before, after, added = document["pre_tokenizer"], document["post_processor"], document["added_tokens"]
    return bool(
        document["normalizer"] is None
        and before is not None
        and (before["type"], before.get("add_prefix_space"), before.get("use_regex")) == ("ByteLevel", False, True)
        and (after is None or after["type"] == "ByteLevel" or not special)
        and (document["model"]["type"], document["model"].get("dropout")) == ("BPE", None)
        and not any(
            token["lstrip"] or token["rstrip"] or token["single_word"] or re.search(r"\s", token["content"])
            for token in added
        )
    )
