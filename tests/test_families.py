"""Every causal language model type of transformers: what the docs say of it is what a tiny random one of it shows."""

from __future__ import annotations

import pytest

from tests import sweep


@pytest.mark.parametrize("model_type", sweep.TYPES)
def test_a_type_is_captured_or_refused_as_the_docs_say(model_type: str):
    result = sweep.run(model_type)
    print(result.row())
    assert result.row() in sweep.documented().splitlines()


def test_the_docs_name_every_type_once_and_nine_of_ten_decoders_pass():
    rows = [line for line in sweep.documented().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(sweep.TYPES)
    ours = [row for row in rows if "| decoder-only |" in row]
    passing = [row for row in ours if "| passes |" in row]
    assert len(passing) >= sweep.GOAL * len(ours)
    assert sweep.documented().startswith(f"{len(passing)} of {len(ours)} decoder-only types pass")
