"""A dataset's tokenizer: it makes the text that transformers makes, it is the model's own to the byte, and it is mistrusted."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import actcache as ac
from actcache.cache import local_store
from actcache.cache.opening import read_root
from actcache.cache.store import open_store
from actcache.clients.text import Text
from actcache.jobs import tokenizer_files
from actcache.schemas.canonical import sha256
from actcache.schemas.tokenizer import BACKEND_JSON, TOKENIZER, TOKENIZER_JSON
from tests.models import END, save_gpt2

ROOT = Path(__file__).parent.parent
TEXT = "Grüße, it costs 10 € or £8.\n\n  def f(x):  return  x  # 🦜🦜 naïve\n" * 3
FILES = {TOKENIZER_JSON, "tokenizer_config.json"}


def objects(url: Path) -> dict[str, bytes]:
    return {path.relative_to(url).as_posix(): path.read_bytes() for path in url.rglob("*") if path.is_file()}


def unigram() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def sentencepiece_bpe() -> PreTrainedTokenizerFast:
    """As Llama's: bytes of what it does not know, and a space before the text that decoding takes away."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))][:240]
    vocabulary += ["▁", "e", "f", "r", "t", "▁r", "▁re", "x", "(", ")", ":"]
    tokens = {token: index for index, token in enumerate(vocabulary)}
    merges = [("▁", "r"), ("▁r", "e")]
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def wordpiece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", END], show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, unk_token="[UNK]")


def only_vocabulary(folder: Path) -> None:
    """GPT-2's files as they were before there was a `tokenizer.json`."""
    stored = json.loads((folder / TOKENIZER_JSON).read_text(encoding="utf-8"))
    (folder / TOKENIZER_JSON).unlink()
    (folder / "vocab.json").write_text(json.dumps(stored["model"]["vocab"]), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))


def added_elsewhere(folder: Path) -> None:
    """A token that `tokenizer_config.json` adds, and `tokenizer.json` does not know."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    told = {"content": "<|fim|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config["added_tokens_decoder"] = {"257": {**told, "special": True}}
    path.write_text(json.dumps(config), encoding="utf-8")


def saved(make: Callable[[], PreTrainedTokenizerFast]) -> Callable[[Path], None]:
    return lambda folder: make().save_pretrained(folder) and None


KINDS: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "byte-level": (lambda folder: None, FILES),
    "unigram": (saved(unigram), FILES),
    "sentencepiece-bpe": (saved(sentencepiece_bpe), FILES),
    "wordpiece": (saved(wordpiece), FILES),
    "only-vocabulary": (only_vocabulary, {TOKENIZER_JSON, "tokenizer_config.json", "vocab.json", "merges.txt"}),
    "added-elsewhere": (added_elsewhere, {*FILES, BACKEND_JSON}),
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model with each kind of tokenizer, none of more than 260 tokens."""
    folder = tmp_path_factory.mktemp("kinds")
    for kind, (change, _) in KINDS.items():
        change(save_gpt2(folder / kind, layers=1, width=8, vocabulary=260))
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("texts") / "a.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def small(model: Path, texts: str) -> ac.Spec:
    return ac.Spec(model=str(model), corpus=(texts,), max_tokens=300, block_tokens=160)


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_what_transformers_makes_of_the_same_ids(kinds: dict[str, Path], texts: str, tmp_path: Path, kind: str):
    spec, url = small(kinds[kind], texts), tmp_path / "ds"
    planned = ac.plan(spec, url)
    ac.build(spec, url)
    assert planned.objects == len(objects(url)) == ac.plan(spec, url).objects
    ds = ac.open(url)
    assert set(ds.tokenizer.files) == KINDS[kind][1]
    theirs = AutoTokenizer.from_pretrained(kinds[kind])

    def text(ids: Any) -> str:
        return theirs.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    ids = ds.tokens["token_id"]
    assert ds.tokenizer.decode(ids) == text(ids.tolist())
    chosen = random.Random(0)
    for _ in range(200):
        some = [chosen.randrange(len(theirs) + 2) for _ in range(chosen.randrange(6))]
        assert ds.tokenizer.decode(some) == text(some)
        start = chosen.randrange(len(ids))
        assert ds.tokenizer.decode(ids[start : start + 5]) == text(ids[start : start + 5].tolist())
    there = AutoTokenizer.from_pretrained(url / TOKENIZER)
    assert there.decode(ids) == theirs.decode(ids), "transformers loads the folder as it is"
    for name, data in ds.tokenizer.files.items():
        if (kinds[kind] / name).exists():
            assert data == (kinds[kind] / name).read_bytes()


