"""A model's files: where they are, what they hash to, what their headers tell. No torch here: planning must be quick."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actcache.jobs.corpora.files import printable
from actcache.jobs.families import family_of
from actcache.jobs.fingerprint import file_sha256
from actcache.jobs.json_file import json_object
from actcache.schemas.canonical import digest
from actcache.schemas.dtypes import ACTIVATION_DTYPES
from actcache.schemas.errors import InvalidInput, StoreError
from actcache.schemas.spec import ModelIdentity, TokenizerIdentity

_TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
_HUB_PATTERNS = ["*.jinja", "*.json", "*.txt", "*.model", "README.md"]
_SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
MAX_HEADER_BYTES = 100_000_000
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder, what it is called, and the commit it was pinned to if it came from a hub."""

    folder: Path
    name: str
    revision: str | None
    config: dict[str, Any]

    @property
    def reference(self) -> str:
        """The hub id that has a commit, or the folder."""
        return self.name if self.revision is not None else str(self.folder.absolute())

    @property
    def ready(self) -> None:
        """It must be loaded."""
        return

    @property
    def family(self) -> str:
        """Its `model_type`.

        Raises:
            Unsupported: the config names none.
        """
        return family_of(self.config, str(self.folder))

    def identity(self) -> ModelIdentity:
        """The model by its content.

        Raises:
            InvalidInput: the folder has no weights.
        """
        config = digest({name: value for name, value in self.config.items() if name != "_name_or_path"})
        return ModelIdentity(family=self.family, config=config, weights=_folded(self.weight_files()))

    def tokenizer(self) -> TokenizerIdentity | None:
        """The tokenizer by the content of its files, None if the folder has none."""
        return tokenizer_of(self.folder)

    def weight_files(self) -> list[Path]:
        """The files of the weights, as transformers would choose them.

        Raises:
            InvalidInput: there are none.
        """
        for name in ("model.safetensors", "pytorch_model.bin"):
            index = self.folder / f"{name}.index.json"
            if (self.folder / name).is_file():
                return [self.folder / name]
            if index.is_file():
                parts = json_object(index).get("weight_map")
                if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
                    raise InvalidInput(f"{index}: no weight_map")
                return [self.folder / part for part in sorted(set(parts.values()))]
        raise InvalidInput(f"{self.folder}: no weights (model.safetensors or pytorch_model.bin)")

    def dtype(self) -> str:
        """The checkpoint's own dtype: its config's word, else that of most of its safetensors weights, else float32."""
        stated = str(self.config.get("dtype") or self.config.get("torch_dtype") or "").removeprefix("torch.")
        if stated in ACTIVATION_DTYPES:
            return stated
        sizes: dict[str, int] = {}
        for path in self.weight_files():
            if path.suffix == ".safetensors":
                for name, size in _safetensors_sizes(path):
                    sizes[name] = sizes.get(name, 0) + size
        found = {name: size for name, size in sizes.items() if name in _SAFETENSORS_DTYPES}
        return _SAFETENSORS_DTYPES[max(found, key=found.__getitem__)] if found else "float32"

    def license(self) -> str | None:
        """The licence that the model's card states in its front matter."""
        card = self.folder / "README.md"
        if not card.is_file():
            return None
        match = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        stated = re.search(r"^license:\s*(\S+)", match.group(1), re.MULTILINE) if match else None
        return stated.group(1) if stated else None

    def items(self) -> None:
        """A checkpoint's model is called with tokens alone."""
        return


def tokenizer_of(folder: Path) -> TokenizerIdentity | None:
    """The tokenizer in a folder by the content of its files, None if it has none."""
    files = tokenizer_paths(folder)
    return TokenizerIdentity(files=_folded(files)) if _tokenises(files) else None


def tokenizer_paths(folder: Path) -> list[Path]:
    """The files of a tokenizer that there are in a folder."""
    return [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]


def locate(model: str, revision: str | None) -> Checkpoint:
    """Find a model: a folder that `save_pretrained` wrote, or a hub id, which is downloaded unless it is cached.

    Raises:
        InvalidInput: there is no such folder or model, or it has no `config.json`.
        StoreError: the hub cannot be reached.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise InvalidInput(f"{model}: a local folder has no revision; leave --revision out")
        name, pinned = folder.resolve().name, None
    elif folder.is_file() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise InvalidInput(
            f"{model}: no such folder; give one that save_pretrained wrote, or a hub id such as openai-community/gpt2"
        )
    else:
        folder = _download(model, revision)
        name, pinned = model, folder.name if _COMMIT.fullmatch(folder.name) else None
    config = folder / "config.json"
    if not config.is_file():
        raise InvalidInput(f"{folder}: no config.json; is this a model's folder?")
    return Checkpoint(folder, printable(name), pinned, json_object(config))


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    at = f"{model}@{revision}" if revision else model
    try:
        folder = _snapshot(model, revision, "*.safetensors")
        return folder if any(folder.glob("*.safetensors")) else _snapshot(model, revision, "pytorch_model*.bin")
    except GatedRepoError:
        raise InvalidInput(
            f"{at}: gated: accept its terms on the hub, then log in with 'hf auth login' or set HF_TOKEN"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise InvalidInput(f"{at}: neither a folder nor a model on the hub (a private one needs HF_TOKEN)") from None
    except LocalEntryNotFoundError:
        raise InvalidInput(
            f"{at}: not a folder here, not in the local hub cache, and the hub cannot be reached"
        ) from None
    except HfHubHTTPError as error:
        raise StoreError(f"{at}: the hub failed: {str(error).splitlines()[0]}") from None


def _snapshot(model: str, revision: str | None, weights: str) -> Path:
    import huggingface_hub

    patterns = [*_HUB_PATTERNS, weights]
    return Path(
        huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns="*/*")
    )


def _tokenises(files: list[Path]) -> bool:
    """Whether there is a tokenizer among these files, not only settings or a template for one."""
    return any(not path.name.startswith(("chat_template", "special_tokens_map", "tokenizer_config")) for path in files)


def _folded(files: list[Path]) -> str:
    try:
        hashes = file_sha256(files)
    except OSError as error:
        raise InvalidInput(f"{error.filename}: cannot be read: {error.strerror}") from None
    return digest([[path.name, sha] for path, sha in zip(files, hashes, strict=True)])


def _safetensors_sizes(path: Path) -> list[tuple[str, int]]:
    """Dtype and bytes of each tensor, from the file's header (8 bytes of length, then JSON)."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, MAX_HEADER_BYTES)))
        return [
            (entry["dtype"], entry["data_offsets"][1] - entry["data_offsets"][0])
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(f"{path}: not a safetensors file: {error}") from None
