"""The examples that train a small model, each run with few steps: what they print and claim is consistent."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import actcache as ac

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def loaded() -> Iterator[dict[str, ModuleType]]:
    """The examples, imported as running one of them does: from their own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        before = set(sys.modules)
        import normal_and_myopic
        import rwkv
        import training

        yield {"normal_and_myopic": normal_and_myopic, "rwkv": rwkv, "training": training}
        for name in ("normal_and_myopic", "looking_ahead", "rwkv", "training", "value_myopic_gpt"):
            if name not in before:
                del sys.modules[name]


@pytest.fixture(scope="module")
def few_files(loaded: dict[str, ModuleType]) -> Iterator[None]:
    """A standard library of so few files that a test takes seconds; some of them are held out in each example."""
    training = loaded["training"]
    files = training.standard_library()
    held = sorted((p for p in files if training.held_out(p)), key=lambda p: p.stat().st_size)
    others = [p for p in files if not training.held_out(p, 64) and 2_000 < p.stat().st_size < 9_000]
    chosen = sorted(held[:24] + others[:10])
    with pytest.MonkeyPatch.context() as patch:
        for name in ("normal_and_myopic", "rwkv"):
            patch.setattr(loaded[name], "standard_library", lambda: chosen)
        yield


def pair(loaded: dict[str, ModuleType]) -> list[torch.nn.Module]:
    models = []
    for myopic in (True, False):
        torch.manual_seed(1)
        models.append(loaded["normal_and_myopic"].ValueMyopicGPT(50, 32, 16, 2, myopic=myopic))
    return models


def touched(model: torch.nn.Module, position: int) -> list[bool]:
    """To which columns' embeddings the gradient of one position's loss comes."""
    kept: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
        kept.append(out.detach().requires_grad_(True))
        return kept[-1]

    handle = model.tokens.register_forward_hook(keep)
    logits = model(torch.arange(9)[None])
    handle.remove()
    torch.nn.functional.cross_entropy(logits[:, position], torch.tensor([3])).backward()
    return (kept[0].grad[0].abs().sum(1) > 0).tolist()


def test_both_gpts_compute_the_same_and_learn_differently(loaded: dict[str, ModuleType]):
    myopic, normal = pair(loaded)
    ids = torch.randint(50, (4, 32), generator=torch.Generator().manual_seed(0))
    assert torch.equal(myopic(ids), normal(ids))
    assert touched(myopic, 5) == [position == 5 for position in range(9)]
    assert touched(normal, 5) == [position <= 5 for position in range(9)]
    loss_of = loaded["training"].loss_of
    for model in (myopic, normal):
        model.zero_grad()
        loss_of(model, ids).backward()
    own = [model.unembedding.weight.grad for model in (myopic, normal)]
    assert torch.allclose(*own, atol=1e-7), "the head is trained alike"
    assert not torch.allclose(*(model.blocks[0].attention.qkv.weight.grad for model in (myopic, normal)), atol=1e-4)


def test_the_loss_is_that_of_the_next_token(loaded: dict[str, ModuleType]):
    model = pair(loaded)[1].eval()
    tokens = np.random.default_rng(0).integers(50, size=100)
    with torch.inference_mode():
        windows = torch.from_numpy(tokens[:96].reshape(3, 32))
        log = model(windows).log_softmax(-1)
    want = -np.mean([log[w, i, windows[w, i + 1]].item() for w in range(3) for i in range(31)])
    assert loaded["training"].cross_entropy(model, tokens, 32, batch=2) == pytest.approx(want, rel=1e-5)


def test_a_difference_of_a_thing_with_itself_is_none_and_a_planted_one_is_found(loaded: dict[str, ModuleType]):
    example = loaded["normal_and_myopic"]
    rng = np.random.default_rng(0)
    counts = rng.integers(50, 200, size=40)
    sums = [(rng.gamma(3, 1, size=(40, 3)) * counts[:, None], counts) for _ in range(2)]
    none = example.difference(sums, sums)
    assert not none["loss_difference"].any()
    assert not np.any(none.interval("loss_difference"))
    worse = [(each + [0, 0.5, 0.25] * counts[:, None], counts) for each, _ in sums]
    for beyond in (False, True):
        found = example.difference(worse, sums, beyond)
        np.testing.assert_allclose(found["loss_difference"], [0, 0.5, 0.25])
        np.testing.assert_allclose(
            found.interval("loss_difference"), [[0, 0.5, 0.25]] * 2, err_msg="pairs, so no spread"
        )
    shifted = [(each + 0.7 * counts[:, None], counts) for each, _ in sums]
    np.testing.assert_allclose(example.difference(shifted, sums, True)["loss_difference"], 0, atol=1e-12)


def test_normal_and_myopic_runs_to_its_end(
    loaded: dict[str, ModuleType], few_files: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    example = loaded["normal_and_myopic"]
    found = example.main(tmp_path, seeds=1, steps=25, tokens=8_000, every=1)
    said = capsys.readouterr().out
    before = [line.split(": ")[1] for line in said.splitlines() if "before" in line]
    assert len(before) == 2
    assert len(set(before)) == 1, "before training both have the same loss"
    assert {path.name for path in tmp_path.glob("*.png")} == {"same-steps.png", "equal-loss.png"}
    datasets = [ac.open(str(path)) for path in sorted(tmp_path.glob("seed-0/*.zarr"))]
    assert len(datasets) == 3
    for ds in datasets[1:]:
        np.testing.assert_array_equal(ds.tokens["token_id"], datasets[0].tokens["token_id"])
    for name, (by_offset,) in found.items():
        for offset, (sums, counts) in by_offset.items():
            assert sums.shape == (len(counts), 5)
            assert counts.sum() == len(ac.lens.states(datasets[0], offset=offset)), name
    own = ac.lens.logit(datasets[0])["loss"][-1]
    assert datasets[0].url.endswith("myopic.zarr")
    sums, counts = found[example.MYOPIC][0][0]  # of the first seed, the next token
    assert sums[:, -1].sum() / counts.sum() == pytest.approx(own, rel=1e-5), "two halves are all documents"


def test_rwkv_runs_to_its_end(
    loaded: dict[str, ModuleType], few_files: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    found = loaded["rwkv"].main(tmp_path, steps=3, tokens=6_000, every=1)
    said = capsys.readouterr().out
    assert "held-out loss" in said
    for name, layers in (("rwkv", 5), ("gpt", 7)):
        ds = ac.open(str(tmp_path / f"{name}.zarr"))
        assert len(ds.residual_states) == layers
        losses = [found[name][f"{kind} lens"]["loss"] for kind in ("logit", "ridge", "tuned")]
        assert len({round(loss[-1], 5) for loss in losses}) == 1, "every lens reads the last state as it is"
        penalty = found[name]["transfer, tuned lens"]["penalty"]
        assert not np.diagonal(penalty).any()
        assert {path.name for path in tmp_path.glob(f"{name}-*.png")} == {
            f"{name}-{what}.png" for what in ("loss", "kl", "transfer")
        }
    ids = [ac.open(str(tmp_path / f"{name}.zarr")).tokens["token_id"] for name in ("rwkv", "gpt")]
    np.testing.assert_array_equal(*ids)
    assert found["gpt"]["tuned lens"]["loss"][2] < found["gpt"]["logit lens"]["loss"][2]
