"""From documents to sequences: no token is lost, none is invented, and every one knows where it comes from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actcache.jobs import arrange as arranging
from actcache.jobs.arrange import Rules, arrange
from actcache.jobs.axis import Axis
from actcache.jobs.selection import Lowest, rank, ranks
from actcache.jobs.spool import Spool

BOS = 999

documents_of_any_length = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@contextmanager
def laid_out(lengths: list[int], rules: Rules, at_once: int = 5) -> Iterator[Axis]:
    """Documents whose token ids are 0, 1, 2, … through all of them."""
    with ExitStack() as stack:
        tokens, runs, starts, rows = (
            stack.enter_context(Spool(dtype, width))
            for dtype, width in (("int32", 1), ("int64", 4), ("int64", 1), ("int64", 2))
        )
        tokens.append(np.arange(sum(lengths)))
        length = np.array(lengths)
        offset = np.cumsum(length) - length
        portions = ((offset[i : i + at_once], length[i : i + at_once]) for i in range(0, len(lengths), at_once))
        yield Axis(tokens, arrange(portions, rules, runs, starts), rows, BOS, None)


def everything(axis: Axis) -> dict[str, list[int]]:
    n = axis.arranged.n_tokens
    names = ("token_id", "document", "document_position", "sequence", "position")
    whole = {name: axis.rows(name, 0, n).tolist() for name in names}
    return whole | {"sequence_start": axis.rows("sequence_start", 0, len(axis.arranged.sequence_start)).tolist()}


def plain(lengths: list[int], rules: Rules) -> dict[str, list[int]]:
    """The same, token by token, the slow and obvious way."""
    sequences: list[list[tuple[int, int, int]]] = []  # (token, document, position in it)
    documents, token = [], 0
    for document, length in enumerate(lengths):
        documents.append([(token + i, document, i) for i in range(length)])
        token += length
    room = rules.context - rules.bos
    if rules.pack:
        stream = [entry for document in documents for entry in document]
        sequences = [stream[i : i + room] for i in range(0, len(stream), room)]
    else:
        for document in documents:
            start = 0
            while True:
                sequences.append(document[start : start + room])
                if rules.long == "truncate" or start + room >= len(document):
                    break
                start += rules.stride if rules.long == "stride" and rules.stride else room
    if rules.bos:
        sequences = [[(BOS, sequence[0][1], -1), *sequence] for sequence in sequences]
    flat = [(*entry, i, j) for i, sequence in enumerate(sequences) for j, entry in enumerate(sequence)]
    flat = flat[: rules.max_tokens]
    names = ("token_id", "document", "document_position", "sequence", "position")
    found = {name: [entry[k] for entry in flat] for k, name in enumerate(names)}
    return found | {"sequence_start": [*(i for i, entry in enumerate(flat) if entry[4] == 0), len(flat)]}


@st.composite
def any_rules(draw: st.DrawFn) -> Rules:
    bos = draw(st.booleans())
    context = draw(st.integers(1 + bos, 14))
    kind = draw(st.sampled_from(["split", "truncate", "stride", "pack"]))
    stride = draw(st.integers(1, context - bos)) if kind == "stride" else None
    limit = draw(st.none() | st.integers(1, 120))
    long = "split" if kind == "pack" else kind
    return Rules(context, bos, long, stride, kind == "pack", limit)  # type: ignore[arg-type]


@given(documents_of_any_length, any_rules(), st.integers(1, 6), st.data())
def test_the_token_axis_is_what_the_plain_way_makes(lengths, rules, at_once, data):
    expected = plain(lengths, rules)
    with laid_out(lengths, rules, at_once) as axis:
        assert everything(axis) == expected
        low = data.draw(st.integers(0, axis.arranged.n_tokens))
        high = data.draw(st.integers(low, axis.arranged.n_tokens))
        for name in ("token_id", "document", "document_position", "sequence", "position"):
            rows = axis.rows(name, low, high)
            assert rows.tolist() == expected[name][low:high], name
        assert axis.rows("token_id", low, high).dtype == axis.rows("position", low, high).dtype == np.int32
        assert axis.arranged.n_documents == max(expected["document"]) + 1
        assert np.diff(expected["sequence_start"]).max() <= rules.context


@given(documents_of_any_length, any_rules())
def test_documents_come_back_from_their_positions(lengths, rules):
    if rules.max_tokens is not None:
        return
    with laid_out(lengths, rules) as axis:
        got = everything(axis)
    found: list[dict[int, int]] = [{} for _ in lengths]
    for token, document, position in zip(got["token_id"], got["document"], got["document_position"], strict=True):
        assert (token == BOS) == (position == -1)
        if position >= 0:
            assert found[document].setdefault(position, token) == token  # overlapping windows agree
    first = 0
    for length, positions in zip(lengths, found, strict=True):
        kept = min(length, rules.room) if rules.long == "truncate" and not rules.pack else length
        assert [positions[i] for i in range(len(positions))] == list(range(first, first + kept))
        first += length


@given(st.integers(1, 200), any_rules())
def test_the_length_of_the_axis_is_known_beforehand(length, rules):
    unlimited = Rules(rules.context, rules.bos, rules.long, rules.stride, rules.pack)
    with laid_out([length], unlimited) as axis:
        assert axis.arranged.n_tokens == unlimited.tokens(length)
    assert unlimited.tokens(0) == 0


def test_many_documents_are_laid_out_in_portions():
    rules = Rules(16, bos=True, pack=True)
    lengths = np.random.default_rng(0).integers(1, 9, 3 * arranging.DOCUMENTS_AT_ONCE + 5).tolist()
    with laid_out(lengths, rules, arranging.DOCUMENTS_AT_ONCE) as one, laid_out(lengths, rules, 7) as other:
        assert everything(one) == everything(other)


@given(st.lists(st.lists(st.integers(-(1 << 31), (1 << 31) - 1), max_size=9), max_size=9), st.data())
def test_a_spool_gives_back_what_it_was_given(portions, data):
    with Spool("int32") as spool:
        for portion in portions:
            spool.append(np.array(portion, np.int32))
        plain = [value for portion in portions for value in portion]
        cut = data.draw(st.integers(0, len(plain)))
        if data.draw(st.booleans()):
            spool.rows(0, 0)  # what was appended is on disk now
        spool.truncate(cut)
        spool.append(np.array([7, 8]))
        plain = [*plain[:cut], 7, 8]
        assert len(spool) == len(plain)
        low = data.draw(st.integers(0, len(plain)))
        assert spool.rows(low, len(plain) + 3).tolist() == plain[low:]
        assert spool.take(np.arange(len(plain))[::-1]).tolist() == plain[::-1]


def test_ranks_are_splitmix64_and_the_same_one_by_one_and_together():
    from actcache.jobs.selection import _mixed

    assert _mixed(0) == 0xE220A8397B1DCDAF  # the first number of the published generator from seed 0
    source, row = np.array([0, 0, 5, 1 << 40]), np.array([0, 1, 1 << 33, 9])
    expected = [rank(7, int(s), int(r)) for s, r in zip(source, row, strict=True)]
    assert ranks(7, source, row).tolist() == expected
    many = ranks(3, np.zeros(20_000, np.int64), np.arange(20_000))
    assert len(set(many.tolist())) == 20_000
    counts = np.bincount((many >> np.uint64(60)).astype(int), minlength=16)
    assert abs(counts - 1250).max() < 200


@given(st.lists(st.tuples(st.integers(0, 1 << 63), st.integers(1, 9)), max_size=60), st.data())
def test_whoever_is_wanted_was_admitted(entries, data):
    documents = data.draw(st.none() | st.integers(1, 20))
    tokens = data.draw(st.none() | st.integers(1, 80))
    lowest = Lowest(documents, tokens)
    lowest._full_at = 1  # settle as often as can be
    admitted = []
    for number, amount in entries:
        if lowest.admits(number):
            admitted.append((number, amount))
            lowest.add(number, amount)
            lowest._full_at = 1
    wanted, total = [], 0
    for number, amount in sorted(entries, key=lambda entry: entry[0]):
        if (documents is not None and len(wanted) >= documents) or (tokens is not None and total >= tokens):
            break
        wanted.append(number)
        total += amount
    assert sorted(number for number, _ in admitted)[: len(wanted)] == wanted


def test_a_full_disk_is_one_line():
    import errno

    from actcache.schemas.errors import StoreError

    with Spool("int32") as spool, pytest.MonkeyPatch.context() as patch:

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr("os.pwrite", full)
        with pytest.raises(StoreError, match="No space left on device; set TMPDIR"):
            spool.append(np.zeros(1 << 20, np.int32))
