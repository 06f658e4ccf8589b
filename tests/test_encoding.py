"""Texts become the ids that the tokenizer's own call gives, at any length, whatever the tokenizer."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from actcache.jobs import encode
from actcache.jobs.ahead import ahead
from actcache.jobs.corpora.document import Bad
from actcache.jobs.encode import Encoder, load_tokenizer

TINY = Path(__file__).parent.parent / "examples/tiny-gpt"
WORDS = [
    "word",
    " ",
    "\n",
    "\n\n",
    "  ",
    "a b",
    "it's",
    "'s x",
    "12 3",
    ".",
    "é",
    " \u3000",
    "🦜",
    "<|endoftext|>",
    "\t",
    "x\ny",
    "d e",
]


@pytest.fixture(scope="module")
def tiny() -> Any:
    return load_tokenizer(TINY)


def called(tokenizer: Any, text: str, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=6), max_size=40).map("".join))
def test_a_text_in_pieces_has_the_ids_of_the_whole(tiny, text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "PIECE", 8)
        encoder = Encoder(tiny, special=True)
        pieces = list(encoder.pieces(text))
        assert "".join(pieces) == text
        ids = [token for piece in encoder.encode(pieces) for token in piece.tolist()]
    assert ids == called(tiny, text, True)


def test_long_texts_are_cut_at_all(tiny):
    text = "some words and more " * 400_000
    pieces = list(Encoder(tiny, special=True).pieces(text))
    assert len(pieces) > 10
    assert max(map(len, pieces)) <= encode.PIECE


def made(normalizer: Any = None, prefix: bool = False, template: bool = False, **kinds: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(
        models.BPE({"<s>": 0, **{c: i + 1 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}}, [])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    if normalizer is not None:
        backend.normalizer = normalizer
    if template:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", **kinds)


OTHERS = [{}, {"normalizer": normalizers.Strip()}, {"prefix": True}, {"template": True}, {"model_max_length": 3}]


@pytest.mark.parametrize("kinds", OTHERS, ids=str)
@pytest.mark.parametrize("special", [True, False])
def test_other_tokenizers_give_what_their_call_gives(
    kinds: dict[str, Any], special: bool, monkeypatch: pytest.MonkeyPatch
):
    tokenizer = made(**kinds)
    monkeypatch.setattr(encode, "PIECE", 4)
    for text in ("  some text  ", "x", "<s> a <s>", "one two three four\n\nfive "):
        expected = called(made(**kinds), text, special)
        encoder = Encoder(tokenizer, special)
        ids = np.concatenate(encoder.encode(list(encoder.pieces(text))))
        assert ids.tolist() == expected
        assert ids.dtype == np.int32


def test_truncation_and_padding_that_came_with_the_file_are_off():
    tokenizer = made()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    assert [len(ids) for ids in Encoder(tokenizer, True).encode(["abcdef", "a"])] == [6, 1]


def test_a_tokenizer_with_a_call_of_its_own_is_called():
    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, text: Any, *args: Any, **fields: Any) -> Any:
            return super()._encode_plus([t + "!" for t in text], *args, **fields)

    plain = made()
    own = Own(tokenizer_object=plain.backend_tokenizer, bos_token="<s>")
    assert Encoder(own, True).encode(["ab"])[0].tolist() == called(plain, "ab!", True)


def test_a_backend_that_says_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch):
    tokenizer = made()
    encoder = Encoder(tokenizer, True)
    monkeypatch.setattr(encoder, "_called", lambda texts: [np.array([7], np.int32) for _ in texts])
    assert [ids.tolist() for ids in encoder.encode(["ab", "c"])] == [[7], [7]]
    assert [ids.tolist() for ids in encoder.encode(["ab"])] == [[7]]


def test_a_text_too_long_to_be_tokenised_at_once_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encode, "LONGEST", 10)
    with pytest.raises(Bad, match="a text of 11 characters; this tokenizer takes at most 10 at once: split the text"):
        list(Encoder(made(prefix=True), True).pieces("x" * 11))


def test_things_made_ahead_come_in_order_and_so_does_what_went_wrong():
    def items():
        yield from range(50)
        raise KeyError("after fifty")

    taken = []
    with pytest.raises(KeyError, match="after fifty"), ahead(items(), "test") as made_ahead:
        taken.extend(made_ahead)
    assert taken == list(range(50))


def test_who_stops_asking_stops_the_making():
    closed = []

    def endless():
        try:
            number = 0
            while True:
                yield (number := number + 1)
        finally:
            closed.append(number)

    with ahead(endless(), "test", depth=3) as numbers:
        assert [next(numbers) for _ in range(4)] == [1, 2, 3, 4]
    assert closed
    assert closed[0] <= 4 + 3 + 2


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path):
    """15 MB and 120 MB of rows; then 45 MB in one document."""
    text = "".join(random.Random(0).choices(["alpha ", "be ", "gamma\n", "x1 "], k=1 << 16))

    def peak(name: str, copies: int) -> float:
        with (tmp_path / name).open("w") as file:
            for _ in range(copies):
                file.write(text if name.endswith(".txt") else json.dumps({"text": text[:3000]}) + "\n")
        code = (
            "import sys, resource, actcache as ac\n"
            "ac.build(ac.Spec(model=sys.argv[1], corpus=(sys.argv[2],)), sys.argv[3], stage='tokenise')\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        args = [sys.executable, "-c", code, str(TINY), str(tmp_path / name), str(tmp_path / f"{name}.out")]
        done = subprocess.run(
            args, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"}
        )
        return int(done.stdout) / 1024

    small, large = peak("a.jsonl", 5_000), peak("b.jsonl", 40_000)
    assert large < small + 150
    assert peak("c.txt", 150) < small + 500  # the text itself is in memory, its tokens are not
