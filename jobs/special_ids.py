"""The ids of beginning and end of sequence, and whether what is asked for can be done with the tokenizer there is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from actcache.jobs.corpora.corpus import Corpus
from actcache.schemas.errors import InvalidInput
from actcache.schemas.spec import ResolvedSpec


@dataclass(frozen=True)
class SpecialIds:
    """Ids of beginning and end of sequence, None where nobody says."""

    bos: int | None
    eos: int | None


def special_ids(spec: ResolvedSpec, corpus: Corpus, tokenizer: Any) -> SpecialIds:
    """The ids given by hand, else those of the tokenizer, which is None where the model has none.

    Raises:
        InvalidInput: an id, or a chat template, is needed and there is none.
    """
    cutting, whose = spec.cutting, "the model has no tokenizer" if tokenizer is None else "the tokenizer has none"
    bos = cutting.bos_id if cutting.bos_id is not None else getattr(tokenizer, "bos_token_id", None)
    eos = cutting.eos_id if cutting.eos_id is not None else getattr(tokenizer, "eos_token_id", None)
    if cutting.bos == "always" and bos is None:
        raise InvalidInput(
            f"--bos always needs a beginning-of-sequence token, and {whose}; give its id with --bos-id, or leave --bos out"
        )
    if spec.packing == "stream" and eos is None:
        raise InvalidInput(
            f"--pack puts an end-of-sequence token after each document, and {whose}; give its id with --eos-id"
        )
    if corpus.split_at_eos and eos is None:
        raise InvalidInput(f"--split-at-eos needs an end-of-sequence token, and {whose}; give its id with --eos-id")
    if corpus.holds == "messages" and tokenizer is not None and not getattr(tokenizer, "chat_template", None):
        raise InvalidInput(
            "--messages-field needs a chat template, and the tokenizer has none; "
            "use an instruction-tuned model's, or write the conversations as text and give --text-field"
        )
    return SpecialIds(bos, eos)
