"""Lenses to and from folders of tuned-lens, against files and numbers that the package itself wrote."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import pickle
import shutil
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

import actcache as ac
from actcache.cache.head import Head
from actcache.clients.cli import main
from actcache.clients.lens.exchange_config import MOST_CONFIG, unembed_hash
from actcache.clients.lens.logit import token_measures
from actcache.clients.lens.translators import Lens
from tests.planted import plant
from tests.references.tuned_lens import FOLDER, matrices
from tests.test_transfer import random_lens

ARRAYS = dict(np.load(FOLDER / "arrays.npz"))
LENS = FOLDER / "lens"
CONFIG = json.loads((LENS / "config.json").read_text())
STATES = [f"layer{number}" for number in range(3)]
NORM = {"op": "layer_norm", "eps": float(ARRAYS["norm_eps"]), "gain": "norm_gain", "bias": "norm_bias"}
LINEAR = {"op": "linear", "weight": "unembedding"}
HEAD = Head([NORM, LINEAR], {name: ARRAYS[name] for name in ("unembedding", "norm_gain", "norm_bias")})


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> ac.Dataset:
    """The reference's states."""
    return plant(ARRAYS["states"], tmp_path_factory.mktemp("planted") / "ds")


@pytest.fixture
def reference(planted: ac.Dataset) -> ac.lens.States:
    """The reference's states, its head, and the next token to predict."""
    targets = np.full(ARRAYS["tokens"].shape, -1)
    targets[:, :-1] = ARRAYS["tokens"][:, 1:]
    return ac.lens.states(planted, sites=STATES, head=HEAD, targets=targets.ravel())


@pytest.fixture(scope="session")
def gpt_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of a GPT-2 with the reference's name, shape, final norm and unembedding."""
    folder = tmp_path_factory.mktemp("gpt")
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.wte.weight.copy_(torch.from_numpy(ARRAYS["unembedding"]))
        model.transformer.ln_f.weight.copy_(torch.from_numpy(ARRAYS["norm_gain"]))
        model.transformer.ln_f.bias.copy_(torch.from_numpy(ARRAYS["norm_bias"]))
    model.save_pretrained(folder / "random-gpt2")
    np.save(folder / "tokens.npy", ARRAYS["tokens"])
    spec = ac.Spec(model=str(folder / "random-gpt2"), corpus=(str(folder / "tokens.npy"),))
    ac.build(spec, folder / "ds")
    return str(folder / "ds")


@pytest.fixture
def gpt(gpt_url: str) -> ac.Dataset:
    return ac.open(gpt_url)


def saved(folder: Path) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """What a folder holds, read plainly."""
    config = json.loads((folder / "config.json").read_text())
    return config, torch.load(folder / "params.pt", weights_only=True)


def test_an_imported_lens_says_what_the_package_says(reference: ac.lens.States):
    lens = ac.lens.import_tuned_lens(LENS, reference)
    assert (lens.kind, lens.sites, lens.shared, lens.offset) == ("tuned", tuple(STATES), False, 0)
    assert lens.facts["base_model_name_or_path"] == "random-gpt2"
    assert lens.facts["unembed_hash"] == CONFIG["unembed_hash"]
    for of, name in ((lens, "tuned"), (ac.lens.identity(reference), "logit")):
        for layer in range(2):
            h = ARRAYS["states"][layer].reshape(-1, 8)
            want = ARRAYS[f"{name}_logits"][layer].reshape(-1, 20)
            np.testing.assert_allclose(of.logits(HEAD, layer, h), want, atol=1e-4)
        [(low, found)] = token_measures(of, reference)
        assert low == 0
        loss = np.concatenate([ARRAYS[f"{name}_loss"], ARRAYS["final_loss"][None]]).reshape(3, -1)
        np.testing.assert_allclose(found[0], loss, atol=1e-4)
        np.testing.assert_allclose(found[1, :2], ARRAYS[f"{name}_kl"][:, :, :-1].reshape(2, -1), atol=1e-4)
        measured = ac.lens.evaluate(of, reference)
        np.testing.assert_allclose(measured["loss"], loss.mean(-1), atol=1e-4)
        np.testing.assert_allclose(measured["kl"][:2], ARRAYS[f"{name}_kl"][:, :, :-1].mean((1, 2)), atol=1e-4)
        assert abs(measured["kl"][2]) < 1e-6


