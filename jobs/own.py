"""A module of the user's own in a checkpoint's place: what it is by its code and its weights, and its anatomy."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from actcache.jobs.capture import run
from actcache.jobs.checkpoint import tokenizer_of
from actcache.jobs.families import OWN
from actcache.jobs.head import to_numpy
from actcache.jobs.inputs import ItemInputs
from actcache.jobs.items import Items, fold
from actcache.jobs.model import proven
from actcache.jobs.parts import ModelParts, device_of
from actcache.jobs.settings import settings
from actcache.schemas.anatomy import Anatomy, Tap
from actcache.schemas.canonical import digest
from actcache.schemas.capturable import Capturable
from actcache.schemas.errors import InvalidInput, ProofFailed
from actcache.schemas.grid import TOKEN_ARRAYS
from actcache.schemas.sites import MODULE
from actcache.schemas.spec import ModelIdentity, TokenizerIdentity

SITE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_LIBRARIES = ("torch", "transformers", "numpy", "builtins", "typing", "collections", "abc")


@dataclass(frozen=True)
class OwnModel:
    """A `Capturable`, with what a checkpoint's folder tells of other models."""

    capturable: Capturable

    @property
    def name(self) -> str:
        """What it is called."""
        return self.capturable.name

    @property
    def reference(self) -> Capturable:
        """Itself."""
        return self.capturable

    @property
    def ready(self) -> nn.Module:
        """The module."""
        return self.module

    @property
    def family(self) -> str:
        """That it is the user's own."""
        return OWN

    @property
    def revision(self) -> None:
        """Modules have none."""
        return

    @property
    def folder(self) -> Path:
        """Where its tokenizer is.

        Raises:
            InvalidInput: it has none.
        """
        if self.capturable.tokenizer is None:
            raise InvalidInput(
                f"{self.name}: no tokenizer: give its folder as Capturable(tokenizer=…), or inputs and sites"
            )
        return Path(self.capturable.tokenizer).expanduser()

    @cached_property
    def module(self) -> nn.Module:
        """The module, in evaluation mode, on the best device there is."""
        if not isinstance(self.capturable.module, nn.Module):
            raise InvalidInput(
                f"{self.name}: its module is a {type(self.capturable.module).__name__}, not a torch.nn.Module"
            )
        return self.capturable.module.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def identity(self) -> ModelIdentity:
        """The module by its name, its code and its weights.

        Raises:
            InvalidInput: the source of a class cannot be read.
        """
        code = digest([self.name, str(self.module), *self._sources(), *self._settings])
        return ModelIdentity(family=OWN, config=code, weights=_weights(self.module))

    @cached_property
    def _settings(self) -> list[str]:
        """Its attributes as they are before it is first run: what it keeps for itself while it runs is no part of it."""
        return settings(self.module)

    def _sources(self) -> Iterator[str]:
        """The source of every class in the module, and that it is derived from, that is not a library's, by name."""
        kinds = {
            f"{kind.__module__}.{kind.__qualname__}": kind
            for module in self.module.modules()
            for kind in type(module).__mro__
            if kind is not object
        }
        for name, kind in sorted(kinds.items()):
            yield name
            if kind.__module__.split(".")[0] in _LIBRARIES:
                continue
            try:
                yield inspect.getsource(kind)
            except (OSError, TypeError):
                raise InvalidInput(
                    f"{self.name}: the source of {name} cannot be read, and it is a part of what the dataset is; "
                    "define it in a file or a notebook's cell"
                ) from None

    def items(self) -> Items | None:
        """Its inputs in a corpus's place; None for a language model."""
        one = self.capturable
        return None if one.inputs is None else Items(one.name, one.inputs, one.positions)

    def tokenizer(self) -> TokenizerIdentity | None:
        """Its tokenizer by the content of its files, None if it has none."""
        return None if self.capturable.tokenizer is None else tokenizer_of(self.folder)

    def dtype(self) -> str:
        """The dtype of most of its parameters."""
        counts: dict[str, int] = {}
        for parameter in self.module.parameters():
            name = str(parameter.dtype).removeprefix("torch.")
            counts[name] = counts.get(name, 0) + parameter.numel()
        return max(counts, key=counts.__getitem__) if counts else "float32"

    def license(self) -> None:
        """Unknown."""
        return

    def anatomy(self) -> Anatomy:
        """Its sites: those of a language model that is taken apart, or those that are named.

        Raises:
            InvalidInput: a site names no module, or its output has not one vector a position.
            Unsupported, ProofFailed: a language model cannot be taken apart, or is not what was found.
        """
        sites, inputs = self.capturable.sites, self.capturable.inputs
        if inputs is None:
            if sites is not None:
                raise InvalidInput(
                    f"{self.name}: a language model's sites are found; ask for modules with Spec(sites='module:PATH')"
                )
            return proven(self.module, OWN, self.dtype(), self.name)
        if not sites:
            raise InvalidInput(
                f"{self.name}: inputs of its own and no sites: say with sites={{name: module path}} what to store"
            )
        if not len(inputs):
            raise InvalidInput(f"{self.name}: there are no inputs")
        taps = {site: self._tap(site, path) for site, path in sites.items()}
        widths = self._widths(taps)
        d_model = next(iter(widths.values()))
        return Anatomy(
            blocks=(),
            d_model=d_model,
            vocab_size=0,
            max_context=None,
            attention=OWN,
            taps=taps,
            widths=widths,
            head=(),
            modules={},
        )

    def _tap(self, site: str, path: str) -> Tap:
        if not SITE_NAME.fullmatch(site) or site in TOKEN_ARRAYS or site.startswith(MODULE):
            raise InvalidInput(
                f"{self.name}: site {site!r}: a name of letters, digits, '.', '_' and '-' that no other array has"
            )
        try:
            self.module.get_submodule(path)
        except AttributeError:
            near = ", ".join([name for name, _ in self.module.named_modules() if name][:8])
            raise InvalidInput(f"{self.name}: site {site!r}: no module {path!r}; there is {near}, …") from None
        return Tap(module=path, at="output")

    def _widths(self, taps: dict[str, Tap]) -> dict[str, int]:
        """Length of each site's vectors, from a run of the first item."""
        inputs = self.capturable.inputs
        assert inputs is not None
        first = ItemInputs.stack([inputs[0]], self.capturable.positions, device_of(self.module))
        empty = Anatomy(
            blocks=(), d_model=0, vocab_size=0, max_context=None, attention=OWN, taps=taps, head=(), modules={}
        )
        widths: dict[str, int] = {}
        calls: dict[str, int] = dict.fromkeys(taps, 0)

        def note(site: str, tensor: torch.Tensor) -> None:
            widths[site] = int(tensor.shape[-1])
            calls[site] += 1

        try:
            run(ModelParts(self.module, empty), first, list(taps), note, whole=True)
        except ProofFailed:
            site = next(site for site, count in calls.items() if count != 1)
            raise InvalidInput(
                f"{self.name}: site {site!r}: module {taps[site].module!r} is called {calls[site]} times an item, so that its output "
                "is not one thing; name a module that is called once"
            ) from None
        return {site: widths[site] for site in taps}


def _weights(module: nn.Module) -> str:
    """The SHA-256 of every parameter and buffer that is stored: name, dtype, shape and bytes."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        fold(hashed, name, to_numpy(tensor))
    return hashed.hexdigest()