def test_the_bundled_model_and_characters_of_several_tokens(texts: str, tmp_path: Path):
    ac.build(ac.Spec(model=str(ROOT / "examples/tiny-gpt"), corpus=(texts,)), tmp_path / "ds")
    ds = ac.open(tmp_path / "ds")
    ids = ds.tokens["token_id"]
    assert ds.tokenizer.decode(ids) == TEXT
    strings = ds.tokenizer.strings(ids)
    assert len(strings) == len(ids)
    assert "\N{REPLACEMENT CHARACTER}" in strings
    assert [string for string in strings if "def" in string] == [" def"] * 3
    theirs = AutoTokenizer.from_pretrained(ROOT / "examples/tiny-gpt")
    assert strings == [theirs.decode([index]) for index in ids.tolist()]


def test_a_string_a_token_keeps_its_space(kinds: dict[str, Path]):
    for kind, ids, want in (
        ("sentencepiece-bpe", ["▁re", "t", "<0xC3>", "▁", "<s>"], [" re", "t", "\ufffd", " ", "<s>"]),
        ("unigram", ["▁", "x", "</s>"], [" ", "x", "</s>"]),
        ("byte-level", ["Ġ", "a", "Ã", END], [" ", "a", "\ufffd", END]),
    ):
        theirs = AutoTokenizer.from_pretrained(kinds[kind])
        text = Text(tokenizer_files.tokenizer_files(kinds[kind], theirs), "here")
        given = theirs.convert_tokens_to_ids(ids)
        assert text.strings(given) == want
        assert text.strings(np.array(given, np.int32)[:2]) == want[:2]
    assert text.strings([]) == []
    assert text.strings([5000]) == [""]
    assert text.decode([]) == ""


@pytest.mark.parametrize("ids", [[-1], [2**32], [1.5], [[1]], 3, "ab", [None]], ids=str)
def test_what_are_no_ids(kinds: dict[str, Path], ids: Any):
    theirs = AutoTokenizer.from_pretrained(kinds["byte-level"])
    text = Text(tokenizer_files.tokenizer_files(kinds["byte-level"], theirs), "here")
    for call in (text.decode, text.strings):
        with pytest.raises(ac.InvalidInput, match="token ids are"):
            call(ids)


