"""What a user asks for, and what determines a dataset's content.

A `Spec` names a model and a corpus by path or hub id, with defaults still open. Resolving it gives a `ResolvedSpec`:
every choice made, names and paths replaced by hashes. The hash of that is the dataset's key.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    InstanceOf,
    SerializerFunctionWrapHandler,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_serializer,
)

from actcache.schemas.canonical import digest
from actcache.schemas.capturable import Capturable
from actcache.schemas.corpora import Bos, CorpusIdentity, Cutting, Long, Selection, TokenDType
from actcache.schemas.errors import InvalidInput
from actcache.schemas.outputs import parse_outputs
from actcache.schemas.quantised import Kind, Quantisation, parse_kinds
from actcache.schemas.record import Record, first_problem

CAPTURE_VERSION = 1
"""Raised whenever a change of the code changes what is captured from the same spec."""

DType = Literal["float32", "float16", "bfloat16"]
Positive = Field(default=None, ge=1)
NotNegative = Field(default=None, ge=0, lt=1 << 63)


class Spec(BaseModel):
    """What to build, as a user says it; the same names serve the command line, TOML files and Python.

    Attributes:
        model: a hub id, or a folder that `save_pretrained` wrote; in Python also a `Capturable`.
        revision: branch, tag or commit of a hub model.
        corpus: files by path, `s3://` or `http(s)://`, or globs of them, in the order to be read: text, JSONL, CSV,
            Parquet, `.npy` or `.bin` tokens; folders that a dataset's `save_to_disk` wrote; `hf://datasets/org/name`.
            An added build needs none.
        split, dataset_config: which split (default train) and configuration of a dataset of Hugging Face.
        text_field: the field of a row that holds its text.
        tokens_field: the field that holds a row's token ids, if it is tokenised already.
        messages_field: the field that holds a row's messages, {role, content} each, for the tokenizer's chat template.
        token_dtype: the dtype of `.bin` files, little-endian; default uint16.
        split_at_eos: cut `.npy` and `.bin` token files into documents after each EOS.
        corpus_anonymous: read an S3 corpus without signing requests, for public buckets.
        strict: stop at the first row that cannot be used, instead of counting it.
        context: the longest sequence, in tokens. Default: 1024, or the model's own if shorter.
        long: what becomes of a longer document: `split` into sequences, `truncate` to one, or overlapping windows that
            begin `stride` tokens after each other.
        pack: join the documents, each ended by EOS, and cut the stream into sequences of `context` tokens.
        bos: `tokenizer` as it adds it, `always` before every sequence, `never`.
        bos_id, eos_id: ids of beginning and end of sequence; default the tokenizer's own.
        min_tokens, max_document_tokens: shorter or longer documents are dropped.
        shuffle: seed of a random order of the documents.
        sample: take this many documents at random.
        max_documents: stop after this many documents.
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
        batch_tokens: tokens a forward pass, pads included, of sequences of like length; `auto` finds by trial what the device's
            memory allows. Default 8192.
        compile: run the blocks compiled by `torch.compile`; for sites between blocks, such as `resid`.
        batch_size: so many sequences a forward pass instead, in their order, whatever their lengths.
        block_tokens: tokens a block: the unit of work and of commit, and the rows of a shard.
        chunk_tokens: rows of a chunk, the smallest piece that is read.
        model_license, corpus_license: recorded in the provenance; a model card's licence is found by itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: Annotated[str | InstanceOf[Capturable], WithJsonSchema({"type": "string"})]
    corpus: tuple[str, ...] = ()
    revision: str | None = None
    split: str | None = None
    dataset_config: str | None = None
    text_field: str = "text"
    tokens_field: str | None = None
    messages_field: str | None = None
    token_dtype: TokenDType | None = None
    split_at_eos: bool = False
    corpus_anonymous: bool = False
    strict: bool = False
    context: int | None = Positive
    long: Long = "split"
    stride: int | None = Positive
    pack: bool = False
    bos: Bos = "tokenizer"
    bos_id: int | None = NotNegative
    eos_id: int | None = NotNegative
    min_tokens: int | None = Positive
    max_document_tokens: int | None = Positive
    shuffle: int | None = NotNegative
    sample: int | None = Positive
    max_documents: int | None = Positive
    sites: str = "resid"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    compute_dtype: DType | None = None
    attention: str | None = Field(default=None, pattern=r"^[a-z0-9_]+$")
    outputs: tuple[str, ...] = ()
    quantize: tuple[Kind, ...] = ()
    only_quantized: bool = False
    head: bool = True
    max_tokens: int | None = Positive
    batch_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    batch_size: int | None = Positive
    compile: bool = False
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
    """A tokenizer by the content of its files."""

    files: str


class Layout(Record):
    """The grid's rule: how the token axis is cut."""

    block_tokens: int
    chunk_tokens: int


class Execution(Record):
    """What else fixes the bits of a forward pass.

    `batch_tokens` a batch of sequences of like length, or `batch_size` sequences; `compile` whether blocks are compiled.
    """

    compute_dtype: DType
    attention: str
    batch_size: int | None = None
    batch_tokens: int | None = None
    compile: bool | None = None

    @model_serializer(mode="wrap")
    def _one_limit(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        document: dict[str, Any] = serialise(self)
        return {name: value for name, value in document.items() if value is not None}


_IF_ASKED = ("quantize", "modules")


class ResolvedSpec(Record):
    """Everything that determines a dataset's content: hashes and choices, no paths, no names. Its hash is the key.

    `modules` says of sites that the user named of which module each is the output.
    """

    capture: int
    model: ModelIdentity
    tokenizer: TokenizerIdentity | None
    corpus: CorpusIdentity
    selection: Selection = Selection()
    context: int
    packing: Literal["document", "stream"] = "document"
    cutting: Cutting = Cutting()
    max_tokens: int | None
    sites: tuple[str, ...]
    modules: dict[str, str] | None = None
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
        return {name: value for name, value in document.items() if name not in _IF_ASKED or value is not None}

    @property
    def stored_as(self) -> str:
        """In which dtype the sites are stored; the kinds of their quantised forms where there is nothing else."""
        return ", ".join(self.quantize.kinds) if self.quantize is not None and self.quantize.only else self.stored_dtype

    def key(self) -> str:
        """The dataset's key."""
        return self.content_hash()

    def tokens_key(self) -> str:
        """Equal for datasets that hold the same tokens of the same model, whatever the sites, dtype and layout."""
        names = ("capture", "model", "tokenizer", "corpus", "selection", "context", "packing", "cutting", "max_tokens")
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
