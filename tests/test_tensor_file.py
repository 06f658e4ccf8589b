"""Files of arrays and facts: what comes back, what is refused, and that a file is whole or not there."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from safetensors.numpy import load_file, save_file

import actcache as ac
from actcache.clients import tensor_file

DTYPES = st.sampled_from(list(tensor_file.DTYPES.values()))
FACTS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda n: n != "__metadata__"),
        DTYPES.flatmap(
            lambda dtype: arrays_of.arrays(
                dtype, arrays_of.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
            )
        ),
        max_size=4,
    ),
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), FACTS, max_size=3),
)
def test_what_is_written_comes_back(tmp_path_factory, arrays, facts):
    path = tmp_path_factory.mktemp("f") / "x.safetensors"
    facts = {**facts, "kind": "lens"}
    assert tensor_file.write(path, arrays, facts) == path
    found, told = tensor_file.read(path, "lens")
    assert told == facts
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def test_views_of_any_order_are_written_as_they_read(tmp_path: Path):
    base = np.arange(24.0).reshape(4, 6)
    given_ = {
        "turned": base.T,
        "sliced": base[::2, 1::2],
        "big": base.astype(">f8"),
        "fortran": np.asfortranarray(base),
    }
    tensor_file.write(tmp_path / "x", given_, {"kind": "lens"})
    found, _ = tensor_file.read(tmp_path / "x", "lens")
    for name, array in given_.items():
        np.testing.assert_array_equal(found[name], array)
        np.testing.assert_array_equal(load_file(tmp_path / "x")[name], array)


def test_the_same_makes_the_same_bytes_and_nothing_is_left_beside(tmp_path: Path):
    arrays = {name: np.full(5, number, np.float32) for number, name in enumerate("cab")}
    one = tensor_file.write(tmp_path / "one", arrays, {"kind": "probe", "b": 1, "a": 2}).read_bytes()
    again = tensor_file.write(tmp_path / "one", dict(reversed(arrays.items())), {"kind": "probe", "b": 1, "a": 2})
    assert list(tensor_file.read(again, "probe")[1]) == ["kind", "b", "a"]
    assert again.read_bytes() == one
    assert [p.name for p in tmp_path.iterdir()] == ["one"]
    assert again.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    before = os.umask(0)
    os.umask(before)
    return before


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tensor_file.write(tmp_path / "x", {"a": np.ones(3)}, {"kind": "lens"})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(ac.StoreError, match="No space left"):
            tensor_file.write(tmp_path / "x", {"a": np.zeros(3)}, {"kind": "lens"})
    np.testing.assert_array_equal(tensor_file.read(tmp_path / "x", "lens")[0]["a"], np.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    with pytest.raises(ac.StoreError, match="cannot be written"):
        tensor_file.write(tmp_path / "no" / "x", {}, {"kind": "lens"})


def test_what_cannot_be_written_is_refused(tmp_path: Path):
    for facts, said in (
        ({}, "kind"),
        ({"kind": 3}, "kind"),
        ({"kind": "lens", "x": float("nan")}, "JSON"),
        ({"kind": "lens", "x": object()}, "JSON"),
        ({"kind": "lens", "x": "a" * (9 << 20)}, "large"),
    ):
        with pytest.raises(ac.InvalidInput, match=said):
            tensor_file.write(tmp_path / "x", {}, facts)
    for array in (np.array(["a"]), np.array([None]), np.ones(2, np.complex64), np.ones(2, np.float16)):
        with pytest.raises(ac.InvalidInput, match="there is bool"):
            tensor_file.write(tmp_path / "x", {"a": array}, {"kind": "lens"})
    assert not list(tmp_path.iterdir())


def _file(path: Path, header: bytes, length: int | None = None, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def test_strange_files_are_refused_in_one_line(tmp_path: Path):
    good = tensor_file.write(tmp_path / "good", {"a": np.ones(300)}, {"kind": "lens"}).read_bytes()
    path = tmp_path / "x"
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    strange = {
        "empty": b"",
        "short": good[:5],
        "text": b"import os\n" * 40,
        "pickle": b"\x80\x04\x95" + b"\0" * 300,
        "truncated": good[:-1],
        "longer": good + b"\0",
        "header of the whole address space": b"\xff" * 8 + good[8:],
        "no json": struct.pack("<Q", 4) + b"{{{{",
        "fewer bytes than its shape": struct.pack("<Q", len(header)) + header + b"\0" * 12,
    }
    for name, content in strange.items():
        path.write_bytes(content)
        with pytest.raises(ac.InvalidInput, match="no lens") as caught:
            tensor_file.read(path, "lens")
        assert "\n" not in str(caught.value), name
        assert str(path) in str(caught.value)
    for entry, error, said in (
        (None, ac.InvalidInput, "did not write"),
        ("{", ac.InvalidInput, "JSON"),
        ("[" * 100_000, ac.InvalidInput, "JSON"),
        ('{"version": 1, "facts": {"kind": "lens", "x": NaN}}', ac.InvalidInput, "JSON"),
        ("[]", ac.InvalidInput, "no lens"),
        ('{"version": 1, "facts": []}', ac.InvalidInput, "no lens"),
        ('{"version": -1, "facts": {"kind": "lens"}}', ac.InvalidInput, "no lens"),
        ('{"version": 1, "facts": {"kind": "probe"}}', ac.InvalidInput, "'probe'"),
        ('{"version": 2, "facts": {"kind": "lens"}}', ac.Unsupported, "upgrade"),
    ):
        save_file({"a": np.ones(3)}, path, None if entry is None else {"actcache": entry})
        with pytest.raises(error, match=said):
            tensor_file.read(path, "lens")
    save_file({"a": np.ones(3, np.float16)}, path, {"actcache": '{"version": 1, "facts": {"kind": "lens"}}'})
    with pytest.raises(ac.InvalidInput, match="F16"):
        tensor_file.read(path, "lens")


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ac.InvalidInput, match="no file"):
            tensor_file.read(path, "lens")
    with pytest.raises(ac.NotFound, match="no such file"):
        tensor_file.read(tmp_path / "absent", "lens")


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_changed_byte_of_the_header_never_crashes(tmp_path_factory, place, value):
    path = tmp_path_factory.mktemp("f") / "x"
    content = bytearray(tensor_file.write(path, {"a": np.ones(2)}, {"kind": "lens", "n": 3}).read_bytes())
    content[place % (len(content) - 16)] = value
    path.write_bytes(content)
    with contextlib.suppress(ac.ActcacheError):
        found, facts = tensor_file.read(path, "lens")
        assert facts["kind"] == "lens"
        assert all(isinstance(array, np.ndarray) for array in found.values())
