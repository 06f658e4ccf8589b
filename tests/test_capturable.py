"""Modules of the user's own, cached by the same build: a value-myopic GPT, and a CNN over images."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

import actcache as ac

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where the source of its classes is looked for
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gpt() -> nn.Module:
    torch.manual_seed(3)
    return example("value_myopic_gpt").ValueMyopicGPT(vocabulary=4096, block_size=64, width=32, layers=3)


@pytest.fixture(scope="module")
def cnn() -> nn.Module:
    torch.manual_seed(4)
    return example("cnn").CNN()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("texts")
    for index in range(4):
        (folder / f"{index}.txt").write_text(f"def f{index}(x):\n    return x + {index}\n" * (5 + 9 * index))
    return str(folder / "*.txt")


def own(gpt: nn.Module, **changes) -> ac.Capturable:
    return ac.Capturable(**{"name": "myopic", "module": gpt, "tokenizer": EXAMPLES / "tiny-gpt", **changes})


def test_the_myopic_gpt_trains_no_column_for_a_later_one(gpt: nn.Module):
    embedded: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
        embedded.append(out.detach().requires_grad_(True))
        return embedded[-1]

    handle = gpt.tokens.register_forward_hook(keep)
    ids = torch.arange(12)[None]
    logits = gpt(ids)
    handle.remove()
    logits[0, 7].logsumexp(0).backward()
    touched = embedded[0].grad[0].abs().sum(1) > 0
    assert touched.tolist() == [position == 7 for position in range(12)]
    other = torch.cat([ids[:, :3] + 5, ids[:, 3:]], dim=1)
    assert not torch.allclose(gpt(other)[0, 7], logits[0, 7]), "forward it must read earlier columns"


def test_a_language_model_of_ones_own_is_taken_apart_like_any_other(gpt: nn.Module, texts: str, tmp_path: Path):
    spec = ac.Spec(model=own(gpt), corpus=(texts,), sites="all module:blocks.1.mlp.1", outputs=("loss",), batch_size=2)
    ac.build(spec, tmp_path / "ds")
    ds = ac.open(tmp_path / "ds")
    assert ds.model.n_layers == 3
    assert ds.provenance.spec.context == 64, "its block_size is the longest sequence"
    assert ds["module:blocks.1.mlp.1"].shape == (ds.n_tokens, 128)
    states = {site: ds[site].compute() for site in ds.sites}
    gpt.eval()
    for low, high in zip(ds.sequence_start[:-1], ds.sequence_start[1:], strict=True):
        ids = torch.from_numpy(ds.tokens["token_id"][low:high].astype(np.int64))[None]
        with torch.inference_mode():
            x = gpt.tokens(ids) + gpt.positions(torch.arange(high - low))
            for layer, block in enumerate(gpt.blocks):
                attention = block.attention(block.norm_1(x))
                np.testing.assert_allclose(states[f"blocks.{layer}.hook_attn_out"][low:high], attention[0], atol=1e-5)
                x = x + attention
                np.testing.assert_allclose(states[f"blocks.{layer}.hook_resid_mid"][low:high], x[0], atol=1e-5)
                x = x + block.mlp(block.norm_2(x))
                np.testing.assert_allclose(states[f"blocks.{layer}.hook_resid_post"][low:high], x[0], atol=1e-5)
            logits = gpt.unembedding(gpt.norm(x))[0]
        np.testing.assert_allclose(
            ds.head.logits(states["blocks.2.hook_resid_post"][low:high]), logits.numpy(), atol=1e-4
        )
        want = nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
        np.testing.assert_allclose(ds["loss"][low : high - 1].compute(), want, atol=1e-4)
    assert ac.lens.logit(ds)["loss"].shape == (4,)
    assert ac.verify(tmp_path / "ds", full=True).ok
    assert ac.build(spec, tmp_path / "ds").state == "already sealed"
    with torch.no_grad():
        gpt.norm.bias[0] += 1
    with pytest.raises(ac.SpecMismatch, match=r"model\.weights"):
        ac.build(spec, tmp_path / "ds")
    with torch.no_grad():
        gpt.norm.bias[0] -= 1


def test_an_image_is_a_sequence_and_a_pooled_layer_one_row_of_it(cnn: nn.Module, tmp_path: Path):
    image, _ = example("cnn").gratings(70)
    sites = {"conv1": "layers.0", "conv3": "layers.2", "logits": "readout"}
    spec = ac.Spec(
        model=ac.Capturable(name="cnn", module=cnn, inputs=image, sites=sites),
        sites="all",
        block_tokens=32,
        batch_size=8,
    )
    ac.build(spec, tmp_path / "ds")
    ds = ac.open(tmp_path / "ds")
    assert ds.sites == ["conv1", "conv3", "logits"]
    assert (ds.n_tokens, ds.n_sequences, ds.n_documents) == (70, 70, 70)
    assert set(ds.tokens) == {
        *("position", "sequence", "document", "document_position", "sequence_start", "document_row")
    }
    assert ds.tokens["document_row"][69].tolist() == [0, 69]
    with torch.inference_mode():
        first = cnn.layers[0](image)
        third = cnn.layers[2](cnn.layers[1](first))
        np.testing.assert_allclose(ds["conv1"].compute(), first.mean((2, 3)), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(ds["conv3"].compute(), third.mean((2, 3)), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(ds["logits"].compute(), cnn(image), rtol=1e-4, atol=1e-5)
    with pytest.raises(ac.NotFound, match="without a head"):
        ds.head.logits(np.zeros((1, 16)))
    assert ac.verify(tmp_path / "ds", full=True).ok
    assert ac.build(spec, tmp_path / "ds").state == "already sealed"
    added = ac.build(
        ac.Spec(model=ac.Capturable(name="cnn", module=cnn, inputs=image, sites=sites | {"conv2": "layers.1"})),
        tmp_path / "ds",
        add_sites="conv2",
    )
    assert added.added == ("conv2",)
    assert ac.open(tmp_path / "ds")["conv2"].shape == (70, 32)


def test_a_patch_is_a_position_where_layers_keep_them(cnn: nn.Module, tmp_path: Path):
    image, _ = example("cnn").gratings(9)
    capturable = ac.Capturable(
        name="cnn", module=cnn, inputs=image, positions=256, sites={"conv1": "layers.0.0", "relu1": "layers.0.2"}
    )
    ac.build(ac.Spec(model=capturable, sites="all"), tmp_path / "ds")
    ds = ac.open(tmp_path / "ds")
    with torch.inference_mode():
        want = cnn.layers[0](image).flatten(2).transpose(1, 2)
    np.testing.assert_allclose(ds["relu1"].compute().reshape(9, 256, 16), want, rtol=1e-4, atol=1e-5)
    assert ds.tokens["position"][257] == 1
    assert ds.tokens["sequence"][257] == 1


def test_a_language_model_needs_a_tokenizer_or_tokens(gpt: nn.Module, texts: str, tmp_path: Path):
    with pytest.raises(ac.InvalidInput, match=r"myopic: no tokenizer: give its folder as Capturable\(tokenizer=…\)"):
        ac.build(ac.Spec(model=own(gpt, tokenizer=None), corpus=(texts,)), tmp_path / "ds")
    np.save(tmp_path / "ids.npy", np.arange(200, dtype=np.int64) % 4096)
    ac.build(ac.Spec(model=own(gpt, tokenizer=None), corpus=(str(tmp_path / "ids.npy"),)), tmp_path / "ds")
    assert ac.open(tmp_path / "ds").tokens["token_id"].tolist() == list(range(200))


class Several(nn.Module):
    """Takes named inputs, and gives (item, position, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(5, 7)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self.mix(left + right)


class Mixing(nn.Module):
    """What it gives of an item depends on the others of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x - x.mean(0))


def test_named_inputs_and_arrays_are_taken(tmp_path: Path):
    rng = np.random.default_rng(0)
    items = [{"left": rng.normal(size=(3, 5)).astype("f4"), "right": np.ones((3, 5), "f4")} for _ in range(4)]
    module = Several()
    capturable = ac.Capturable(
        name="several", module=module, inputs=items, positions=3, sites={"mix": "mix", "all": ""}
    )
    ac.build(ac.Spec(model=capturable, sites="mix all"), tmp_path / "ds")
    ds = ac.open(tmp_path / "ds")
    with torch.inference_mode():
        want = module(*(torch.tensor(np.stack([item[name] for item in items])) for name in ("left", "right")))
    np.testing.assert_allclose(ds["all"].compute().reshape(4, 3, 7), want, atol=1e-5)
    assert np.array_equal(ds["mix"].compute(), ds["all"].compute())


VECTORS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("changes", "fields", "error", "says"),
    [
        ({"module": Mixing(), "sites": {"out": "out"}}, {}, ac.ProofFailed, r"out: fails the identity 'batch'"),
        ({"sites": {"x": "nosuch"}}, {}, ac.InvalidInput, r"site 'x': no module 'nosuch'; there is"),
        ({"sites": {"position": ""}}, {}, ac.InvalidInput, r"site 'position': a name"),
        ({"sites": {"../x": ""}}, {}, ac.InvalidInput, r"site '\.\./x': a name"),
        ({"sites": {}}, {}, ac.InvalidInput, r"no sites: say with sites="),
        ({"inputs": []}, {}, ac.InvalidInput, r"there are no inputs"),
        ({"inputs": ["a", "b"]}, {}, ac.InvalidInput, r"inputs do not stack into a batch"),
        ({"positions": 3, "sites": {"x": ""}}, {}, ac.InvalidInput, r"x: 1 positions an item, where the dataset has 3"),
        ({"module": "nn"}, {}, ac.InvalidInput, r"its module is a str, not a torch\.nn\.Module"),
        ({}, {"corpus": ("a.txt",)}, ac.InvalidInput, r"has inputs of its own, so corpus has no meaning"),
        ({}, {"outputs": ("loss",)}, ac.InvalidInput, r"so outputs has no meaning"),
        ({}, {"strict": True, "tokens_field": "ids"}, ac.InvalidInput, r"so strict, tokens_field has no meaning"),
        ({}, {"sites": "nosuch"}, ac.InvalidInput, r"no site matches 'nosuch'; this model .* has x"),
        ({"inputs": None}, {"corpus": ("README.md",)}, ac.InvalidInput, r"a language model's sites are found"),
        ({"inputs": None, "sites": None}, {"corpus": ("README.md",)}, ac.Unsupported, r"run on token ids alone"),
        ({"module": nn.Linear(5, 5).double()}, {}, ac.InvalidInput, r"computes in float64; convert it"),
    ],
)
def test_what_cannot_be_cached_is_refused_on_one_line(
    tmp_path: Path, changes: dict, fields: dict, error: type[Exception], says: str
):
    capturable = ac.Capturable(
        **{"name": "own", "module": nn.Linear(5, 5), "inputs": VECTORS, "sites": {"x": ""}, **changes}
    )
    with pytest.raises(error, match=says) as caught:
        ac.build(ac.Spec(**{"model": capturable, "sites": "all", **fields}), tmp_path / "ds")
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "ds").glob("*/c") if path.parent.name in ("out", "x")]


def test_code_that_cannot_be_read_is_no_identity(tmp_path: Path):
    space: dict = {"nn": nn}
    exec("class Hidden(nn.Module):\n    def forward(self, x):\n        return x * 2.0\n", space)
    space["Hidden"].__module__ = "nowhere"
    capturable = ac.Capturable(name="own", module=space["Hidden"](), inputs=VECTORS, sites={"x": ""})
    with pytest.raises(ac.InvalidInput, match=r"source of nowhere\.Hidden cannot be read"):
        ac.build(ac.Spec(model=capturable, sites="all"), tmp_path / "ds")


@pytest.mark.slow
def test_the_examples_run_to_their_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    example("cnn").main(str(tmp_path / "cnn.zarr"))
    assert capsys.readouterr().out.count("a linear probe is right for") == 4
    pages = [str(EXAMPLES.parent / page) for page in ("README.md", "docs/cli.md", "docs/format.md")]
    example("value_myopic_gpt").main(str(tmp_path / "gpt.zarr"), pages)
    assert "loss by layer, nats" in capsys.readouterr().out


class Reusing(nn.Module):
    """Uses one module twice, and a number that its repr does not tell."""

    def __init__(self, times: float = 1.0) -> None:
        super().__init__()
        self.first, self.second, self.act, self.times = nn.Linear(5, 5), nn.Linear(5, 5), nn.ReLU(), times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.second(self.act(self.first(x)))) * self.times


def reusing(times: float = 1.0, **changes) -> ac.Spec:
    torch.manual_seed(5)
    fields = {"name": "own", "module": Reusing(times), "inputs": VECTORS, "sites": {"x": "first"}, **changes}
    return ac.Spec(model=ac.Capturable(**fields), sites="all")


def test_a_module_that_is_called_twice_is_no_site(tmp_path: Path):
    with pytest.raises(ac.InvalidInput, match=r"site 'x': module 'act' is called 2 times an item"):
        ac.build(reusing(sites={"x": "act"}), tmp_path / "ds")


def test_attributes_and_the_modules_of_sites_are_part_of_the_key(tmp_path: Path):
    ac.build(reusing(), tmp_path / "ds")
    assert ac.build(reusing(), tmp_path / "ds").state == "already sealed"
    with pytest.raises(ac.SpecMismatch, match=r"model\.config"):
        ac.build(reusing(times=2.0), tmp_path / "ds")
    with pytest.raises(ac.SpecMismatch, match=r"modules\.x: first here, second asked for"):
        ac.build(reusing(sites={"x": "second"}), tmp_path / "ds")


def test_added_and_replayed_sites_are_of_the_same_inputs_and_modules(tmp_path: Path):
    ac.build(reusing(), tmp_path / "ds")
    more = {"x": "first", "y": "second"}
    with pytest.raises(ac.SpecMismatch, match=r"corpus\.content"):
        ac.build(reusing(inputs=VECTORS + 1, sites=more), tmp_path / "ds", add_sites="y")
    with pytest.raises(ac.SpecMismatch, match=r"site 'x' is the output of module 'first' here, not of 'second'"):
        ac.build(reusing(sites={"x": "second"}), tmp_path / "ds", add_sites="x")
    assert ac.build(reusing(sites=more), tmp_path / "ds", add_sites="y").added == ("y",)
    assert ac.replay(tmp_path / "ds", model=reusing(sites=more).model).holds
    with pytest.raises(ac.SpecMismatch, match=r"was built from other inputs than 'own' has"):
        ac.replay(tmp_path / "ds", model=reusing(inputs=VECTORS[:2], sites=more).model)
    with pytest.raises(ac.SpecMismatch, match=r"describe it with sites=\{'y': 'second'\}"):
        ac.replay(tmp_path / "ds", model=reusing().model)
