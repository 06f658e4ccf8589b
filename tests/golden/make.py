"""Makes the golden datasets of a format version: `python -m tests.golden.make FOLDER [NAME...]`, by default all.

What a released version wrote is never made again: the datasets in `tests/golden/` are read by every later version. A minor
version needs only what is new in it: 1.1 has `text` alone.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import actcache as ac
from tests.golden.describe import describe
from tests.models import save_gpt2, write_corpus

TEXT = "Grüße für 10 €: 🦜\n"


def plain(dtype: str) -> Callable[[Path, str, str], None]:
    """A dataset of one stored dtype; that of float32 has everything a first build could store in 1.0."""

    def make(url: Path, model: str, corpus: str) -> None:
        spec = ac.Spec(
            model=model,
            corpus=(corpus,),
            dtype=dtype,
            block_tokens=128,
            chunk_tokens=32,
            outputs=("loss",) if dtype == "float32" else (),
            head=dtype == "float32",
            sites="all" if dtype == "float32" else "resid",
        )
        ac.build(spec, url)

    return make


def grown(url: Path, model: str, corpus: str) -> None:
    """Two generations, with quantised sites and every output."""
    spec = ac.Spec(
        model=model,
        corpus=(corpus,),
        block_tokens=128,
        chunk_tokens=32,
        outputs=("loss", "entropy", "topk=3"),
        quantize=("int8", "fp8"),
    )
    ac.build(spec, url)
    ac.build(spec, url, add_sites="blocks.1.hook_mlp_out module:transformer.h.0.mlp.act")


def text(url: Path, model: str, corpus: str) -> None:
    """The tokenizer's files, for characters of several tokens each."""
    path = Path(corpus).parent / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    ac.build(ac.Spec(model=model, corpus=(str(path),), block_tokens=128, chunk_tokens=32, head=False), url)


DATASETS = {
    **{dtype: plain(dtype) for dtype in ("float32", "float16", "bfloat16")},
    "grown": grown,
    "text": text,
}


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:] or list(DATASETS)
    expected = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = save_gpt2(Path(scratch) / "golden-gpt2", layers=2, width=16, context=16, seed=1)
        corpus = write_corpus(Path(scratch) / "corpus", documents=5, seed=1)
        for name in names:
            DATASETS[name](folder / f"{name}.zarr", str(model), corpus)
            expected[name] = describe(ac.open(folder / f"{name}.zarr"))
    (folder / "expected.json").write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
