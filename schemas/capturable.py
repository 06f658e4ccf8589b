"""A torch module of the user's own, described so that the same build can cache it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, eq=False)
class Capturable:
    """A torch module, what it is called with, and the sites to store. Give it to `Spec` as its `model`.

    With `inputs` None the module is a language model: it is called with token ids (sequence, position), padded on the
    right, and `attention_mask` if it takes one, and returns logits (sequence, position, vocabulary), a tuple that begins with
    them, or something that has them as `.logits`. Its tokens come from the spec's corpus through `tokenizer`, and its sites
    are found as any GPT's are.

    Otherwise sequence i of the dataset is `inputs[i]`, an image say, and each of its `positions` is one row: a patch, or
    the whole image where `positions` is 1. There are no tokens then, and no head.

    Attributes:
        name: what the module is called; a part of its identity, with its code and its weights.
        module: a `torch.nn.Module`; it is put into evaluation mode.
        inputs: what the module is called with for each sequence, without the batch axis: a tensor or numpy array, a tuple of
            them, or a dict of named ones. All of one shape.
        sites: for each site's name, the path of the module below `module` whose output it is (`""` for all of it). Outputs are
            (item, position, width), (item, width), or (item, width, height, …) as two-dimensional convolutions make them; with
            `positions` 1 they are averaged over their positions. Other layouts, as of a Conv1d, are not told from these: put a
            module that permutes them behind, and name that.
        positions: vectors an item, the same at every site.
        tokenizer: the folder of a tokenizer, for a language model.
    """

    name: str
    module: Any
    inputs: Sequence[Any] | None = None
    sites: Mapping[str, str] | None = None
    positions: int = 1
    tokenizer: str | Path | None = None
