"""What a user asks for, and what determines a dataset's content.

A `Spec` names a model and a corpus by path or hub id, with defaults still open. Resolving it gives a `ResolvedSpec`:
every choice made, names and paths replaced by hashes. The hash of that is the dataset's key.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
)

from actcache.schemas.canonical import digest
from actcache.schemas.errors import InvalidInput
from actcache.schemas.outputs import parse_outputs
from actcache.schemas.quantised import Kind, Quantisation, parse_kinds
from actcache.schemas.record import Record, first_problem

CAPTURE_VERSION = 1
"""Raised whenever a change of the code changes what is captured from the same spec."""

DType = Literal["float32", "float16", "bfloat16"]
Positive = Field(default=None, ge=1)


class Spec(BaseModel):
    """What to build, as a user says it; the same names serve the command line, TOML files and Python.

    Attributes:
        model: a hub id, or a folder that `save_pretrained` wrote.
        revision: branch, tag or commit of a hub model.
        corpus: text or `.jsonl[.gz|.zst]` files, globs or folders' globs, in the order to be read. Only an added
            build needs none.
        text_field: the field of a JSONL row that holds its text.
        context: the longest sequence, in tokens; longer documents are split. Default: 1024, or the model's own if shorter.
        sites: patterns of the sites to store, separated by spaces.
        dtype: stored dtype; `auto` is the compute dtype, so that nothing is lost.
        compute_dtype: dtype of the forward pass; default the checkpoint's.
        attention: transformers' attention implementation (`sdpa`, `eager`, `flash_attention_2`); default `sdpa` where the family has it.
        outputs: what to store beside the sites: `loss`, the next-token cross-entropy, and `entropy` of the next-token
            distribution, in nats; `topk=K`, the K largest logits.
        quantize: kinds (`int8`, `fp8`) in which to store each site as well, in about a quarter of float32's bytes, with loss.
        only_quantized: leave the exact arrays of the sites out.
        head: whether to store final norm and unembedding, so that a lens needs no model.
        max_tokens: stop after this many tokens of the corpus.
        batch_size: sequences a forward pass.
        block_tokens: tokens a block: the unit of work and of commit, and the rows of a shard.
        chunk_tokens: rows of a chunk, the smallest piece that is read.
        model_license, corpus_license: recorded in the provenance; a model card's licence is found by itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str
    corpus: tuple[str, ...] = ()
    revision: str | None = None
    text_field: str = "text"
    context: int | None = Positive
    sites: str = "resid"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    compute_dtype: DType | None = None
    attention: str | None = Field(default=None, pattern=r"^[a-z0-9_]+$")
    outputs: tuple[str, ...] = ()
    quantize: tuple[Kind, ...] = ()
    only_quantized: bool = False
    head: bool = True
    max_tokens: int | None = Positive
    batch_size: int | None = Positive
    block_tokens: int | None = Positive
    chunk_tokens: int | None = Positive
    model_license: str | None = None
    corpus_license: str | None = None

    @field_validator("corpus", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        if isinstance(value, str | Path):
            return (str(value),)
        return (
            [str(item) if isinstance(item, Path) else item for item in value]
            if isinstance(value, list | tuple)
            else value
        )

    @field_validator("model", mode="before")
    @classmethod
    def _path_or_id(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("sites", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        return " ".join(map(str, value)) if isinstance(value, list | tuple) else value

    @field_validator("outputs", mode="before")
    @classmethod
    def _one_or_many_outputs(cls, value: Any) -> Any:
        return parse_outputs(value) if isinstance(value, str | list | tuple) else value

    @field_validator("quantize", mode="before")
    @classmethod
    def _one_or_many_kinds(cls, value: Any) -> Any:
        return parse_kinds(value) if isinstance(value, str | list | tuple) else value

    def __init__(self, **fields: Any) -> None:
        """Make a spec.

        Raises:
            InvalidInput: a field is unknown, missing or has a wrong value; the message names it.
        """
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise InvalidInput(f"spec: {first_problem(error)}") from None

    @classmethod
    def from_toml(cls, path: str | Path) -> dict[str, Any]:
        """The fields of a TOML spec, its relative paths taken from the file's own folder.

        Raises:
            InvalidInput: the file cannot be read or is not TOML.
        """
        path = Path(path)
        try:
            fields = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InvalidInput(f"spec {path}: {error}") from None
        if isinstance(fields.get("corpus"), str):
            fields["corpus"] = [fields["corpus"]]
        if isinstance(fields.get("corpus"), list):
            fields["corpus"] = [_beside(path, item) if isinstance(item, str) else item for item in fields["corpus"]]
        model = fields.get("model")
        if isinstance(model, str) and (path.parent / model).is_dir():
            fields["model"] = str(path.parent / model)
        return fields


def _beside(spec: Path, item: str) -> str:
    return item if "://" in item else str(spec.parent / item)


class ModelIdentity(Record):
    """A model by its content."""

    family: str
    config: str
    weights: str


class TokenizerIdentity(Record):
    """A tokenizer by the content of its files, and how it is asked for the first and last token."""

    files: str
    bos: Literal["tokenizer"] = "tokenizer"


class CorpusIdentity(Record):
    """A corpus by the content of its files in order."""

    kind: Literal["text", "jsonl"]
    files: int
    content: str
    text_field: str | None = None


class Layout(Record):
    """The grid's rule: how the token axis is cut."""

    block_tokens: int
    chunk_tokens: int


class Execution(Record):
    """What else fixes the bits of a forward pass."""

    compute_dtype: DType
    attention: str
    batch_size: int


class ResolvedSpec(Record):
    """Everything that determines a dataset's content: hashes and choices, no paths, no names. Its hash is the key."""

    capture: int
    model: ModelIdentity
    tokenizer: TokenizerIdentity
    corpus: CorpusIdentity
    context: int
    packing: Literal["document"] = "document"
    max_tokens: int | None
    sites: tuple[str, ...]
    outputs: tuple[str, ...]
    quantize: Quantisation | None = None
    head: bool
    stored_dtype: DType
    execution: Execution
    layout: Layout

    @model_serializer(mode="wrap")
    def _as_before(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is not asked for, so that a spec of before it could be asked for keeps its key."""
        document: dict[str, Any] = serialise(self)
        return {name: value for name, value in document.items() if name != "quantize" or value is not None}

    @property
    def stored_as(self) -> str:
        """In which dtype the sites are stored; the kinds of their quantised forms where there is nothing else."""
        return ", ".join(self.quantize.kinds) if self.quantize is not None and self.quantize.only else self.stored_dtype

    def key(self) -> str:
        """The dataset's key."""
        return self.content_hash()

    def tokens_key(self) -> str:
        """Equal for datasets that hold the same tokens of the same model, whatever the sites, dtype and layout."""
        names = ("capture", "model", "tokenizer", "corpus", "context", "packing", "max_tokens")
        whole = self.document()
        return digest({name: whole[name] for name in names})


def difference(here: ResolvedSpec, asked: ResolvedSpec) -> list[str]:
    """Every field in which two specs differ, as `name: what is here, not what was asked`."""
    old, new = _flat(here.document()), _flat(asked.document())
    names = [name for name in old | new if old.get(name) != new.get(name)]
    return [f"{name}: {_short(old.get(name))} here, {_short(new.get(name))} asked for" for name in names]


def _flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in document.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 3:
        return f"{len(value)} ({value[0]} … {value[-1]})"
    if isinstance(value, str) and len(value) == 64:
        return value[:12] + "…"
    return str(value)
