"""Records, specs, the root and array metadata: canonical, hashed, bounded, and refused when a stranger's are odd."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

import actcache as ac
from actcache.schemas.array import ArrayLayout
from actcache.schemas.canonical import canonical, digest
from actcache.schemas.errors import Corrupt, InvalidInput, Unsupported
from actcache.schemas.grid import Grid, whole_layout
from actcache.schemas.manifest import manifest_bytes, parse_manifest, safe_key
from actcache.schemas.plan import Plan, StoredObject, TokensRecord
from actcache.schemas.publish import schemas
from actcache.schemas.root_document import parse_root, root_bytes
from actcache.schemas.spec import Spec

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(json_values)
def test_canonical_bytes_are_a_fixed_point(value):
    data = canonical(value)
    assert canonical(json.loads(data)) == data
    assert digest(json.loads(data)) == digest(value)


def test_canonical_refuses_nan():
    with pytest.raises(ValueError, match="JSON"):
        canonical({"x": float("nan")})


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 9)), max_size=8, unique_by=lambda item: item[0]))
def test_a_manifest_comes_back_whatever_the_order(items):
    objects = [StoredObject(key=f"x/{name}", size=size, sha256="0" * 64) for name, size in items]
    data = manifest_bytes(objects)
    assert data == manifest_bytes(reversed(objects))
    name = hashlib.sha256(data).hexdigest()
    assert parse_manifest(data, name) == sorted(objects, key=lambda entry: entry.key)
    with pytest.raises(Corrupt):
        parse_manifest(data + b" ", name)


@pytest.mark.parametrize(
    "key", ["../x", "a/../../b", "/etc/passwd", "http://x/y", "a//b", "", "a\\b", "a/\n", "x" * 2000]
)
def test_keys_that_point_elsewhere_are_refused(key: str):
    assert not safe_key(key)
    data = manifest_bytes([StoredObject(key=key, size=1, sha256="0" * 64)])
    with pytest.raises(Corrupt, match="not allowed"):
        parse_manifest(data, hashlib.sha256(data).hexdigest())


@given(st.integers(0, 1 << 29), st.integers(1, 64), st.integers(1, 64), st.sampled_from([(), (7,), (2, 3)]))
def test_array_metadata_comes_back(rows: int, chunk: int, chunks: int, width: tuple[int, ...]):
    names = ("token", *(f"d{i}" for i in range(len(width))))
    shard = max(chunk * chunks, chunk * (-(-rows // chunk // 1000)))
    layout = ArrayLayout("norm/0", (rows, *width), "bfloat16", shard, chunk, names, {"a": 1})
    parsed = ArrayLayout.parse("norm/0", json.loads(canonical(layout.document())))
    assert parsed == layout
    assert parsed.attributes == {"a": 1}
    assert len(layout.shard_keys()) == layout.n_shards


MUTATIONS = {
    "rank": lambda d: d.update(shape=[4, 4, 4, 4, 4, 4]),
    "negative": lambda d: d.update(shape=[-1, 3]),
    "a float": lambda d: d.update(shape=[4.0, 3]),
    "a boolean": lambda d: d.update(shape=[True, 3]),
    "huge": lambda d: d.update(shape=[1 << 63, 3]),
    "so many shards": lambda d: d.update(shape=[1 << 61, 3]),
    "dtype": lambda d: d.update(data_type="complex64"),
    "dtype object": lambda d: d.update(data_type={"name": "numpy.datetime64"}),
    "codec": lambda d: d["codecs"][0]["configuration"]["codecs"].__setitem__(1, {"name": "gzip"}),
    "more codecs": lambda d: d["codecs"].append({"name": "pickle"}),
    "no codecs": lambda d: d.update(codecs=[]),
    "big-endian": lambda d: d["codecs"][0]["configuration"]["codecs"][0]["configuration"].update(endian="big"),
    "chunk of nothing": lambda d: d["codecs"][0]["configuration"].update(chunk_shape=[0, 3]),
    "huge chunk": lambda d: (
        d["codecs"][0]["configuration"].update(chunk_shape=[1 << 40, 3]),
        d["chunk_grid"]["configuration"].update(chunk_shape=[1 << 40, 3]),
    ),
    "uneven chunk": lambda d: d["codecs"][0]["configuration"].update(chunk_shape=[3, 3]),
    "cut along d_model": lambda d: d["chunk_grid"]["configuration"].update(chunk_shape=[4, 1]),
    "separator": lambda d: d["chunk_key_encoding"]["configuration"].update(separator="."),
    "node type": lambda d: d.update(node_type="group"),
    "transformers": lambda d: d.update(storage_transformers=[{"name": "x"}]),
    "missing": lambda d: d.pop("shape"),
    "a list": lambda d: d.update(chunk_grid=[]),
}


@pytest.mark.parametrize("how", MUTATIONS)
def test_a_strangers_array_metadata_is_refused(how: str):
    document = json.loads(canonical(ArrayLayout("x", (8, 3), "float32", 4, 2, ("token", "d_model")).document()))
    ArrayLayout.parse("x", document)
    MUTATIONS[how](document)
    with pytest.raises(Unsupported, match=r"x/zarr\.json"):
        ArrayLayout.parse("x", document)


@pytest.mark.parametrize("name", ["../x", "/x", "x/../y", "http://x", "", "x//y", "x\\y", "x" * 600, "a b"])
def test_an_array_name_that_points_elsewhere_is_refused(name: str):
    with pytest.raises(Unsupported, match="not allowed"):
        ArrayLayout.parse(name, {})


def root_of(built: str) -> tuple[dict, dict]:
    document = json.loads((Path(built) / "zarr.json").read_bytes())
    return document["attributes"]["actcache"], document["consolidated_metadata"]["metadata"]


def test_the_root_is_its_own_canonical_form_and_any_flip_is_found(built: str):
    data = (Path(built) / "zarr.json").read_bytes()
    attributes, layouts, operations = parse_root(data, "root")
    assert [operation["op"] for operation in operations] == ["layer_norm", "linear"]
    assert root_bytes({**root_of(built)[0]}, root_of(built)[1]) == data
    assert attributes.sites == list(attributes.generations[0].sites)
    assert set(attributes.arrays) == set(layouts)
    step = max(1, len(data) // 400)
    for place in range(0, len(data), step):
        flipped = bytearray(data)
        flipped[place] ^= 1
        with pytest.raises((Corrupt, Unsupported)):
            parse_root(bytes(flipped), "root")


def change(built: str, edit) -> bytes:
    attributes, members = copy.deepcopy(root_of(built))
    edit(attributes, members)
    return root_bytes(attributes, members)


@pytest.mark.parametrize(
    ("edit", "error", "says"),
    [
        (lambda a, m: a.update(format="2.0"), Unsupported, "newer"),
        (lambda a, m: a.update(format="x"), Unsupported, "newer"),
        (lambda a, m: a.update(format=1), Unsupported, "no actcache dataset"),
        (lambda a, m: a.update(generations=[]), Corrupt, "no generation"),
        (lambda a, m: a.pop("n_tokens"), Corrupt, "n_tokens"),
        (lambda a, m: a["arrays"].update({"../../etc": {"role": "site"}}), Unsupported, "not allowed"),
        (lambda a, m: a["arrays"].update({"nowhere": {"role": "site"}}), Corrupt, "no metadata"),
        (lambda a, m: a["arrays"].pop("blocks.0.hook_resid_pre"), Corrupt, "missing"),
        (lambda a, m: m["token_id"].update(data_type="complex64"), Unsupported, "complex64"),
        (lambda a, m: m["head"]["attributes"].update(operations=[[1]]), Corrupt, "operations"),
        (lambda a, m: m["head"].pop("attributes"), Corrupt, "operations"),
        (lambda a, m: a.update(format="9" * 5000 + ".0"), Unsupported, "newer"),
        (lambda a, m: a["generations"][0].update(sites=[]), Corrupt, "no site"),
        (lambda a, m: a["generations"].append(a["generations"][0]), Corrupt, "twice"),
        (lambda a, m: a["arrays"]["norm/0"].update(generation=-1), Corrupt, "generation -1"),
        (lambda a, m: a["arrays"]["norm/0"].update(generation=99), Corrupt, "generation 99"),
        (lambda a, m: m["norm/0"].update(shape=[777, 1]), Unsupported, "first axis alone"),
        (lambda a, m: a["arrays"].pop("statistics/blocks.0.hook_resid_pre"), Corrupt, "statistics.* is missing"),
        (lambda a, m: a["arrays"].pop("token_id"), Corrupt, "'token_id' is missing"),
        (lambda a, m: m["token_id"].update(shape=[5]), Corrupt, "'token_id' is int32"),
        (lambda a, m: m["loss"].update(shape=[1 << 30]), Corrupt, "'loss' is float32"),
        (lambda a, m: a.update(d_model=7), Corrupt, "32"),
        (lambda a, m: a.update(n_tokens=-1), Corrupt, "positive"),
        (lambda a, m: a.update(n_tokens=1 << 60), Corrupt, "bounds"),
        (lambda a, m: m["token_id"].update(dimension_names=[["x"]]), Unsupported, "dimension_names"),
        (lambda a, m: m["token_id"].update(dimension_names=None), Unsupported, "dimension_names"),
        (lambda a, m: m["token_id"].update(attributes=[1]), Unsupported, "format 1"),
        (lambda a, m: m.clear(), Corrupt, "no metadata"),
        (lambda a, m: a["tokenizer"][0].update(name="../../etc/passwd"), Corrupt, "no name of a tokenizer file"),
        (lambda a, m: a["tokenizer"][0].update(name="a/b"), Corrupt, "no name of a tokenizer file"),
        (lambda a, m: a["tokenizer"][0].update(name=".."), Corrupt, "no name of a tokenizer file"),
        (lambda a, m: a["tokenizer"][0].update(name="a\n"), Corrupt, "no name of a tokenizer file"),
        (lambda a, m: a["tokenizer"][0].update(name=""), Corrupt, "no name of a tokenizer file"),
        (lambda a, m: a["tokenizer"][0].update(size=1 << 40), Corrupt, "not 0 to 67,108,864"),
        (lambda a, m: a["tokenizer"][0].update(size=-1), Corrupt, "not 0 to"),
        (lambda a, m: a["tokenizer"][0].update(sha256="../" + "0" * 61), Corrupt, "no SHA-256"),
        (lambda a, m: a["tokenizer"].append(a["tokenizer"][0]), Corrupt, "named twice"),
        (
            lambda a, m: a["tokenizer"].extend(dict(a["tokenizer"][0], name=f"{i}") for i in range(20)),
            Corrupt,
            "22 tok",
        ),
        (lambda a, m: a.update(tokenizer=None), Corrupt, "tokenizer"),
    ],
)
def test_a_strangers_root_is_refused_with_a_reason(built: str, edit, error, says: str):
    with pytest.raises(error, match=says):
        parse_root(change(built, edit), "root")


def test_a_root_of_a_later_minor_version_is_read(built: str):
    def edit(attributes, members):
        attributes.update(format="1.7", later="field")
        attributes["generations"][0]["provenance"]["later"] = {"x": 1}
        attributes["arrays"]["later"] = {"role": "sketch"}
        attributes["tokenizer"][0]["later"] = "field"
        members["later"] = members["token_id"]

    assert parse_root(change(built, edit), "root")[0].format == "1.7"


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{}", b'{"attributes": 3}', b"\xff", b"[" * 100_000])
def test_a_root_that_is_none(data: bytes):
    with pytest.raises((Corrupt, Unsupported)):
        parse_root(data, "root")


def test_every_record_fits_its_published_schema(built: str):
    folder = Path(built)
    published = {name: Draft202012Validator(json.loads(text)) for name, text in schemas().items()}

    def check(name: str, data: str | bytes) -> None:
        published[f"{name}.schema.json"].validate(json.loads(data))

    check("plan", (folder / ".actcache/plan.json").read_bytes())
    check("tokens", (folder / ".actcache/tokens.json").read_bytes())
    check("receipt", (folder / ".actcache/receipts/000000.json").read_bytes())
    check("head-receipt", (folder / ".actcache/receipts/head.json").read_bytes())
    (manifest,) = (folder / ".actcache").glob("manifest-*.jsonl")
    for line in manifest.read_text(encoding="utf-8").splitlines():
        check("manifest-line", line)
    check("root-attributes", json.dumps(root_of(built)[0]))


def test_nothing_of_time_host_or_path_is_in_what_the_manifest_names(built: str, model: Path, corpus: str):
    folder = Path(built)
    named = [
        folder / ".actcache/plan.json",
        folder / ".actcache/tokens.json",
        *(folder / ".actcache/receipts").iterdir(),
    ]
    host = socket.gethostname()
    for path in named:
        text = path.read_text(encoding="utf-8")
        assert str(model.parent) not in text
        assert str(Path(corpus).parent) not in text
        assert f'"{host}"' not in text
        assert not re.search(r"20\d\d-\d\d-\d\dT", text)


def test_the_key_is_of_content_not_of_names(spec: Spec, tmp_path: Path, model: Path):
    from actcache.jobs.resolve import resolve

    elsewhere = tmp_path / "another-name"
    shutil.copytree(model, elsewhere)
    here, there = resolve(spec).plan, resolve(spec.model_copy(update={"model": str(elsewhere)})).plan
    assert here.key == there.key
    assert here.labels.model != there.labels.model
    for change in (
        {"context": 16},
        {"sites": "resid"},
        {"dtype": "float16"},
        {"max_tokens": 5},
        {"batch_size": 3},
        {"head": False},
    ):
        assert resolve(spec.model_copy(update=change)).plan.key != here.key, change
    for same_tokens in (
        {"sites": "resid"},
        {"dtype": "float16"},
        {"block_tokens": 999},
        {"outputs": ()},
        {"batch_size": 1},
    ):
        assert resolve(spec.model_copy(update=same_tokens)).plan.tokens_key == here.tokens_key, same_tokens
    assert resolve(spec.model_copy(update={"context": 16})).plan.tokens_key != here.tokens_key


def test_a_plan_and_tokens_come_back(built: str):
    plan = Plan.from_bytes((Path(built) / ".actcache/plan.json").read_bytes(), "plan")
    tokens = TokensRecord.from_bytes((Path(built) / ".actcache/tokens.json").read_bytes(), "tokens")
    assert plan.to_bytes() == (Path(built) / ".actcache/plan.json").read_bytes()
    assert plan.spec.key() == plan.key
    grid = Grid.of(plan, tokens)
    assert grid.block_range(grid.n_blocks - 1)[1] == tokens.n_tokens
    with pytest.raises(Corrupt, match=r"somewhere: not a valid Plan record: key: Field required"):
        Plan.from_bytes(b'{"spec": {}}', "somewhere")


@given(st.integers(1, 1 << 22), st.integers(1, 1 << 14))
def test_arrays_written_at_once_are_cut_in_bounds(rows: int, width: int):
    layout = whole_layout("head/x", (rows, width), "float32", ("a", "b"))
    assert layout.shard_rows % layout.chunk_rows == 0
    assert layout.shard_rows * layout.row_bytes <= max(66 << 20, 2 * layout.row_bytes)


def test_specs_from_toml(tmp_path: Path):
    (tmp_path / "m").mkdir()
    path = tmp_path / "spec.toml"
    path.write_text(
        'model = "m"\ncorpus = ["*.txt", "/abs/x.txt"]\ncontext = 64\noutputs = ["loss"]\n', encoding="utf-8"
    )
    spec = Spec(**Spec.from_toml(path))
    assert spec.model == str(tmp_path / "m")
    assert spec.corpus == (str(tmp_path / "*.txt"), "/abs/x.txt")
    path.write_text('model = "gpt2"\ncorpus = "a.txt"\n', encoding="utf-8")
    assert Spec(**Spec.from_toml(path)).model == "gpt2"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"modle": "x"}, "modle|model"),
        ({"context": 0}, "context"),
        ({"context": "long"}, "context"),
        ({"dtype": "float64"}, "dtype"),
        ({"outputs": ["logits"]}, "outputs"),
        ({"block_tokens": -1}, "block_tokens"),
    ],
)
def test_a_wrong_field_is_named(fields: dict, says: str):
    with pytest.raises(InvalidInput, match=rf"spec: .*({says})"):
        Spec(**({"model": "m", "corpus": "c"} | fields))


def test_a_broken_toml_file(tmp_path: Path):
    for text in ("model = ", "\x00"):
        (tmp_path / "s.toml").write_text(text, encoding="utf-8")
        with pytest.raises(InvalidInput, match=r"s\.toml"):
            Spec.from_toml(tmp_path / "s.toml")
    with pytest.raises(InvalidInput, match="No such file"):
        Spec.from_toml(tmp_path / "absent.toml")
    assert ac.Spec is Spec