def test_an_exported_folder_is_what_the_package_writes(gpt: ac.Dataset, tmp_path: Path):
    lens = ac.lens.import_tuned_lens(LENS, gpt)
    assert lens.sites == tuple(gpt.residual_states)
    assert ac.lens.export_tuned_lens(lens, gpt, tmp_path / "out") == tmp_path / "out"
    (config, state), (want_config, want) = saved(tmp_path / "out"), saved(LENS)
    assert list(config.items()) == list((want_config | {"base_model_revision": None}).items())
    assert type(state) is type(want) is OrderedDict
    assert list(state) == list(want)
    for name, tensor in want.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor), name
    with zipfile.ZipFile(tmp_path / "out/params.pt") as ours, zipfile.ZipFile(LENS / "params.pt") as theirs:
        assert ours.namelist() == theirs.namelist()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert ac.lens.export_tuned_lens(lens, gpt, tmp_path / "named", "me/my-gpt").is_dir()
    assert saved(tmp_path / "named")[0]["base_model_name_or_path"] == "me/my-gpt"


@pytest.mark.parametrize("shared", [False, True])
def test_a_round_trip_reads_the_same(built: str, tmp_path: Path, shared: bool):
    ds = ac.open(built)
    lens = random_lens(ac.lens.states(ds), shared=shared)
    again = ac.lens.import_tuned_lens(ac.lens.export_tuned_lens(lens, ds.where(position=1), tmp_path / "a"), ds)
    assert not again.shared
    for layer in range(3):
        number = again.translator(layer)
        np.testing.assert_array_equal(again.weight[number], lens.weight[lens.translator(layer)])
        np.testing.assert_array_equal(again.bias[number], lens.bias[lens.translator(layer)])
    want, found = ac.lens.evaluate(lens, ds, max_tokens=100), ac.lens.evaluate(again, ds, max_tokens=100)
    np.testing.assert_array_equal(found["kl"], want["kl"])
    assert ac.lens.load(ac.lens.save(again, tmp_path / "file")).facts == again.facts
    joined = ac.open([built, built])
    ac.lens.export_tuned_lens(lens, joined, tmp_path / "b")
    assert saved(tmp_path / "a")[0] == saved(tmp_path / "b")[0]


def test_the_hash_is_the_packages_whatever_is_printed_how():
    expected = json.loads((FOLDER / "hashes.json").read_text())
    with np.printoptions(precision=3, threshold=5, edgeitems=1, linewidth=200, suppress=True, sign="+", legacy="1.13"):
        assert all(unembed_hash(matrix) == expected[name] for name, matrix in matrices().items())
    with np.printoptions(formatter={"float": lambda x: "x"}, nanstr="?", floatmode="fixed"):
        assert unembed_hash(ARRAYS["unembedding"].astype(np.float64)) == CONFIG["unembed_hash"]


