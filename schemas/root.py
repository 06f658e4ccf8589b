"""The root of a sealed dataset, `zarr.json`: what its attributes say."""

from __future__ import annotations

from typing import Any, Literal

from actcache.schemas.order import model_order
from actcache.schemas.plan import RECORDS, Labels, ModelShape, added_records
from actcache.schemas.quantised import Damage
from actcache.schemas.record import Record
from actcache.schemas.spec import ResolvedSpec
from actcache.schemas.tokenizer import TokenizerFile

ROOT_KEY = "zarr.json"
ROOTS = f"{RECORDS}roots/"
MAX_ROOT_BYTES = 64 << 20


class ReplayResult(Record):
    """What became of running a few stored sequences through the model once more."""

    status: Literal["replayed", "not replayed"]
    sequences: tuple[int, ...] = ()
    largest_relative_error: float | None = None
    tolerance: float | None = None


class Provenance(Record):
    """Where a generation comes from. What varies with time and host stands here and nowhere else."""

    spec: ResolvedSpec
    labels: Labels
    model: ModelShape
    site_meaning: dict[str, str]
    software: dict[str, str | None]
    environments: tuple[dict[str, Any], ...]
    mixed_environments: bool
    mixed_attempts: tuple[str, ...]
    replay: ReplayResult
    began: str | None
    sealed: str


class Generation(Record):
    """The sites that one build stored: the first build, then each added one, in the order of their seals.

    `sites` have their values as they are, `only_quantised` are there in quantised form alone.
    """

    key: str
    manifest: str
    sites: tuple[str, ...]
    only_quantised: tuple[str, ...] = ()
    provenance: Provenance

    @property
    def captured(self) -> tuple[str, ...]:
        """Every site of the build in any form: those that have norms and statistics."""
        return (*self.sites, *self.only_quantised)


class ArrayRole(Record):
    """What an array is for. A reader ignores roles that it does not know.

    The role `quantised` has the `kind`, the site that it is `of`, the array of its `scale`s, how many dimensions (`group`) share
    one, and the `damage` done; the role `scale` has what it is `of`.
    """

    role: str
    generation: int = 0
    kind: str | None = None
    of: str | None = None
    scale: str | None = None
    group: int | None = None
    damage: Damage | None = None


class RootAttributes(Record):
    """`attributes.actcache` of the root. `tokenizer` is empty where no tokenizer is stored."""

    format: str
    digest: str
    tokens_key: str
    n_tokens: int
    n_sequences: int
    n_documents: int
    d_model: int
    bos_token_id: int | None
    eos_token_id: int | None
    generations: tuple[Generation, ...]
    arrays: dict[str, ArrayRole]
    tokenizer: tuple[TokenizerFile, ...] = ()

    @property
    def sites(self) -> list[str]:
        """Every activation site with its values as they are, in model order."""
        return model_order([generation.sites for generation in self.generations])

    @property
    def captured(self) -> list[str]:
        """Every site in any form, in model order."""
        return model_order([generation.captured for generation in self.generations])

    def records(self, generation: int) -> str:
        """Folder of the records of a generation's build."""
        return RECORDS if generation == 0 else added_records(self.generations[generation].key)


def root_key(number: int) -> str:
    """Key under which the root of `number` generations is claimed; the first is `zarr.json` itself."""
    return f"{ROOTS}{number:06d}.json"
