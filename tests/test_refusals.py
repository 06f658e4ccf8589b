"""What cannot be built is refused on one line that says what, where and the way out, and nothing is stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import httpx2 as httpx
import huggingface_hub
import pytest
from click.testing import CliRunner

import actcache as ac
from actcache.clients.cli import main
from tests import tiny_configs
from tests.models import save_gpt2, save_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_gpt2(tmp_path / "model")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text("abcdefgh" * 20)
    return path


def refused(tmp_path: Path, *words: object) -> str:
    """The one line with which a build is refused."""
    result = CliRunner().invoke(main, ["build", str(tmp_path / "ds"), *map(str, words)])
    assert result.exit_code in (1, 2), result.output
    assert not (tmp_path / "ds").exists()
    (line,) = [line for line in result.output.splitlines() if line.startswith("actcache: error: ")]
    return line.removeprefix("actcache: error: ")


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_an_unknown_family(tmp_path: Path, folder: Path, text: Path):
    change_config(folder, model_type="gpt9")
    line = refused(tmp_path, "--model", folder, "--corpus", text)
    assert (
        "has no causal language model of type 'gpt9'; upgrade it, or describe the model with actcache.Capturable"
        in line
    )
    assert "code that comes with a model is never run" in line
    change_config(folder, model_type=None)
    assert "config.json names no model_type" in refused(tmp_path, "--model", folder, "--corpus", text)


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("bert", "the logits are not made of the last block's output by a norm, linear maps, a scale and a soft cap"),
        ("deepseek_v4", "no list of blocks that are each run once, each on what the one before returned"),
        ("bert-generation", "fails the identity 'padding'"),
    ],
)
def test_a_family_that_cannot_be_captured(tmp_path: Path, text: Path, family: str, says: str):
    tiny_configs.build(family).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    if family == "bert-generation":  # told when the first batch is at hand, before any activation is stored
        change_config(tmp_path / "model", is_decoder=False)
        with pytest.raises(ac.ProofFailed, match=r"fails the identity 'padding' .*nothing is stored"):
            ac.build(ac.Spec(model=str(tmp_path / "model"), corpus=(str(text),)), tmp_path / "half")
        assert not list((tmp_path / "half").glob("blocks.*/c"))
        return
    assert says in refused(tmp_path, "--model", tmp_path / "model", "--corpus", text)


def test_a_gated_model(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch):
    def gated(*args: object, **kwargs: object) -> str:
        response = httpx.Response(403, request=httpx.Request("GET", "https://hub/meta-llama/Llama-3"))
        raise huggingface_hub.errors.GatedRepoError("403 Client Error.\nAccess is restricted.", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
    line = refused(tmp_path, "--model", "meta-llama/Llama-3", "--corpus", text)
    assert line == (
        "meta-llama/Llama-3: gated: accept its terms on the hub, then log in with 'hf auth login' or set HF_TOKEN"
    )


def test_a_missing_tokenizer(tmp_path: Path, folder: Path, text: Path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    line = refused(tmp_path, "--model", folder, "--corpus", text)
    assert "no tokenizer (tokenizer.json and its kin) beside the model; put its files there, or give a corpus" in line


def test_no_bos_and_no_eos(tmp_path: Path, folder: Path, text: Path):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    kept = {name: value for name, value in config.items() if name not in ("bos_token", "eos_token")}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    for name in ("special_tokens_map.json",):
        (folder / name).unlink(missing_ok=True)
    for option, word in (("--bos=always", "--bos-id"), ("--pack", "--eos-id")):
        result = CliRunner().invoke(
            main, ["build", str(tmp_path / word), "--model", str(folder), "--corpus", str(text), option]
        )
        assert result.exit_code == 2
        assert word in result.output
        assert len(result.output.strip().splitlines()) <= 2


def test_a_context_longer_than_the_models(tmp_path: Path, folder: Path, text: Path):
    line = refused(tmp_path, "--model", folder, "--corpus", text, "--context", 33)
    assert line == "--context 33 is longer than the model's own context of 32 tokens"


def test_a_wrong_field(tmp_path: Path, folder: Path):
    rows = tmp_path / "a.jsonl"
    rows.write_text('{"body": "abc"}\n{"body": "def"}\n')
    result = CliRunner().invoke(main, ["build", str(tmp_path / "ds"), "--model", str(folder), "--corpus", str(rows)])
    assert result.exit_code == 2
    assert "'text'" in result.output
    assert "body" in result.output
    assert "--text-field" in result.output


def test_weights_that_are_missing_or_not_there(tmp_path: Path, folder: Path, text: Path):
    lacking = Path(shutil.copytree(folder, tmp_path / "lacking"))
    change_config(lacking, n_layer=4)
    assert "weights are missing in the files (first: " in refused(tmp_path, "--model", lacking, "--corpus", text)
    (folder / "model.safetensors").unlink()
    assert "no weights (model.safetensors or pytorch_model.bin)" in refused(
        tmp_path, "--model", folder, "--corpus", text
    )


def test_an_attention_that_the_family_lacks(tmp_path: Path, folder: Path, text: Path):
    line = refused(tmp_path, "--model", folder, "--corpus", text, "--attention", "nosuch")
    assert "the model cannot be loaded: " in line
    assert "nosuch" in line
