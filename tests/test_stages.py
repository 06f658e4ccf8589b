"""Staging room and the meter: the pipeline's memory has a bound, and its shares of time are right."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actcache.jobs import stages
from actcache.jobs.stages import STAGES, Meter, MeteredPool, Usage
from actcache.jobs.staging import Staging


class Held:
    """What takers hold at once, seen from outside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pieces: list[int] = []
        self.seen: list[tuple[int, ...]] = []

    def take(self, size: int) -> None:
        with self._lock:
            self._pieces.append(size)
            self.seen.append(tuple(self._pieces))

    def give_back(self, size: int) -> None:
        with self._lock:
            self._pieces.remove(size)


@given(
    st.integers(1, 50),
    st.lists(st.tuples(st.integers(0, 80), st.integers(1, 4), st.booleans()), min_size=1, max_size=60),
)
def test_what_is_held_stays_within_the_budget_but_for_one_larger_piece(
    budget: int, pieces: list[tuple[int, int, bool]]
):
    staging, held = Staging(budget), Held()
    with ThreadPoolExecutor(6) as takers, ThreadPoolExecutor(3) as readers:

        def run(size: int, count: int, fails: bool) -> None:
            staging.take(size, lambda: None)
            held.take(size)
            left = iter(range(count - 1))
            lock = threading.Lock()

            def read() -> None:
                with lock:
                    last = next(left, None) is None
                if last:
                    held.give_back(size)
                if fails:
                    raise RuntimeError("a reader failed")

            staging.give_back_after(size, [readers.submit(read) for _ in range(count)])

        for future in [takers.submit(run, *piece) for piece in pieces]:
            future.result(10)
    for together in held.seen:
        nonzero = [size for size in together if size]
        assert sum(together) <= budget or len(nonzero) == 1
    staging.take(budget, lambda: pytest.fail("all of it is given back"))


def test_room_is_given_back_once_the_last_reader_is_done_well_or_not():
    staging = Staging(10)
    staging.take(10, _never)
    readers: list[Future] = [Future() for _ in range(3)]
    staging.give_back_after(10, readers)
    readers[0].set_result(None)
    readers[1].set_exception(RuntimeError("failed"))
    with pytest.raises(Enough):
        staging.take(1, _enough)
    readers[2].cancel()
    staging.take(10, _never)


def test_readers_that_are_done_before_give_back_too():
    staging = Staging(10)
    staging.take(10, _never)
    done: Future = Future()
    done.set_result(None)
    staging.give_back_after(10, [done, done])
    staging.take(10, _never)


def test_the_check_ends_the_waiting_and_nothing_is_held_of_it():
    staging = Staging(10)
    staging.take(6, _never)
    for _ in range(3):
        with pytest.raises(Enough):
            staging.take(5, _enough)
    staging.take(4, _never)


def test_a_waiting_taker_goes_on_as_soon_as_there_is_room(monkeypatch: pytest.MonkeyPatch):
    from actcache.jobs import staging as module

    monkeypatch.setattr(module, "POLL_SECONDS", 60)
    staging, reader = Staging(10), Future()
    staging.take(10, _never)
    staging.give_back_after(10, [reader])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(staging.take, 3, lambda: None)
        time.sleep(0.05)
        assert not waiting.done()
        reader.set_result(None)
        waiting.result(5)


class Enough(Exception):
    """The wait is over."""


def _enough() -> None:
    raise Enough


def _never() -> None:
    pytest.fail("there is room")


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stages, "time", clock)
    return clock


def test_tasks_of_a_stage_that_overlap_count_once_where_one_runs_at_a_time(clock: Clock):
    meter = Meter()
    with meter.busy("upload"):
        clock.now += 1
        with meter.busy("upload"), meter.busy("upload"):
            clock.now += 2
        clock.now += 1
    clock.now += 4
    usage = meter.drain()
    assert usage.seconds == 8
    assert usage.busy["upload"] == 4
    assert usage.shares["upload"] == 0.5


def test_a_stage_of_several_at_once_counts_by_how_many_run(clock: Clock):
    meter = Meter(encode=4)
    with meter.busy("encode"):
        clock.now += 4  # one of four
        with meter.busy("encode"):
            clock.now += 4  # two of four
            with meter.busy("encode"), meter.busy("encode"), meter.busy("encode"):
                clock.now += 2  # five want to
    assert meter.drain().busy["encode"] == 1 + 2 + 2


def test_draining_begins_anew_and_goes_on_with_what_runs(clock: Clock):
    meter = Meter()
    clock.now += 1
    with meter.busy("forward"):
        clock.now += 3
        first = meter.drain()
        clock.now += 5
    clock.now += 5
    second, third = meter.drain(), meter.drain()
    assert (first.seconds, first.busy["forward"]) == (4, 3)
    assert (second.seconds, second.busy["forward"]) == (10, 5)
    assert (third.seconds, third.busy["forward"]) == (0, 0)
    assert third.limit is None
    assert (first + second).shares["forward"] == pytest.approx(8 / 14)


def test_what_is_paused_is_not_counted_and_errors_end_it(clock: Clock):
    meter = Meter()

    def fails() -> None:
        with meter.busy("forward"):
            clock.now += 1
            with meter.busy("copy"), meter.paused("forward"):
                clock.now += 10
                raise Enough

    with pytest.raises(Enough):
        fails()
    clock.now += 9
    with meter.busy("forward"):
        clock.now += 1
    meter.add("forward", 0.5)
    found = meter.drain()
    assert (found.busy["forward"], found.busy["copy"], found.seconds) == (2.5, 10, 21)
    assert found.limit == "copy"


def test_a_pools_tasks_count_and_their_errors_too(clock: Clock):
    meter = Meter(encode=2)

    def work(seconds: float) -> float:
        clock.now += seconds
        if seconds > 1:
            raise Enough
        return seconds

    with ThreadPoolExecutor(1) as threads:
        pool = MeteredPool(threads, meter, "encode")
        assert pool.submit(work, 1.0).result() == 1.0
        with pytest.raises(Enough):
            pool.submit(work, seconds=3.0).result()
    assert meter.drain().busy["encode"] == 2.0


def test_many_threads_lose_no_time(clock: Clock):
    """Whoever enters and leaves at once, in the end nothing runs."""
    meter = Meter(encode=3)
    with ThreadPoolExecutor(8) as threads:
        pool = MeteredPool(threads, meter, "encode")
        for future in [pool.submit(lambda: None) for _ in range(2000)]:
            future.result()
    meter.drain()
    clock.now += 5
    assert meter.drain().busy["encode"] == 0


usages = st.builds(
    Usage,
    st.floats(0, 100),
    st.dictionaries(st.sampled_from(list(STAGES)), st.floats(0, 100)),
)


@given(st.lists(usages, max_size=5))
def test_usages_add_up_and_shares_are_parts(parts: list[Usage]):
    total = sum(parts, Usage())
    assert total.seconds == pytest.approx(sum(part.seconds for part in parts))
    for stage in STAGES:
        busy = sum(part.busy.get(stage, 0) for part in parts)
        share = total.shares[stage]
        assert 0 <= share <= 1
        assert share == pytest.approx(min(1, busy / total.seconds) if total.seconds else 0)
    if total.limit is None:
        assert not any(total.shares.values())
    else:
        assert total.shares[total.limit] == max(total.shares.values()) > 0
