"""Lenses to and from the folders of the package tuned-lens 0.2.0 (Belrose et al. 2023, arXiv 2303.08112).

A folder holds `config.json`, which tells the model, and `params.pt`, one translator for each state but the last: state l is read as
head(h + W_l h + b_l), as here. The head is not in it; it is told by a hash of the unembedding's first and last numbers.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from uuid import uuid4

import numpy as np

from actcache.cache.head import Head
from actcache.clients.joined import Joined
from actcache.clients.lens.exchange_config import LENS_TYPE, read_config, unembed_hash
from actcache.clients.lens.translators import Lens
from actcache.clients.selection import Selectable
from actcache.clients.states import States
from actcache.schemas.errors import InvalidInput, NotFound, SpecMismatch, StoreError, Unsupported

CONFIG, PARAMS = "config.json", "params.pt"


def export_tuned_lens(lens: Lens, ds: Selectable, folder: str | Path, base_model: str | None = None) -> Path:
    """Write a lens so that tuned-lens loads it with `TunedLens.from_model_and_pretrained(model, folder)`. Returns the folder.

    The folder appears whole, or not at all. Parameters are float32; the package turns them into the dtype of the model that they are
    loaded for. A shared translator is written as the translator of every layer, for the format has no other way: it comes back as
    a lens of one translator each, which reads the same.

    Args:
        lens: one that reads the whole residual stream of a GPT, at the same token.
        ds: a dataset of its model, which tells the model's name and head.
        folder: where to; absent, or empty.
        base_model: what `base_model_name_or_path` shall be; by default what the dataset calls the model.

    Raises:
        InvalidInput: the format cannot hold the lens, or the folder holds something.
        SpecMismatch: the lens is another model's.
        NotFound: the dataset has no head.
        Unsupported: the head is not a norm and an unembedding alone, which is all that the package reads; or torch is not installed.
        StoreError: the folder cannot be written.
    """
    whole = ds.whole
    translators = _translators(lens, ds)
    digest = unembed_hash(_unembedding(whole.head, ds.url))
    labels = (whole.parts[0] if isinstance(whole, Joined) else whole).provenance.labels  # type: ignore[attr-defined]
    config = {
        "base_model_name_or_path": labels.model if base_model is None else base_model,
        "d_model": lens.width,
        "num_hidden_layers": len(translators),
        "bias": True,
        "base_model_revision": labels.revision if base_model in (None, labels.model) else None,
        "unembed_hash": digest,
        "lens_type": LENS_TYPE,
    }
    params = _params_file()
    folder = Path(folder)
    target = folder.resolve()
    if target == Path.cwd() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        raise InvalidInput(f"{folder}: is there already; give a folder that is not there yet, or an empty one")
    staged = target.with_name(f".{target.name}.{uuid4().hex}")
    try:
        try:
            staged.mkdir()
            params.write(staged / PARAMS, lens.weight, lens.bias, translators)
            (staged / CONFIG).write_text(json.dumps(config), encoding="utf-8")
            for name in (PARAMS, CONFIG):
                with (staged / name).open("rb") as file:
                    os.fsync(file.fileno())
            os.replace(staged, target)  # takes the place of an empty folder, and of no other
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    except OSError as error:
        raise StoreError(f"{folder}: cannot be written: {error}") from None
    return folder


def import_tuned_lens(folder: str | Path, ds: Selectable | States) -> Lens:
    """The lens that tuned-lens saved in a folder, for the model of a dataset. Nothing of the files is executed.

    Args:
        folder: holds `config.json` and `params.pt`, as `TunedLens.save` writes them; parameters of any float dtype become float32.
        ds: a dataset of the lens's model, or `states(…)` of its states, first to last.

    Returns:
        The lens. Its `facts` have what the configuration tells of the model, and `unembed_hash`, None where the folder has none to compare.

    Raises:
        NotFound: there is no such folder, or a file is missing; the dataset has no head.
        InvalidInput: a file is not what the package writes.
        SpecMismatch: the lens is of another width, number of layers or unembedding than the dataset's model.
        Unsupported: a lens or a head of another type than the package's; torch is not installed.
        StoreError: a file cannot be read.
    """
    folder = Path(folder)
    reads = _reads(ds)
    try:
        if not folder.is_dir():
            raise NotFound(f"{folder}: no such folder")
        for path in (folder / CONFIG, folder / PARAMS):
            if not path.exists():
                raise NotFound(f"{path}: no such file; a lens of tuned-lens is a folder of {CONFIG} and {PARAMS}")
            if not path.is_file():
                raise InvalidInput(f"{path}: no file")
        config = read_config(folder / CONFIG)
        layers, width, told = config["num_hidden_layers"], config["d_model"], config["unembed_hash"]
        if (layers, width) != (len(reads.sites) - 1, reads.width):
            raise SpecMismatch(
                f"{folder}: a lens of {layers} layers × {width}, and {reads.url} has {len(reads.sites) - 1} × {reads.width}; "
                "give a dataset of its model"
            )
        own = unembed_hash(_unembedding(reads.head, reads.url))
        if told is not None and told != own:
            raise SpecMismatch(
                f"{folder}: made for another unembedding ({told[:12]!r}, and {reads.url} has {own[:12]!r}); "
                f"give a dataset of its model, or set unembed_hash in {CONFIG} to null to read it all the same"
            )
        weight, bias = _params_file().read(folder / PARAMS, layers, width)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{folder}: cannot be read: {error}") from None
    names = ("base_model_name_or_path", "base_model_revision", "unembed_hash")
    facts = {"format": "tuned-lens", **{name: config[name] for name in names}}
    return Lens("tuned", reads.sites, weight, bias, shared=False, offset=0, model=reads.model, facts=facts)


class _Reads(NamedTuple):
    """What a lens is to read."""

    url: str
    sites: tuple[str, ...]
    head: Head
    width: int
    model: str


def _reads(ds: Selectable | States) -> _Reads:
    if isinstance(ds, States):
        if ds.offset:
            raise InvalidInput(f"{ds.ds.url}: a lens of tuned-lens looks no tokens ahead; give offset=0")
        return _Reads(ds.ds.url, ds.sites, ds.head, ds.width, ds.ds.model_key)
    whole, sites = ds.whole, _stream(ds)
    return _Reads(ds.url, sites, whole.head, whole.model.d_model, whole.model_key)


def _stream(ds: Selectable) -> tuple[str, ...]:
    """Every state of the residual stream.

    Raises:
        InvalidInput: what the dataset holds is of no GPT.
    """
    sites = tuple(ds.whole.residual_states)
    if len(sites) < 2:
        raise InvalidInput(f"{ds.url}: has no residual stream, whose states are what a lens of tuned-lens reads")
    return sites


def _translators(lens: Lens, ds: Selectable) -> list[int]:
    """Which translator reads each state but the last, if the format can say it."""
    if lens.offset:
        raise InvalidInput(
            f"the lens looks {lens.offset} tokens ahead; the format of tuned-lens holds those for the same token alone"
        )
    if lens.model != ds.whole.model_key:
        raise SpecMismatch(
            f"{ds.url}: the lens was made for another model ({lens.model[:12]}…, and this is {ds.whole.model_key[:12]}…)"
        )
    if lens.sites != (stream := _stream(ds)):
        raise InvalidInput(
            f"the lens reads {_few(lens.sites)}; the format of tuned-lens holds lenses of the whole residual stream, {_few(stream)}"
        )
    if not (np.isfinite(lens.weight).all() and np.isfinite(lens.bias).all()):
        raise InvalidInput("the lens has values that are not finite")
    return [0 if lens.shared else layer for layer in range(len(stream) - 1)]


def _few(names: Sequence[str]) -> str:
    return f"{names[0]} … {names[-1]} ({len(names)})"


def _unembedding(head: Head, url: str) -> np.ndarray:
    """The matrix of a head that is a norm and an unembedding.

    Raises:
        Unsupported: it does more, or less.
    """
    kinds = [str(operation.get("op")) for operation in head.operations]
    if len(kinds) != 2 or kinds[0] not in ("layer_norm", "rms_norm") or kinds[1] != "linear":
        raise Unsupported(
            f"{url}: its head is {' + '.join(kinds) or 'nothing'}, and tuned-lens reads states by norm + linear alone"
        )
    return head.arrays[str(head.operations[1]["weight"])]


def _params_file() -> ModuleType:
    try:
        return import_module("actcache.clients.lens.params_file")
    except ModuleNotFoundError as missing:
        if missing.name != "torch":
            raise
        raise Unsupported("the files of tuned-lens are torch's; install torch to read and write them") from None
