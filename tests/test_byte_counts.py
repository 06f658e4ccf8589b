"""How many bytes a token adds to a text."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

import actcache as ac
from actcache.clients.text import Text
from tests.test_text import sentencepiece_bpe, unigram, wordpiece

TINY = Path(__file__).parent.parent / "examples/tiny-gpt/tokenizer.json"
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@cache
def byte_level() -> Text:
    return Text({"tokenizer.json": TINY.read_bytes()}, "memory")


@cache
def made(make: Callable[[], PreTrainedTokenizerFast]) -> tuple[PreTrainedTokenizerFast, Text]:
    tokenizer = make()
    return tokenizer, Text({"tokenizer.json": tokenizer.backend_tokenizer.to_str().encode()}, "memory")


@given(texts)
def test_those_of_a_text_add_up_to_its_own_with_pieces_of_characters_too(text: str):
    from tokenizers import Tokenizer

    ids = Tokenizer.from_str(TINY.read_text(encoding="utf-8")).encode(text).ids
    counts = byte_level().byte_counts(ids)
    assert counts.sum() == len(text.encode())
    assert np.all(counts > 0)


@pytest.mark.parametrize("make", [sentencepiece_bpe, unigram, wordpiece])
@given(text=st.text(st.characters(max_codepoint=0x7FF, exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30))
def test_those_of_other_tokenizers_add_up_but_for_a_space_at_the_beginning(
    make: Callable[[], PreTrainedTokenizerFast], text: str
):
    tokenizer, own = made(make)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        return
    assert own.byte_counts(ids).sum() - len(own.decode(ids).encode()) in (0, 1)


def test_ids_that_are_unknown_have_none_and_what_is_no_id_is_refused():
    assert byte_level().byte_counts([4_000_000, 0]).tolist()[0] == 0
    assert byte_level().byte_counts([]).shape == (0,)
    with pytest.raises(ac.InvalidInput, match="whole numbers"):
        byte_level().byte_counts([0.5])


def test_those_of_a_document_are_its_texts(built: str):
    ds = ac.open(built)
    for number in range(ds.n_documents):
        document = ds.document(number)
        assert ds.tokenizer.byte_counts(document.tokens["token_id"]).sum() == len(document.text.encode())
