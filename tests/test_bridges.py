"""Other libraries train from a dataset: scikit-learn, Hugging Face datasets, SAELens, dictionary_learning, torchdata.

The last three are not in every environment: `make test-bridges` runs these tests in one that has them all.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import actcache as ac

SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def ds(built: str) -> ac.Dataset:
    return ac.open(built)


def test_an_endless_source_has_every_token_once_an_epoch(ds: ac.Dataset):
    import torch

    source = ds.activations(SITE, size=50, shuffle=3)
    whole = Counter(row.tobytes() for row in ds[SITE].compute())
    per_epoch = ds.n_tokens // 50
    first, second = ([next(source) for _ in range(per_epoch)] for _ in range(2))
    assert all(batch.shape == (50, 32) and batch.dtype == torch.float32 for batch in first + second)
    for epoch in (first, second):
        rows = Counter(row.tobytes() for batch in epoch for row in batch.numpy())
        assert rows.total() == per_epoch * 50
        assert rows <= whole, "none twice"
    assert not torch.equal(first[0], second[0]), "each epoch has an order of its own"
    assert source.d_in == 32
    assert source.config == {"url": ds.url, "site": SITE, "size": 50, "shuffle": 3}


def test_an_endless_source_goes_on_from_a_state(ds: ac.Dataset):
    import json

    import torch

    source = ds.activations(SITE, size=64, shuffle=1)
    per_epoch = ds.n_tokens // 64
    for taken in (3, per_epoch - 3, 5):  # within an epoch, at its end, in the next one
        for _ in range(taken):
            next(source)
        state = json.loads(json.dumps(source.state_dict()))
        again = ds.activations(SITE, size=64, shuffle=1)
        again.load_state_dict(state)
        for _ in range(7):
            assert torch.equal(next(source), next(again))
        source = again
    with pytest.raises(ac.InvalidInput, match="size"):
        ds.activations(SITE, size=65, shuffle=1).load_state_dict(state)
    with pytest.raises(ac.InvalidInput, match="no full batch in an epoch"):
        ds.activations(SITE, size=ds.n_tokens + 1)


def test_scikit_learn_fits_batch_by_batch(ds: ac.Dataset):
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    scaler = preprocessing.StandardScaler()
    for batch in ds.batches(SITE, size=128, shuffle=0):
        scaler.partial_fit(batch[SITE])
    assert scaler.n_samples_seen_ == ds.n_tokens
    np.testing.assert_allclose(scaler.mean_, ds.statistics[SITE]["mean"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(scaler.var_, ds.statistics[SITE]["variance"], rtol=1e-4)


def test_a_scikit_learn_probe_learns_from_batches(ds: ac.Dataset):
    linear_model = pytest.importorskip("sklearn.linear_model")
    asked = ds.tokens["token_id"] % 2 == 0
    view, direction = ds.where(asked), np.random.default_rng(0).standard_normal(32)
    probe = linear_model.SGDClassifier(loss="log_loss", random_state=0)
    batches = view.batches(SITE, size=64, shuffle=0, columns="token_id", normalise="standard")
    for epoch in range(10):
        batches.set_epoch(epoch)
        for batch in batches:
            assert (batch["token_id"] % 2 == 0).all()
            probe.partial_fit(batch[SITE], batch[SITE] @ direction > 0, classes=[False, True])
    (batch,) = ds.where(~asked).batches(SITE, size=ds.n_tokens, normalise="standard")
    assert probe.score(batch[SITE], batch[SITE] @ direction > 0) > 0.9


def test_a_selection_becomes_a_dataset_of_hugging_face(built_by_dtype: dict[str, str], tmp_path: Path):
    import datasets

    for dtype in ("float32", "float16"):
        ds = ac.open(built_by_dtype[dtype])
        some = ds.where(position__gt=2)
        made = some.to_datasets(
            tmp_path / f"{dtype}.arrow", [SITE, ds.sites[0]], columns=("token_id", "loss"), dtype="stored"
        )
        assert made.num_rows == some.n_tokens
        assert made.features[SITE] == datasets.List(datasets.Value(dtype), length=32)
        found = made.with_format("numpy")[:]
        assert np.array_equal(found[SITE], some.site(SITE, "stored").compute())
        assert np.array_equal(found["token"], np.flatnonzero(ds.tokens["position"] > 2))
        assert np.array_equal(found["token_id"], some.tokens["token_id"])
        assert np.array_equal(found["loss"], some["loss"].compute(), equal_nan=True)
    shuffled = made.shuffle(seed=0).select(range(10)).with_format("torch")
    assert shuffled[SITE][:].shape == (10, 32)
    made.save_to_disk(tmp_path / "saved")
    assert datasets.load_from_disk(tmp_path / "saved").num_rows == made.num_rows


def test_what_cannot_become_one_is_refused(built_by_dtype: dict[str, str], tmp_path: Path):
    ds = ac.open(built_by_dtype["bfloat16"])
    with pytest.raises(ac.InvalidInput, match="Arrow has no bfloat16"):
        ds.to_datasets(tmp_path / "a.arrow", SITE, dtype="stored")
    with pytest.raises(ac.NotFound, match="no field 'los'"):
        ds.to_datasets(tmp_path / "a.arrow", SITE, columns=("los",))
    (tmp_path / "there").touch()
    with pytest.raises(ac.InvalidInput, match="exists"):
        ds.to_datasets(tmp_path / "there", SITE)
    assert [path.name for path in tmp_path.iterdir()] == ["there"], "nothing half-written is left"
    empty = ds.where(position__lt=0).to_datasets(tmp_path / "empty.arrow", SITE)
    assert empty.num_rows == 0


def test_saelens_trains_on_it(ds: ac.Dataset):
    pytest.importorskip("sae_lens")
    import torch
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(0)
    source = ds.activations(SITE, size=64, shuffle=0, normalise="scale")
    sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=source.d_in, d_sae=64, l1_coefficient=1e-3))
    before = _unexplained(sae, source)
    settings = SAETrainerConfig(total_training_samples=64 * 300, train_batch_size_samples=64, lr=3e-3, lr_end=3e-3)
    trainer = SAETrainer(cfg=settings, sae=sae, data_provider=source)
    trained = trainer.fit()
    assert _unexplained(trained, source) < 0.5 * before


def _unexplained(sae, source) -> float:
    import torch

    with torch.no_grad():
        rows = next(source)
        return float(((sae(rows) - rows) ** 2).mean())


def test_dictionary_learning_trains_on_it(ds: ac.Dataset, tmp_path: Path):
    pytest.importorskip("dictionary_learning")
    import json

    from dictionary_learning import AutoEncoder
    from dictionary_learning.trainers import StandardTrainer
    from dictionary_learning.training import trainSAE

    source = ds.activations(SITE, size=64, shuffle=0)
    trainSAE(
        data=source,
        trainer_configs=[
            {
                "trainer": StandardTrainer, "dict_class": AutoEncoder, "activation_dim": source.d_in, "dict_size": 64,
                "lr": 1e-3, "l1_penalty": 1e-2, "steps": 20, "warmup_steps": 5, "sparsity_warmup_steps": 5,
                "layer": 1, "lm_name": "tiny", "device": "cpu",
            }
        ],
        steps=20,
        save_dir=str(tmp_path),
        device="cpu",
    )  # fmt: skip
    saved = json.loads((tmp_path / "trainer_0/config.json").read_text())
    assert saved["buffer"] == source.config
    assert (tmp_path / "trainer_0/ae.pt").is_file()