def test_what_the_format_cannot_hold_is_refused(
    built: str, gpt: ac.Dataset, reference: ac.lens.States, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ds, out = ac.open(built), tmp_path / "out"
    lens = random_lens(ac.lens.states(ds))
    ahead = random_lens(ac.lens.states(ds, offset=2))
    few = random_lens(ac.lens.states(ds, sites=ds.residual_states[1:]))
    other = random_lens(ac.lens.states(ds, sites=[*ds.residual_states[:-1], "blocks.2.hook_mlp_out"]))
    endless = replace(lens, bias=lens.bias + np.float32(np.inf))
    for bad, of, error, said in (
        (ahead, ds, ac.InvalidInput, "2 tokens ahead"),
        (few, ds, ac.InvalidInput, "whole residual stream"),
        (other, ds, ac.InvalidInput, "blocks.2.hook_mlp_out"),
        (lens, gpt, ac.SpecMismatch, "another model"),
        (endless, ds, ac.InvalidInput, "not finite"),
        (random_lens(reference), reference.ds, ac.InvalidInput, "residual stream"),
    ):
        with pytest.raises(error, match=said) as caught:
            ac.lens.export_tuned_lens(bad, of, out)
        assert "\n" not in str(caught.value)
    heads = (
        [NORM, LINEAR, {"op": "softcap", "cap": 30.0}],
        [LINEAR],
        [NORM, LINEAR, {"op": "first", "rows": 19.0}],
        [],
    )
    for operations in heads:
        head = Head(operations, HEAD.arrays)
        monkeypatch.setattr(ds, "head", head)
        with pytest.raises(ac.Unsupported, match="norm \\+ linear alone"):
            ac.lens.export_tuned_lens(lens, ds, out)
        with pytest.raises(ac.Unsupported, match="norm \\+ linear alone"):
            ac.lens.import_tuned_lens(LENS, replace(reference, head=head))
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_and_nothing_half_written(
    gpt: ac.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lens = ac.lens.import_tuned_lens(LENS, gpt)
    (tmp_path / "empty").mkdir()
    ac.lens.export_tuned_lens(lens, gpt, tmp_path / "empty")
    before = [(path, path.read_bytes()) for path in sorted((tmp_path / "empty").iterdir())]
    (tmp_path / "file").write_text("mine")
    (tmp_path / "to file").symlink_to(tmp_path / "file")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for folder in (tmp_path / "empty", tmp_path / "file", tmp_path / "to file", "."):
        with pytest.raises(ac.InvalidInput, match="is there already"):
            ac.lens.export_tuned_lens(lens, gpt, folder)
    assert [(path, path.read_bytes()) for path in sorted((tmp_path / "empty").iterdir())] == before
    listed = sorted(tmp_path.iterdir())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def torchs(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\nframe #0")

    for module, name, failing in ((os, "fsync", full), (os, "replace", full), (torch, "save", torchs)):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, failing)
            with pytest.raises(ac.StoreError, match="cannot be written") as caught:
                ac.lens.export_tuned_lens(lens, gpt, tmp_path / "new")
        assert "\n" not in str(caught.value)
    with pytest.raises(ac.StoreError, match="cannot be written"):
        ac.lens.export_tuned_lens(lens, gpt, tmp_path / "no" / "folder")
    assert sorted(tmp_path.iterdir()) == listed


class _Runs:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, ("touch executed",))


class _Fills:
    def __reduce__(self) -> tuple[object, ...]:
        return (bytearray, (1 << 38,))


def _state(**changes: torch.Tensor | None) -> OrderedDict[str, torch.Tensor]:
    state = torch.load(LENS / "params.pt", weights_only=True)
    state.update({name.replace("_", "."): tensor for name, tensor in changes.items()})
    return OrderedDict((name, tensor) for name, tensor in state.items() if tensor is not None)


def _pt(value: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def _members(change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED) -> bytes:
    """The package's file with other members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(LENS / "params.pt") as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for name in old.namelist():
            if (content := change(name, old.read(name))) is not None:
                new.writestr(name, content)
    return buffer.getvalue()


def _pickled(content: bytes) -> bytes:
    return _members(lambda name, old: content if name.endswith("data.pkl") else old)


def _scripted() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in ("data.pkl", "constants.pkl"):
            file.writestr(f"params/{name}", b"\x80\x02}.")
    return buffer.getvalue()


def _overlapping() -> bytes:
    """Many members that are the same bytes of the file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("params/data.pkl", b"\x80\x02}.")
        file.writestr("params/data/0", bytes(1 << 19))
        for number in range(1, 50):
            again = copy.copy(file.getinfo("params/data/0"))
            again.filename = f"params/data/{number}"
            file.filelist.append(again)
    return buffer.getvalue()


GOOD = (LENS / "params.pt").read_bytes()
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "not a zip"),
    "a plain pickle that runs": (lambda: pickle.dumps(_Runs()), "not a zip"),
    "torch's old format": (lambda: _pt(_state(), _use_new_zipfile_serialization=False), "not a zip"),
    "code beside the tensors": (lambda: _pt({**_state(), "x": _Runs()}), "nothing of it was run"),
    "code alone": (lambda: _pickled(pickle.dumps(_Runs(), 2)), "nothing of it was run"),
    "code named in another way": (lambda: _pickled(pickle.dumps(_Runs(), 4)), "STACK_GLOBAL"),
    "code of an old protocol": (lambda: _pickled(b"(S'touch executed'\nios\nsystem\n."), "INST"),
    "memory": (lambda: _pickled(pickle.dumps(_Fills(), 2)), "bytearray"),
    "a scripted module": (_scripted, "2 pickles"),
    "no pickle": (lambda: _members(lambda name, old: None if name.endswith(".pkl") else old), "0 pickles"),
    "a pickle that is none": (lambda: _pickled(b"\xff\xff"), "no parameters"),
    "a pickle that ends": (lambda: _pickled(b"\x80\x02}"), "no parameters"),
    "a pickle of nothing": (lambda: _pickled(b"\x80\x02N."), "other names"),
    "a long pickle": (lambda: _pickled(b"\x80\x02" + b"N0" * (520 << 10) + b"}."), "bytes"),
    "a bomb": (lambda: _members(lambda _, old: old + b"\0" * (1 << 20), zipfile.ZIP_DEFLATED), "unpacks to more"),
    "members that share their bytes": (_overlapping, "unpacks to more"),
    "too large": (lambda: _pt(_state(x=torch.zeros(1 << 20))), "take less"),
    "too large inside": (lambda: _pickled(pickle.dumps({}, 2)) + b"\0" * (2 << 20), "take less"),
    "fewer bytes than it says": (
        lambda: _members(lambda name, old: old[:16] if "/data/" in name else old),
        "no parameters",
    ),
    "a member that is not there": (
        lambda: _members(lambda name, old: None if name.endswith("data/2") else old),
        "no parameters",
    ),
    "truncated": (lambda: GOOD[:-100], "not a zip"),
    "a name missing": (lambda: _pt(_state(**{"1_bias": None})), "other names"),
    "a name more": (lambda: _pt(_state(**{"2_bias": torch.zeros(8)})), "other names"),
    "another shape": (lambda: _pt(_state(**{"1_weight": torch.zeros(8, 9)})), r"shape \(8, 9\)"),
    "a huge shape": (lambda: _pt(_state(**{"1_bias": torch.zeros(1).expand(1 << 40)})), "shape"),
    "float64": (lambda: _pt(_state(**{"1_bias": torch.zeros(8, dtype=torch.float64)})), "DoubleStorage"),
    "integers": (lambda: _pt(_state(**{"1_bias": torch.zeros(8, dtype=torch.int32)})), "IntStorage"),
    "sparse": (lambda: _pt(_state(**{"1_weight": torch.zeros(8, 8).to_sparse()})), "sparse"),
    "no tensor": (lambda: _pt({**_state(), "1.bias": [0.0] * 8}), "no tensor"),
    "a list": (lambda: _pt(list(_state().values())), "other names"),
    "not a number": (lambda: _pt(_state(**{"1_bias": torch.full((8,), torch.nan)})), "not finite"),
    "infinite": (lambda: _pt(_state(**{"0_weight": torch.full((8, 8), -torch.inf)})), "not finite"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_parameters_are_refused_in_one_line_and_nothing_runs(
    name: str, gpt: ac.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(LENS, tmp_path / "lens")
    make, said = HOSTILE[name]
    (tmp_path / "lens/params.pt").write_bytes(make())
    with pytest.raises(ac.InvalidInput, match=said) as caught:
        ac.lens.import_tuned_lens("lens", gpt)
    assert "\n" not in str(caught.value)
    assert "params.pt" in str(caught.value)
    assert len(str(caught.value)) < 300
    assert [path.name for path in tmp_path.iterdir()] == ["lens"], "something ran"


def test_that_hostile_files_would_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.load(io.BytesIO(HOSTILE["code alone"][0]()), weights_only=False)
    assert (tmp_path / "executed").exists()


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
def test_a_changed_byte_is_read_or_refused(gpt_url: str, tmp_path_factory, place: int, value: int):
    folder = tmp_path_factory.mktemp("f")
    content = bytearray(GOOD)
    content[place] = value
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "params.pt").write_bytes(content)
    with contextlib.suppress(ac.ActcacheError):
        lens = ac.lens.import_tuned_lens(folder, ac.open(gpt_url))
        assert lens.weight.shape == (2, 8, 8)
        assert np.isfinite(lens.weight).all()


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        (b"", ac.InvalidInput, "JSON"),
        (b"\xff\xfe", ac.InvalidInput, "JSON"),
        (b"[" * 60_000, ac.InvalidInput, "JSON"),
        (b'{"d_model": ' + b"9" * 9_000 + b"}", ac.InvalidInput, "JSON"),
        (b"[]", ac.InvalidInput, "no JSON object"),
        (b" " * MOST_CONFIG + b"{}", ac.InvalidInput, "65,536 bytes"),
        ({"d_model": None}, ac.InvalidInput, "d_model is null"),
        ({"d_model": True}, ac.InvalidInput, "d_model is true"),
        ({"d_model": 8.0}, ac.InvalidInput, "d_model is 8.0"),
        ({"d_model": -8}, ac.InvalidInput, "d_model is -8"),
        ({"num_hidden_layers": "2"}, ac.InvalidInput, 'num_hidden_layers is "2"'),
        ({"base_model_name_or_path": {"a": "b" * 999}}, ac.InvalidInput, "base_model_name_or_path is"),
        ({"unembed_hash": 3}, ac.InvalidInput, "unembed_hash is 3"),
        ({"bias": 1}, ac.InvalidInput, "bias is 1"),
        ({"bias": False}, ac.Unsupported, "with bias"),
        ({"lens_type": "x" * 999}, ac.Unsupported, "linear_tuned_lens"),
        ({"d_model": 1 << 40}, ac.SpecMismatch, "2 layers × 1099511627776"),
        ({"num_hidden_layers": 3}, ac.SpecMismatch, "3 layers × 8"),
        ({"unembed_hash": "\n" * 999}, ac.SpecMismatch, "another unembedding"),
    ],
)
def test_a_strange_configuration_is_refused_in_one_line(
    content: bytes | dict[str, object], error: type[Exception], said: str, gpt: ac.Dataset, tmp_path: Path
):
    shutil.copytree(LENS, tmp_path / "lens")
    written = content if isinstance(content, bytes) else json.dumps(CONFIG | content).encode()
    (tmp_path / "lens/config.json").write_bytes(written)
    with pytest.raises(error, match=said) as caught:
        ac.lens.import_tuned_lens(tmp_path / "lens", gpt)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_what_a_configuration_may_leave_out(gpt: ac.Dataset, tmp_path: Path):
    shutil.copytree(LENS, tmp_path / "lens")
    needed = ("base_model_name_or_path", "d_model", "num_hidden_layers")
    (tmp_path / "lens/config.json").write_text(json.dumps({name: CONFIG[name] for name in needed} | {"new": 1}))
    lens = ac.lens.import_tuned_lens(tmp_path / "lens", gpt)
    assert lens.facts["unembed_hash"] is None
    np.testing.assert_array_equal(lens.weight, ac.lens.import_tuned_lens(LENS, gpt).weight)
    for name in needed:
        (tmp_path / "lens/config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != name}))
        with pytest.raises(ac.InvalidInput, match=f"lacks {name}"):
            ac.lens.import_tuned_lens(tmp_path / "lens", gpt)


def test_the_lens_of_another_model_is_refused(built: str, reference: ac.lens.States, planted: ac.Dataset):
    with pytest.raises(ac.SpecMismatch, match=r"2 layers × 8, and .* has 3 × 32"):
        ac.lens.import_tuned_lens(LENS, ac.open(built))
    turned = Head([NORM, LINEAR], HEAD.arrays | {"unembedding": -HEAD.arrays["unembedding"]})
    with pytest.raises(ac.SpecMismatch, match="another unembedding"):
        ac.lens.import_tuned_lens(LENS, replace(reference, head=turned))
    with pytest.raises(ac.InvalidInput, match="no residual stream"):
        ac.lens.import_tuned_lens(LENS, planted)
    with pytest.raises(ac.InvalidInput, match="no tokens ahead"):
        ac.lens.import_tuned_lens(LENS, replace(reference, offset=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(dtype: torch.dtype, gpt: ac.Dataset, tmp_path: Path):
    shutil.copytree(LENS, tmp_path / "lens")
    halves = OrderedDict((name, tensor.to(dtype)) for name, tensor in _state().items())
    torch.save(halves, tmp_path / "lens/params.pt")
    lens = ac.lens.import_tuned_lens(tmp_path / "lens", gpt)
    assert lens.weight.dtype == lens.bias.dtype == np.float32
    for layer in range(2):
        np.testing.assert_array_equal(lens.weight[layer], halves[f"{layer}.weight"].float().numpy())
        np.testing.assert_array_equal(lens.bias[layer], halves[f"{layer}.bias"].float().numpy())


def test_a_lens_that_was_saved_on_a_gpu_is_read(gpt: ac.Dataset, tmp_path: Path):
    with zipfile.ZipFile(LENS / "params.pt") as file:
        pickled = file.read("params/data.pkl")
    on_gpu = pickled.replace(b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0")
    assert on_gpu != pickled
    shutil.copytree(LENS, tmp_path / "lens")
    (tmp_path / "lens/params.pt").write_bytes(_pickled(on_gpu))
    found = ac.lens.import_tuned_lens(tmp_path / "lens", gpt)
    np.testing.assert_array_equal(found.weight, ac.lens.import_tuned_lens(LENS, gpt).weight)


def test_what_is_no_file_is_refused_without_waiting(gpt: ac.Dataset, tmp_path: Path):
    with pytest.raises(ac.NotFound, match="no such folder"):
        ac.lens.import_tuned_lens(tmp_path / "absent", gpt)
    for name in ("config.json", "params.pt"):
        folder = Path(shutil.copytree(LENS, tmp_path / f"no {name}"))
        (folder / name).unlink()
        with pytest.raises(ac.NotFound, match=name):
            ac.lens.import_tuned_lens(folder, gpt)
        os.mkfifo(folder / name)
        with pytest.raises(ac.InvalidInput, match=f"{name}: no file"):
            ac.lens.import_tuned_lens(folder, gpt)


def test_without_torch_it_is_one_line(gpt: ac.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lens = ac.lens.import_tuned_lens(LENS, gpt)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "actcache.clients.lens.params_file")
    with pytest.raises(ac.Unsupported, match="install torch"):
        ac.lens.import_tuned_lens(LENS, gpt)
    with pytest.raises(ac.Unsupported, match="install torch"):
        ac.lens.export_tuned_lens(lens, gpt, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def call(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_on_the_command_line(gpt: ac.Dataset, tmp_path: Path):
    done = call("lens", "import", LENS, gpt.url, tmp_path / "a.lens")
    assert done.exit_code == 0, done.output
    assert done.output == f"{tmp_path / 'a.lens'}\n"
    lens = ac.lens.load(tmp_path / "a.lens")
    np.testing.assert_array_equal(lens.weight, ac.lens.import_tuned_lens(LENS, gpt).weight)
    done = call("lens", "export", tmp_path / "a.lens", gpt.url, tmp_path / "out", "--base-model", "me/my-gpt")
    assert done.output == f"{tmp_path / 'out'}\n"
    assert saved(tmp_path / "out")[0]["base_model_name_or_path"] == "me/my-gpt"
    shared = Lens("ridge", lens.sites, lens.weight[:1], lens.bias[:1], True, 0, lens.model)
    ac.lens.save(shared, tmp_path / "shared.lens")
    done = call("lens", "export", tmp_path / "shared.lens", gpt.url, tmp_path / "shared")
    assert "one translator for all states" in done.output
    done = call("lens", "export", tmp_path / "shared.lens", gpt.url, tmp_path / "json", "--json")
    assert json.loads(done.stdout) == {"folder": str(tmp_path / "json"), "translators": 2, "shared": True}
    (tmp_path / "out/config.json").write_text(json.dumps(CONFIG | {"unembed_hash": None}))
    done = call("lens", "import", tmp_path / "out", gpt.url, tmp_path / "b.lens")
    assert "no hash" in done.output
    done = call("lens", "import", tmp_path / "out", gpt.url, tmp_path / "c.lens", "--json")
    assert json.loads(done.stdout)["base_model_revision"] == "main"
    for again in (
        ("export", tmp_path / "a.lens", gpt.url, tmp_path / "out"),
        ("import", LENS, gpt.url, tmp_path / "a.lens"),
        ("import", LENS, gpt.url, tmp_path / "no" / "a.lens"),
    ):
        done = call("lens", *again)
        assert done.exit_code == 2
        assert len(done.output.splitlines()) == 1