def test_a_build_that_is_stopped_and_resumed_stores_the_same(
    kinds: dict[str, Path], texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stopped before each file, and after the tokens."""
    spec = small(kinds["only-vocabulary"], texts)
    whole = ac.build(spec, tmp_path / "whole").manifest
    names = sorted(KINDS["only-vocabulary"][1])
    put = local_store.LocalStore.put_new
    for name in [*names, "zarr.json"]:
        url = tmp_path / f"stopped-{name}"

        def stopping(store: Any, key: str, data: Any, name: str = name) -> bool:
            if key.endswith(name) and (TOKENIZER in key or key == "blocks.0.hook_resid_pre/zarr.json"):
                raise KeyboardInterrupt
            return put(store, key, data)

        with monkeypatch.context() as patch:
            patch.setattr(local_store.LocalStore, "put_new", stopping)
            with pytest.raises(KeyboardInterrupt):
                ac.build(spec, url)
        assert ac.build(spec, url).manifest == whole
        assert ac.verify(url, full=True).ok
    assert (tmp_path / "whole" / TOKENIZER / "vocab.json").exists()


def test_a_tokenizer_file_of_another_build_is_not_written_over(kinds: dict[str, Path], texts: str, tmp_path: Path):
    spec, key = small(kinds["byte-level"], texts), TOKENIZER + TOKENIZER_JSON
    open_store(tmp_path / "ds").put_new(key, b"{}")
    with pytest.raises(ac.SpecMismatch, match=r"tokenizer\.json: is another than this tokenizer's"):
        ac.build(spec, tmp_path / "ds")
    assert (tmp_path / "ds" / key).read_bytes() == b"{}"


def test_the_manifest_and_the_root_name_each_file(built: str):
    named = {file.name: file.sha256 for file in read_root(open_store(built)).attributes.tokenizer}
    assert named == {name: sha256(data) for name, data in ac.open(built).tokenizer.files.items()}
    assert set(named) == FILES
    (manifest,) = (Path(built) / ".actcache").glob("manifest-*.jsonl")
    entries = {entry["key"]: entry["sha256"] for entry in map(json.loads, manifest.read_text().splitlines())}
    assert {TOKENIZER + name: sha for name, sha in named.items()}.items() <= entries.items()


@pytest.mark.parametrize("name", sorted(FILES))
def test_damage_is_told_on_read_and_by_verify(built: str, tmp_path: Path, name: str):
    url = Path(shutil.copytree(built, tmp_path / "ds"))
    path = url / TOKENIZER / name
    whole = path.read_bytes()
    for data in (whole[:-1] + b" ", whole + b" ", whole[:-1], b"", None):
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(ac.Corrupt, match=rf"{name}: .*copy it again") as caught:
            _ = ac.open(url).tokenizer
        assert "\n" not in str(caught.value)
        report = ac.verify(url, full=True)
        assert [problem.key for problem in report.problems] == [TOKENIZER + name]
        path.write_bytes(whole)
    assert ac.open(url).tokenizer.decode([66])
    (url / TOKENIZER / "tokenizer.model").write_bytes(b"another")
    assert ac.verify(url).unexpected == [f"{TOKENIZER}tokenizer.model"]
    assert set(ac.open(url).tokenizer.files) == FILES


def test_an_added_build_keeps_it(built: str, spec: ac.Spec, model: Path, corpus: str, tmp_path: Path):
    first = spec.model_copy(update={"sites": "resid"})
    ac.build(first, tmp_path / "ds")
    before = ac.open(tmp_path / "ds").tokenizer.files
    ac.build(ac.Spec(model=str(model)), tmp_path / "ds", add_sites="blocks.*.hook_attn_out")
    grown = ac.open(tmp_path / "ds")
    assert len(grown.generations) == 2
    assert grown.tokenizer.files == before == ac.open(built).tokenizer.files
    assert (ac.verify(grown.url, full=True).problems, ac.verify(grown.url).unexpected) == ([], [])


def test_on_s3(s3: str, kinds: dict[str, Path], texts: str, tmp_path: Path):
    spec = small(kinds["only-vocabulary"], texts)
    assert ac.build(spec, f"{s3}/ds").manifest == ac.build(spec, tmp_path / "ds").manifest
    here, there = ac.open(tmp_path / "ds"), ac.open(f"{s3}/ds")
    assert there.tokenizer.files == here.tokenizer.files
    assert there.tokenizer.decode(there.tokens["token_id"]) in TEXT
    assert ac.verify(f"{s3}/ds", full=True).ok


def test_token_files_without_a_tokenizer_have_none(model: Path, tmp_path: Path):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    for path in folder.glob("tokenizer*"):
        path.unlink()
    np.save(tmp_path / "ids.npy", np.arange(200, dtype=np.uint16))
    spec = ac.Spec(model=str(folder), corpus=(str(tmp_path / "ids.npy"),))
    planned = ac.plan(spec, tmp_path / "ds")
    ac.build(spec, tmp_path / "ds")
    assert planned.objects == len(objects(tmp_path / "ds"))
    assert not (tmp_path / "ds" / TOKENIZER).exists()
    with pytest.raises(ac.NotFound, match=r"holds no tokenizer \(it was built without one\); decode .* with the one"):
        _ = ac.open(tmp_path / "ds").tokenizer


def test_token_files_of_a_model_with_a_tokenizer_have_it(model: Path, tmp_path: Path):
    np.save(tmp_path / "ids.npy", np.arange(200, dtype=np.uint16))
    ac.build(ac.Spec(model=str(model), corpus=(str(tmp_path / "ids.npy"),)), tmp_path / "ds")
    assert set(ac.open(tmp_path / "ds").tokenizer.files) == FILES


def test_a_dataset_of_format_1_0_has_none():
    ds = ac.open(ROOT / "tests/golden/1.0/float32.zarr")
    assert ds.format == "1.0"
    with pytest.raises(ac.NotFound, match="holds no tokenizer"):
        _ = ds.tokenizer


def test_files_beyond_what_readers_take_are_left_out_and_the_user_is_told(
    kinds: dict[str, Path], texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from actcache.jobs.progress import Silent

    notes: list[str] = []

    class Listener(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    monkeypatch.setattr(tokenizer_files, "MAX_FILE_BYTES", 1000)
    spec = small(kinds["byte-level"], texts)
    planned = ac.plan(spec, tmp_path / "ds")
    ac.build(spec, tmp_path / "ds", reporter=Listener())
    assert planned.objects == len(objects(tmp_path / "ds"))
    assert any("the tokenizer is not stored" in note for note in notes)
    with pytest.raises(ac.NotFound, match="its files were not stored with it"):
        _ = ac.open(tmp_path / "ds").tokenizer


def test_xarray_and_zarr_are_not_disturbed(built: str):
    import xarray
    import zarr

    ds = ac.open(built)
    assert set(xarray.open_zarr(built)) >= {*ds.sites, "token_id"}
    assert "token_id" in zarr.open_group(built, mode="r")


def test_a_slow_tokenizer_is_refused_with_the_way_out():
    text = Text({"tokenizer.model": b"\n\x0e", "tokenizer_config.json": b"{}"}, "here")
    with pytest.raises(ac.Unsupported, match=r"no tokenizer\.json, only tokenizer\.model.*with transformers") as caught:
        text.decode([1])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", ac.Corrupt),
        (b"\xff", ac.Corrupt),
        (b"[" * 100_000, ac.Corrupt),
        (b"[]", ac.Corrupt),
        (b"{}", ac.Unsupported),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}', ac.Unsupported),
        (b'{"version": "9.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}', ac.Unsupported),
        (b'{"decoder": {"type": "Sequence", "decoders": 5}, "model": {"type": "BPE", "vocab": {}}}', ac.Unsupported),
    ],
    ids=str,
)
def test_a_strangers_tokenizer_is_refused_on_one_line(data: bytes, error: type[Exception]):
    with pytest.raises(error, match=r"here: \.actcache/tokenizer/tokenizer\.json: ") as caught:
        Text({TOKENIZER_JSON: data}, "here").decode([0])
    assert "\n" not in str(caught.value)


def test_a_panic_of_the_library_is_an_error(kinds: dict[str, Path]):
    class PanicException(BaseException):
        """As the library's own, which is no `Exception` and cannot be imported."""

    class Panics:
        where = "here"

        @property
        def tokenizer(self) -> Any:
            raise PanicException("index out of bounds\nof a slice")

        def alone(self, index: int) -> str:
            raise KeyboardInterrupt

    text = Text({}, "here")
    text.__dict__["_parts"] = Panics()
    with pytest.raises(ac.Unsupported, match=r"cannot use it \(index out of bounds\)"):
        text.decode([0])
    with pytest.raises(KeyboardInterrupt):
        text.strings([0])


def test_what_only_encodes_is_not_looked_at():
    """A normaliser that this library panics at."""
    document = {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
    }
    text = Text({TOKENIZER_JSON: json.dumps(document).encode()}, "here")
    assert (text.decode([0, 1]), text.strings([0, 1])) == ("a b", ["a", "b"])


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ac.Unsupported, match=r"pip install 'actcache\[text\]'"):
        Text({TOKENIZER_JSON: b'{"model": {}}'}, "here").decode([0])


def test_a_reader_needs_neither_torch_nor_transformers(built: str):
    code = (
        "import sys, actcache as ac\n"
        f"ds = ac.open({built!r})\n"
        "assert 'tokenizers' not in sys.modules\n"
        "print(ds.tokenizer.decode(ds.tokens['token_id'][:5]), ds.tokenizer.strings([1]))\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_what_is_stored_of_a_backend_does_not_depend_on_what_was_done_with_it(kinds: dict[str, Path]):
    folder = kinds["only-vocabulary"]
    fresh, used = (AutoTokenizer.from_pretrained(folder) for _ in range(2))
    used("a text", truncation=True, max_length=2)
    assert tokenizer_files.tokenizer_files(folder, fresh) == tokenizer_files.tokenizer_files(folder, used)
    used.add_tokens([AddedToken("<|new|>")])
    assert tokenizer_files.tokenizer_files(folder, fresh) != tokenizer_files.tokenizer_files(folder, used)
