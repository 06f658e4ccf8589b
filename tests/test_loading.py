"""Loading models from several threads of one process."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from actcache.jobs.model import load_model


def test_models_loaded_at_once_have_their_weights_tied_and_so_has_the_next(model: Path):
    def load(_: int) -> bool:
        loaded, _ = load_model(model, "gpt2", "float32", None)
        return loaded.lm_head.weight.data_ptr() == loaded.transformer.wte.weight.data_ptr()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(load, range(24)))
    assert load(0)
