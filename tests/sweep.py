"""Every type of transformers' causal language models, tiny and random, taken apart and proven; and the table of the results.

`python -m tests.sweep` writes the table into docs/families.md and prints it; with names of types it runs those alone.
"""

from __future__ import annotations

import re
import sys
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from actcache.jobs.checkpoint import locate
from actcache.jobs.model import load_model, look_at
from actcache.jobs.parts import ModelParts
from actcache.jobs.proof import identities
from actcache.schemas.errors import ActcacheError
from tests import tiny_configs

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
GOAL = 0.9
SEQUENCES, POSITIONS = 3, 24
KINDS = ("hook_attn_out", "hook_resid_mid", "hook_mlp_out")


@dataclass(frozen=True)
class Result:
    """What became of a type: `what` is the sites beside the residual stream that it has, or why it was refused."""

    model_type: str
    passed: bool
    what: str

    @property
    def group(self) -> str:
        """What kind of model it is."""
        if self.model_type in tiny_configs.DECODER_ONLY:
            return "decoder-only"
        if self.model_type in tiny_configs.ENCODERS:
            return "encoder"
        return "decoder half" if self.model_type in tiny_configs.DECODER_HALVES else "other"

    def row(self) -> str:
        """The result as a row of the table."""
        return f"| `{self.model_type}` | {self.group} | {'passes' if self.passed else 'refused'} | {self.what} |"


def run(model_type: str) -> Result:
    """Save a tiny model of a type, load it as a build does, take it apart and check every identity, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small products take longer on several
    try:
        return _run(model_type)
    finally:
        torch.set_num_threads(threads)


def _run(model_type: str) -> Result:
    if model_type in tiny_configs.UNBUILDABLE:
        return Result(model_type, False, f"not built: {tiny_configs.UNBUILDABLE[model_type]}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as folder:
            tiny_configs.build(model_type).save_pretrained(folder)
            try:
                checkpoint = locate(folder, None)
                model, attention = load_model(checkpoint.folder, checkpoint.family, "float32", None)
                parts = ModelParts(model, look_at(model, attention, model_type))
            except ActcacheError as error:
                return Result(model_type, False, _reason(str(error).removeprefix(f"{model_type}: "), folder))
        ids = torch.randint(5, 200, (SEQUENCES, POSITIONS), generator=torch.Generator().manual_seed(3))
        mask = torch.ones_like(ids)
        mask[1, -4:] = 0
        found = identities(parts, ids * mask, mask, "float32")
    failed = [name for name, identity in found.items() if not identity.holds]
    if failed:
        return Result(model_type, False, f"fails the identities {', '.join(failed)}")
    return Result(model_type, True, _sites(parts))


def _reason(error: str, folder: str) -> str:
    """An error without its advice and without what differs from run to run."""
    error = error.removeprefix(f"{folder}: ")
    return re.sub(r"; (upgrade|describe the model).*|: [^:]*\d[^:]*$", "", error).replace("|", "/")


def _sites(parts: ModelParts) -> str:
    has = {kind: sum(site.endswith(kind) for site in parts.anatomy.sites) for kind in KINDS}
    n_layers = parts.anatomy.n_layers
    shown = [kind if count == n_layers else f"{kind} ({count} of {n_layers})" for kind, count in has.items() if count]
    return ", ".join(shown) or "the residual stream alone"


def table(results: Iterable[Result]) -> str:
    """The results as a Markdown table, and what share of the decoder-only types passes."""
    results = list(results)
    ours = [result for result in results if result.group == "decoder-only"]
    passed = sum(result.passed for result in ours)
    head = [
        f"{passed} of {len(ours)} decoder-only types pass ({passed / len(ours):.0%}), and "
        f"{sum(r.passed for r in results)} of all {len(results)}.",
        "",
        "| model type | kind | result | sites beside the residual stream, or why not |",
        "|---|---|---|---|",
    ]
    return "\n".join([*head, *(result.row() for result in results)]) + "\n"


PAGE = Path(__file__).parent.parent / "docs" / "families.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"


def documented() -> str:
    """The table as the docs have it."""
    return PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]


def remembered(model_type: str) -> Result:
    """A type's result as the docs have it."""
    row = next(row for row in documented().splitlines() if row.startswith(f"| `{model_type}` |"))
    _, _, verdict, what = row.strip("| ").split(" | ", 3)
    return Result(model_type, verdict == "passes", what)


if __name__ == "__main__":
    chosen = sys.argv[1:] or TYPES
    results = [run(model_type) if model_type in chosen else remembered(model_type) for model_type in TYPES]
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(before + BEGIN + table(results) + END + after, encoding="utf-8")
    print(documented())
