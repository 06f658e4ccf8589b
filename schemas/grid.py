"""The grid of a dataset: every array and every key that follow from a plan and the number of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from actcache.schemas.array import ArrayLayout, piece
from actcache.schemas.outputs import output_layouts
from actcache.schemas.plan import RECORDS, Plan, TokensRecord, added_records
from actcache.schemas.quantised import quantised_layouts

TOKEN_SHARD_ROWS = 1 << 22
TOKEN_CHUNK_ROWS = 1 << 14
SMALL_SHARD_BYTES = 64 << 20
NORMS = "norm/"
TOKEN_DTYPES = {
    "token_id": "int32",
    "position": "int32",
    "sequence": "int64",
    "document": "int64",
    "document_position": "int64",
    "special": "uint8",
}
TOKEN_ARRAYS = (*TOKEN_DTYPES, "sequence_start", "document_row")
BOS_FLAG, EOS_FLAG = 1, 2
_MEANING = {
    "token_id": "id of the token in the tokenizer's vocabulary",
    "position": "index of the token in its sequence",
    "sequence": "index of the sequence that owns the token",
    "document": "index of the document that owns the token",
    "document_position": "index of the token in its document",
    "special": f"flags: {BOS_FLAG} beginning of sequence, {EOS_FLAG} end of sequence, {BOS_FLAG | EOS_FLAG} where one id is both",
    "sequence_start": "row splits of the token axis: sequence i is tokens [sequence_start[i], sequence_start[i+1])",
    "document_row": "index of the source file, and of the row in it",
}


@dataclass(frozen=True)
class Grid:
    """The arrays of a build whose tokens are counted.

    `number` is that of the build's array of norms: 0 is the first build's, an added build claims the next that is free.
    """

    plan: Plan
    n_tokens: int
    n_sequences: int
    n_documents: int
    number: int = 0

    @classmethod
    def of(cls, plan: Plan, tokens: TokensRecord, number: int = 0) -> Grid:
        """The grid of a plan and its tokens."""
        return cls(plan, tokens.n_tokens, tokens.n_sequences, tokens.n_documents, number)

    @property
    def records(self) -> str:
        """Folder of the build's records."""
        return added_records(self.plan.key) if self.number else RECORDS

    @property
    def block_tokens(self) -> int:
        """Tokens a block."""
        return self.plan.spec.layout.block_tokens

    @property
    def n_blocks(self) -> int:
        """Number of blocks."""
        return -(-self.n_tokens // self.block_tokens)

    def block_range(self, block: int) -> tuple[int, int]:
        """First token and end token of a block."""
        return block * self.block_tokens, min((block + 1) * self.block_tokens, self.n_tokens)

    def site(self, name: str) -> ArrayLayout:
        """The array of a site, (token, width)."""
        layout, width = self.plan.spec.layout, self.width(name)
        return ArrayLayout(
            name,
            (self.n_tokens, width),
            self.plan.spec.stored_dtype,
            layout.block_tokens,
            layout.chunk_tokens,
            ("token", width_dimension(width, self.plan.model.d_model)),
        )

    def width(self, site: str) -> int:
        """Length of a site's vectors."""
        return self.plan.widths.get(site, self.plan.model.d_model)

    @property
    def norm(self) -> ArrayLayout:
        """L2 norms, (token, site). That of an added build names the build, and so is its claim to all that it adds."""
        layout, sites = self.plan.spec.layout, self.plan.spec.sites
        vector = "stored vector" if self.exact_sites else "vector before it was quantised"
        claim = {"build": self.plan.key, "outputs": [*self.quantised, *self.outputs]} if self.number else {}
        return ArrayLayout(
            f"{NORMS}{self.number}",
            (self.n_tokens, len(sites)),
            "float32",
            layout.block_tokens,
            piece(layout.block_tokens, TOKEN_CHUNK_ROWS),
            ("token", "site"),
            {"sites": list(sites), "meaning": f"L2 norm of the {vector}", **claim},
        )

    @property
    def outputs(self) -> dict[str, ArrayLayout]:
        """The arrays of the outputs asked for, by name."""
        return output_layouts(self.plan.spec.outputs, self.n_tokens, self.block_tokens)

    @property
    def exact_sites(self) -> tuple[str, ...]:
        """The sites whose values are stored as they are."""
        asked = self.plan.spec.quantize
        return () if asked is not None and asked.only else self.plan.spec.sites

    @property
    def quantised(self) -> dict[str, ArrayLayout]:
        """The arrays of the quantised sites by name, scales after their codes."""
        asked = self.plan.spec.quantize
        if asked is None:
            return {}
        found = (
            quantised_layouts(self.site(s), kind, asked.group) for s in self.plan.spec.sites for kind in asked.kinds
        )
        return {layout.name: layout for pair in found for layout in pair}

    def block_arrays(self) -> Iterator[ArrayLayout]:
        """Every array of which a block holds one shard: the sites, then their quantised forms, norms and outputs."""
        for name in self.exact_sites:
            yield self.site(name)
        yield from self.quantised.values()
        yield self.norm
        yield from self.outputs.values()

    def token_arrays(self) -> dict[str, ArrayLayout]:
        """Every array that tokenising writes."""
        of_tokens = self.plan.spec.corpus.kind != "items"
        return token_layouts(self.n_tokens, self.n_sequences, self.n_documents, of_tokens)

    def statistics(self) -> dict[str, int]:
        """Each site's width, in the order of a block's statistics object."""
        return {site: self.width(site) for site in self.plan.spec.sites}


def width_dimension(width: int, d_model: int) -> str:
    """Name of an axis of that length: `d_model` for that length alone, since xarray wants one length a name."""
    return "d_model" if width == d_model else f"width_{width}"


def token_layouts(n_tokens: int, n_sequences: int, n_documents: int, of_tokens: bool = True) -> dict[str, ArrayLayout]:
    """The arrays of the token axis and its owners; items of a user's own have no ids and no special flags."""

    def layout(name: str, shape: tuple[int, ...], dtype: str, dimensions: tuple[str, ...]) -> ArrayLayout:
        attributes = {"meaning": _MEANING[name]}
        return ArrayLayout(name, shape, dtype, TOKEN_SHARD_ROWS, TOKEN_CHUNK_ROWS, dimensions, attributes)

    arrays = {
        name: layout(name, (n_tokens,), dtype, ("token",))
        for name, dtype in TOKEN_DTYPES.items()
        if of_tokens or name not in ("token_id", "special")
    }
    arrays["sequence_start"] = layout("sequence_start", (n_sequences + 1,), "int64", ("sequence_edge",))
    arrays["document_row"] = layout("document_row", (n_documents, 2), "int64", ("document_index", "source_and_row"))
    return arrays


def whole_layout(
    name: str, shape: tuple[int, ...], dtype: str, dimensions: tuple[str, ...], **attributes: object
) -> ArrayLayout:
    """An array that is written at once: head weights, statistics. Shards of at most 64 MiB, chunks of at most 1 MiB."""
    one = ArrayLayout(name, shape, dtype, 1, 1, dimensions, attributes)
    shard = max(1, min(shape[0], SMALL_SHARD_BYTES // max(1, one.row_bytes)))
    chunk = max(1, min(shard, (1 << 20) // max(1, one.row_bytes)))
    return ArrayLayout(name, shape, dtype, -(-shard // chunk) * chunk, chunk, dimensions, attributes)
