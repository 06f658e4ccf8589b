"""Where a build's model comes from: a checkpoint's folder, or a module of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from actcache.jobs.checkpoint import locate
from actcache.jobs.items import Items
from actcache.jobs.torch_half import torch_half
from actcache.schemas.capturable import Capturable
from actcache.schemas.spec import ModelIdentity, TokenizerIdentity


class ModelSource(Protocol):
    """What a plan asks of a model's origin."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def revision(self) -> str | None:
        """The commit that it was pinned to, if it came from a hub."""
        ...

    @property
    def reference(self) -> str | Capturable:
        """What `source_of` finds it by, with its revision, in another process."""
        ...

    @property
    def ready(self) -> Any:
        """The model itself, where it is there without being loaded: a module of the user's own. None for a checkpoint."""
        ...

    @property
    def family(self) -> str:
        """Its `model_type`."""
        ...

    @property
    def folder(self) -> Path:
        """Where its tokenizer's files are, and its own if it has any."""
        ...

    def identity(self) -> ModelIdentity:
        """The model by its content."""
        ...

    def tokenizer(self) -> TokenizerIdentity | None:
        """The tokenizer by the content of its files, None if it has none."""
        ...

    def dtype(self) -> str:
        """The dtype that it computes in by itself."""
        ...

    def license(self) -> str | None:
        """Its licence, as far as it is stated."""
        ...

    def items(self) -> Items | None:
        """What it is called with instead of a corpus's tokens, if it has inputs of its own."""
        ...


def source_of(model: str | Capturable, revision: str | None) -> ModelSource:
    """Find a model: a hub id at a revision, a folder, or a module of the user's own.

    Raises:
        InvalidInput: there is no such folder or model, or a module of the user's own cannot be used.
        StoreError: the hub cannot be reached.
    """
    if isinstance(model, Capturable):
        own: ModelSource = torch_half("own").OwnModel(model)
        return own
    return locate(model, revision)
