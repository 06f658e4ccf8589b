"""What a spec says of documents and sequences, checked: a wrong combination is refused before anything is read."""

from __future__ import annotations

from actcache.schemas.corpora import Cutting, Selection
from actcache.schemas.errors import InvalidInput
from actcache.schemas.spec import Spec


def cutting_of(spec: Spec, context: int, vocab_size: int) -> Cutting:
    """How documents become sequences of at most `context` tokens.

    Raises:
        InvalidInput: options exclude each other, or an id is not in the vocabulary.
    """
    if (spec.long == "stride") != (spec.stride is not None):
        raise InvalidInput("--long stride and --stride N go together: N tokens from one window to the next")
    if spec.pack and spec.long != "split":
        raise InvalidInput(
            f"--pack cuts one stream of all documents, so --long {spec.long} has no meaning; leave one out"
        )
    room = context - (spec.bos == "always")
    if room < 1:
        raise InvalidInput(f"--bos always leaves no room for a document in --context {context}; give at least 2")
    if spec.stride is not None and spec.stride > room:
        raise InvalidInput(
            f"--stride {spec.stride} is more than the {room} tokens of a window, so tokens would be lost; give at most {room}"
        )
    for option, given in (("--bos-id", spec.bos_id), ("--eos-id", spec.eos_id)):
        if given is not None and given >= vocab_size:
            raise InvalidInput(f"{option} {given} is beyond the model's vocabulary of {vocab_size}")
    return Cutting(long=spec.long, stride=spec.stride, bos=spec.bos, bos_id=spec.bos_id, eos_id=spec.eos_id)


def selection_of(spec: Spec) -> Selection:
    """Which documents, and in which order.

    Raises:
        InvalidInput: no document could be long and short enough.
    """
    least, most = spec.min_tokens, spec.max_document_tokens
    if least is not None and most is not None and least > most:
        raise InvalidInput(f"--min-tokens {least} is more than --max-document-tokens {most}: no document would be left")
    return Selection(
        min_tokens=least,
        max_document_tokens=most,
        shuffle=spec.shuffle,
        sample=spec.sample,
        max_documents=spec.max_documents,
    )
