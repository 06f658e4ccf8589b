"""The control for what lenses claim: an example that must keep showing what its page says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import actcache as ac
from tests.test_capturable import example


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Such small products take longer on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_readout_serves_earlier_layers_where_there_are_residual_connections_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    module = example("lens_on_a_cnn")
    monkeypatch.setattr(module, "IMAGES", 700)
    monkeypatch.setattr(module, "FITTED", 300)
    module.main(tmp_path / "printed", steps=2, fit=False)
    assert "covariance_cosine_rotated" in capsys.readouterr().out
    loss, content, basis = {}, {}, {}
    for residual in (False, True):
        _, measured = module.cached(residual, 80, tmp_path)
        assert (measured.n_layers, measured.width, measured.vocabulary) == (6, module.WIDTH, module.CLASSES)
        assert len(measured) == 400
        loss[residual] = ac.lens.logit(measured)["loss"]
        alike = ac.geometry.similarity(measured)
        content[residual] = np.diag(alike["cka"], 1)
        basis[residual] = np.diag(alike["covariance_cosine"] - alike["covariance_cosine_rotated"], 1)
    chance = np.log(module.CLASSES)
    assert loss[False][-1] < 0.5 * chance
    assert np.all(loss[False][:-1] > chance - 0.3), "at chance until the last layer"
    assert np.all(np.diff(loss[True][1:]) < 0), "every layer better than the one before"
    assert np.all(content[False][1:] > 0.5), "layers hold the same content"
    assert np.all(basis[False] < 0.2), "in bases of their own"
    assert np.all(basis[True][2:] > 0.4), "in one basis"
