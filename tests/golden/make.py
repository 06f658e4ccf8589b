"""Makes the golden datasets of a format version: `python -m tests.golden.make FOLDER`.

What a released version wrote is never made again: the datasets in `tests/golden/1.0` are read by every later version.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import actcache as ac
from tests.golden.describe import describe
from tests.models import save_gpt2, write_corpus


def main() -> None:
    folder = Path(sys.argv[1])
    expected = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = save_gpt2(Path(scratch) / "golden-gpt2", layers=2, width=16, context=16, seed=1)
        corpus = write_corpus(Path(scratch) / "corpus", documents=5, seed=1)
        for dtype in ("float32", "float16", "bfloat16"):
            spec = ac.Spec(
                model=str(model),
                corpus=(corpus,),
                dtype=dtype,
                block_tokens=128,
                chunk_tokens=32,
                outputs=("loss",) if dtype == "float32" else (),
                head=dtype == "float32",
                sites="all" if dtype == "float32" else "resid",
            )
            ac.build(spec, folder / f"{dtype}.zarr")
            expected[dtype] = describe(ac.open(folder / f"{dtype}.zarr"))
        grown = ac.Spec(
            model=str(model),
            corpus=(corpus,),
            block_tokens=128,
            chunk_tokens=32,
            outputs=("loss", "entropy", "topk=3"),
            quantize=("int8", "fp8"),
        )
        ac.build(grown, folder / "grown.zarr")
        ac.build(grown, folder / "grown.zarr", add_sites="blocks.1.hook_mlp_out module:transformer.h.0.mlp.act")
        expected["grown"] = describe(ac.open(folder / "grown.zarr"))
    (folder / "expected.json").write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
