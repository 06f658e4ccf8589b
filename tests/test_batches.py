"""Batches: every token of a block is kept once, none is too large, and the plan and the block alone say what is in them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from actcache.jobs.batches import Batch, batches, touching, with_tokens
from actcache.jobs.batching import LEAST_POSITIONS, rule_of
from actcache.jobs.grouping import grouped, padded_fraction, recomputed_fraction
from actcache.schemas.plan import BatchRule, Plan
from actcache.schemas.spec import Execution

GOLDEN = Path(__file__).parent / "golden"

lengths_of_any_kind = st.lists(st.integers(1, 40), min_size=1, max_size=25)
by_length = st.builds(
    lambda tokens, least: BatchRule(order="length", tokens=tokens, least_positions=least),
    st.integers(1, 120),
    st.none() | st.integers(1, 40),
)
in_order = st.builds(lambda size: BatchRule(size=size), st.integers(1, 7))
rules = by_length | in_order


def starts_of(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


@st.composite
def blocks(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    """Row splits, and some block of their tokens."""
    starts = starts_of(draw(lengths_of_any_kind))
    start = draw(st.integers(0, int(starts[-1]) - 1))
    return starts, start, draw(st.integers(start + 1, int(starts[-1])))


def told(batch: Batch) -> tuple:
    return tuple(array.tolist() for array in (batch.sequences, batch.starts, batch.lengths, batch.keep, batch.tokens))


@given(rules, blocks())
def test_every_token_of_the_block_is_kept_once_and_no_other(rule: BatchRule, block: tuple[np.ndarray, int, int]):
    starts, start, stop = block
    made = list(batches(rule, starts, start, stop))
    kept = np.concatenate([batch.tokens for batch in made])
    assert sorted(kept.tolist()) == list(range(start, stop))
    run = np.concatenate([batch.sequences for batch in made])
    assert sorted(run.tolist()) == list(touching(starts, start, stop)), "each sequence is run once, and whole"


@given(rules, blocks())
def test_a_batch_is_what_it_says(rule: BatchRule, block: tuple[np.ndarray, int, int]):
    """Row by row and position by position: what is kept is the very token, at its own place."""
    starts, start, stop = block
    ids = np.arange(7, 7 + int(starts[-1]))
    first = starts[touching(starts, start, stop).start]
    for batch in batches(rule, starts, start, stop):
        filled = with_tokens(batch, 3, ids[first:], int(first))
        kept = []
        for row, sequence in enumerate(batch.sequences):
            low, high = int(starts[sequence]), int(starts[sequence + 1])
            assert (batch.starts[row], batch.lengths[row]) == (low, high - low)
            for position in range(batch.keep.shape[1]):
                token = low + position
                is_pad = token >= high
                assert filled.attention_mask[row, position] == (0 if is_pad else 1)
                assert filled.input_ids[row, position] == (3 if is_pad else ids[token])
                assert bool(batch.keep[row, position]) == (not is_pad and start <= token < stop)
                if batch.keep[row, position]:
                    kept.append(token)
        assert batch.tokens.tolist() == kept
        assert filled.input_ids[batch.keep].tolist() == ids[batch.tokens].tolist()
        assert batch.whole == bool(batch.keep.all())


@given(by_length, blocks())
def test_no_batch_is_larger_than_it_may_be(rule: BatchRule, block: tuple[np.ndarray, int, int]):
    starts, start, stop = block
    made = list(batches(rule, starts, start, stop))
    for batch in made:
        least = rule.least_positions or 1
        assert batch.keep.numel() >= least
        rounded = least + len(batch.sequences) - 1
        assert batch.keep.numel() <= max(rule.tokens, int(batch.lengths.max()), rounded)
    for batch, following in itertools.pairwise(made):
        assert batch.lengths.min() >= following.lengths.max(), "the longest come first"
        assert (len(batch.sequences) + 1) * int(batch.lengths.max()) > rule.tokens, "a batch is as full as it may be"


@given(rules, blocks(), lengths_of_any_kind)
def test_a_batch_depends_on_the_block_alone(rule: BatchRule, block: tuple[np.ndarray, int, int], others: list[int]):
    """Not on the sequences of other blocks, nor on how many there are: two workers, or a resumed one, make the same."""
    starts, start, stop = block
    made = [told(batch) for batch in batches(rule, starts, start, stop)]
    last = touching(starts, start, stop).stop
    followed = np.concatenate([starts[: last + 1], starts[last] + np.cumsum(others)])
    assert [told(batch) for batch in batches(rule, followed, start, stop)] == made
    first = touching(starts, start, stop).start
    shift = int(starts[first])
    alone = batches(rule, starts[first : last + 1] - shift, start - shift, stop - shift)
    moved = [(b.sequences + first, b.starts + shift, b.lengths, b.keep, b.tokens + shift) for b in alone]
    assert [tuple(array.tolist() for array in batch) for batch in moved] == made


@given(st.integers(1, 6), blocks())
def test_the_batches_of_older_plans_are_as_they_were(size: int, block: tuple[np.ndarray, int, int]):
    """So many at a time, in their order, padded to the longest of them: with bits in store that were computed so."""
    starts, start, stop = block
    wanted = list(touching(starts, start, stop))
    made = list(batches(BatchRule(size=size), starts, start, stop))
    assert [batch.sequences.tolist() for batch in made] == [wanted[i : i + size] for i in range(0, len(wanted), size)]
    assert [batch.keep.shape[1] for batch in made] == [int(batch.lengths.max()) for batch in made]


def test_an_example_by_hand():
    rule = BatchRule(order="length", tokens=10, least_positions=6)
    found = [group.tolist() for group in grouped(rule, np.array([2, 5, 5, 1, 9, 4, 2]))]
    assert found == [[4], [1, 2], [5, 0], [6, 3]], "the longest first, equal ones as they come"
    last = list(batches(rule, starts_of([2, 5, 5, 1, 9, 4, 2]), 0, 28))[-1]
    assert tuple(last.keep.shape) == (2, 3), "padded to six positions"


@given(rules, lengths_of_any_kind)
def test_pads_are_counted(rule: BatchRule, lengths: list[int]):
    made = list(batches(rule, starts_of(lengths), 0, sum(lengths)))
    pads = sum(int((~batch.keep).sum()) for batch in made)
    run = sum(batch.keep.numel() for batch in made)
    assert padded_fraction(rule, np.array(lengths)) == pytest.approx(pads / run, abs=1e-12)


@given(lengths_of_any_kind, st.integers(1, 60), rules)
def test_what_is_run_twice_is_counted(lengths: list[int], block_tokens: int, rule: BatchRule):
    """By running all blocks; a sequence that lies in five blocks is run five times."""
    starts = starts_of(lengths)
    total = int(starts[-1])
    run = sum(
        int(batch.lengths.sum())
        for start in range(0, total, block_tokens)
        for batch in batches(rule, starts, start, min(start + block_tokens, total))
    )
    assert recomputed_fraction(starts, total, block_tokens) == pytest.approx((run - total) / total, abs=1e-12)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"order": "sequence"},
        {"order": "sequence", "tokens": 5},
        {"order": "length"},
        {"order": "length", "size": 5},
        {"size": 0},
        {"order": "length", "tokens": 0},
        {"order": "length", "tokens": -1},
        {"order": "random", "size": 5},
    ],
)
def test_a_rule_needs_the_limit_of_its_order(fields: dict):
    with pytest.raises(ValidationError):
        BatchRule(**fields)


@given(rules)
def test_a_rule_comes_back_from_its_bytes(rule: BatchRule):
    data = rule.to_bytes()
    assert b"null" not in data
    assert BatchRule.from_bytes(data, "rule") == rule


@pytest.mark.parametrize(
    "path", sorted((GOLDEN / "1.0").rglob("plan.json")), ids=lambda path: str(path.relative_to(GOLDEN))
)
def test_a_plan_of_before_keeps_its_rule(path: Path):
    before = json.loads(path.read_bytes())
    plan = Plan.from_bytes(path.read_bytes(), str(path))
    now = json.loads(plan.to_bytes())
    assert now["batches"] == before["batches"]
    assert now["spec"]["execution"] == before["spec"]["execution"]
    assert (plan.batches.order, plan.batches.tokens, plan.batches.least_positions) == ("sequence", None, None)
    assert plan.batches.size == plan.spec.execution.batch_size


@pytest.mark.parametrize(
    "path", sorted((GOLDEN / "1.0/grown.zarr").rglob("plan.json")), ids=lambda path: path.parent.name
)
def test_a_plan_of_the_time_before_batches_by_length_keeps_its_bytes_and_its_key(path: Path):
    """Its key is a hash of what a plan says of batches, too: nothing that came with them may be in it."""
    plan = Plan.from_bytes(path.read_bytes(), str(path))
    assert plan.to_bytes() == path.read_bytes()
    assert plan.spec.key() == plan.key


@given(st.integers(1, 10_000), st.none() | st.integers(1, 4096))
def test_the_least_positions_fit_into_the_models_context(tokens: int, context: int | None):
    execution = Execution(compute_dtype="float32", attention="sdpa", batch_tokens=tokens)
    least = rule_of(execution, context).least_positions
    assert least is not None
    assert least <= LEAST_POSITIONS
    if context is not None:  # positions beyond it have no embedding
        rule = rule_of(execution, context)
        for batch in batches(rule, starts_of([1, 1, 1]), 0, 3):
            assert batch.keep.shape[1] <= context
