"""Builds that are killed, raced and resumed end with the same manifest as a build that nothing disturbed.

Where the time goes, on 2 cores: 4 s to start the children's server, then 20 ms a child; 0.6 s a build on a local disk and 1.5 s on
S3, nearly all of it waiting for the store. Each resumption on S3 begins with 0.5 s of sessions, model and proof, each verifying takes
0.1 to 0.3 s. In all 13 s on the local disk and 50 s on S3; thrice that on S3 if the server delays its small answers (TCP_NODELAY).
ACTCACHE_TEST_SEED moves every random moment.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

import actcache
from actcache.cache.lease import EXPIRY_SECONDS, LEASES
from actcache.cache.opening import read_root
from actcache.cache.store import Store, open_store
from actcache.schemas.canonical import canonical
from actcache.schemas.plan import PLAN_KEY, TOKENS_KEY
from actcache.schemas.spec import Spec

from .crash import Child, Fault, Outcome, When, run, small_spec

SEED = int(os.environ.get("ACTCACHE_TEST_SEED", "0"))
KILLS = [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
"""How often each build is killed before it may finish: 30 moments in all."""
TRIES = 10
LEASE = f"{LEASES}tokenise.json"
MORE = "blocks.0.hook_attn_out blocks.1.hook_mlp_out"

Undisturbed = Callable[[str, str], Outcome]


@dataclass
class Place:
    """An empty place to build at, and how a build goes on a store of its kind if nothing disturbs it."""

    kind: str
    url: str
    operations: int
    seconds: float

    def child(self, name: object) -> str:
        return f"{self.url}/{name}"


@pytest.fixture(scope="session")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    return small_spec(tmp_path_factory.mktemp("spec"))


@pytest.fixture(scope="session")
def undisturbed(spec: Spec) -> Undisturbed:
    """A build that nothing disturbs, run once for each kind of store."""
    made: dict[str, Outcome] = {}

    def get(kind: str, url: str) -> Outcome:
        if kind not in made:
            outcome = run(spec, url)
            assert outcome.error is None
            assert outcome.result.state == "built"
            made[kind] = outcome
        return made[kind]

    return get


@pytest.fixture(scope="session")
def manifest(undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The manifest that every build of the spec must have, on whatever store."""
    return undisturbed("local", str(tmp_path_factory.mktemp("undisturbed"))).result.manifest


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, undisturbed: Undisturbed) -> Place:
    kind = request.param
    url = str(request.getfixturevalue("tmp_path") if kind == "local" else request.getfixturevalue("s3")).rstrip("/")
    outcome = undisturbed(kind, f"{url}/undisturbed")
    return Place(kind, url, outcome.operations, outcome.seconds)


def check_finished(url: str, outcome: Outcome, manifest: str) -> None:
    """The build ended well, with the manifest that it must have, and nothing is left that only a build needs."""
    assert outcome.error is None
    assert outcome.result is not None, "killed by something else"
    assert outcome.result.manifest == manifest
    report = actcache.verify(url, full=True)
    assert report.ok, report.problems
    assert report.unexpected == []


def check_grown(url: str, outcome: Outcome, manifests: list[str]) -> None:
    """The added build ended well, the dataset has these generations, and nothing is left that only a build needs."""
    assert outcome.error is None
    assert outcome.result is not None, "killed by something else"
    assert outcome.result.manifest == manifests[1]
    assert [generation.manifest for generation in actcache.open(url).generations] == manifests
    report = actcache.verify(url, full=True)
    assert (report.problems, report.unexpected, report.unfinished) == ([], [], [])


def check_killed(url: str, store: Store, manifest: str) -> None:
    """Before the seal nobody sees a dataset, after it a whole one."""
    begun = store.get_or_none(PLAN_KEY) is not None  # asked first: on S3 a dead writer's last PUT may still take effect
    try:
        actcache.open(url)
    except actcache.NotSealed:
        return
    except actcache.NotFound:
        assert not begun
        return
    assert read_root(store).attributes.generations[0].manifest == manifest
    assert actcache.verify(url, full=True).ok


def kill_somewhere(rng: random.Random, place: Place, spec: Spec, url: str, rest: float, by_clock: bool) -> float | None:
    """Build, and be killed somewhere in the `rest` of the build. Returns the rest after it, None if the build finished first."""
    at = rng.random() * rest
    left = rest - at
    if by_clock:
        print(f"  SIGKILL after {at * place.seconds:.3f} s of {place.seconds:.3f} s")
        outcome = Child(spec, url).go().kill_after(at * place.seconds)
        if not outcome.killed:
            place.seconds = min(place.seconds, outcome.seconds / rest)  # the machine is less busy than it was
    else:
        ways = ["before", "after", "staging", "linked"] if place.kind == "local" else ["before", "after", "flight"]
        fault = Fault(rng.choice(ways), int(at * place.operations), delay=rng.uniform(0, 0.01))
        print(f"  {fault}, of {place.operations} operations")
        outcome = run(spec, url, fault)
    assert outcome.error is None
    return left if outcome.killed else None


@pytest.mark.parametrize("number", range(len(KILLS)))
def test_a_killed_build_resumes_to_the_same_manifest(place: Place, spec: Spec, manifest: str, number: int) -> None:
    """Half the moments are drawn by the clock, half by the operation of the store, over the whole course of the build."""
    seed = SEED * len(KILLS) + number
    rng = random.Random(seed)
    first = sum(KILLS[:number])
    for attempt in range(TRIES):
        url = place.child(attempt)
        store = open_store(url)
        print(f"seed {seed}, {url}")
        rest: float | None = 1.0
        for moment in range(first, first + KILLS[number]):
            rest = kill_somewhere(rng, place, spec, url, rest, by_clock=moment % 2 == 1)
            if rest is None:
                break
            check_killed(url, store, manifest)
        check_finished(url, run(spec, url), manifest)
        if rest is not None:
            return
    pytest.fail(f"{TRIES} builds finished before they could be killed {KILLS[number]} times")


@pytest.fixture(scope="session")
def more(spec: Spec) -> Spec:
    return Spec(model=spec.model)


@pytest.fixture(scope="session")
def grown(spec: Spec, more: Spec, manifest: str, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """An added build that nothing disturbs."""
    url = str(tmp_path_factory.mktemp("grown") / "ds")
    run(spec, url)
    return run(more, url, add_sites=MORE)


@pytest.mark.parametrize("number", range(6))
def test_a_killed_added_build_leaves_the_dataset_whole_and_resumes(
    place: Place, spec: Spec, more: Spec, manifest: str, grown: Outcome, number: int
) -> None:
    """Killed at three operations of its store, the last time near its end, where it claims and writes the root."""
    seed = SEED * 6 + number
    rng = random.Random(seed)
    url = place.child(number)
    run(spec, url)
    print(f"seed {seed}, {url}")
    manifests = [manifest, grown.result.manifest]
    ways = ["before", "after", "staging", "linked"] if place.kind == "local" else ["before", "after", "flight"]
    for low, high in ((0.0, 0.4), (0.4, 0.8), (0.0, 0.4)):
        fault = Fault(rng.choice(ways), int(rng.uniform(low, high) * grown.operations), delay=rng.uniform(0, 0.01))
        outcome = run(more, url, fault, add_sites=MORE)
        print(f"  {fault}, of {grown.operations} operations, killed: {outcome.killed}")
        assert outcome.error is None
        found = [generation.manifest for generation in actcache.open(url).generations]
        assert found == manifests[: len(found)]
        report = actcache.verify(url, full=True)
        assert (report.problems, report.unexpected) == ([], [])
    check_grown(url, run(more, url, add_sites=MORE), manifests)


@pytest.mark.parametrize("key", [".actcache/roots/", "zarr.json"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_added_build_that_is_killed_at_its_root(
    place: Place, spec: Spec, more: Spec, manifest: str, grown: Outcome, key: str, when: When
) -> None:
    """Before and after the next root is claimed, and before and after it is written over the one in place."""
    url = place.child("root")
    run(spec, url)
    manifests = [manifest, grown.result.manifest]
    assert run(more, url, Fault(when, key=key, writing=True), add_sites=MORE).killed
    manifests_now = [generation.manifest for generation in actcache.open(url).generations]
    assert manifests_now == (manifests if (key, when) == ("zarr.json", "after") else manifests[:1])
    report = actcache.verify(url, full=True)
    assert (report.problems, report.unexpected) == ([], [])
    check_grown(url, run(more, url, add_sites=MORE), manifests)


@pytest.mark.parametrize("number", range(3))
def test_two_builds_at_once_share_the_work(place: Place, spec: Spec, manifest: str, number: int) -> None:
    seed = SEED * 3 + number
    rng = random.Random(seed)
    # At once, then the second somewhere in the first one's course.
    delay = [0.0, rng.uniform(0, 0.2), rng.uniform(0.2, 1.0)][number] * place.seconds
    print(f"seed {seed}, the second begins after {delay:.3f} s")
    url = place.child("shared")
    children = [Child(spec, url), Child(spec, url)]
    for child, wait in zip(children, (0.0, delay), strict=True):
        child.go(wait)
    outcomes = [child.wait() for child in children]
    for outcome in outcomes:
        check_finished(url, outcome, manifest)
    states = sorted(outcome.result.state for outcome in outcomes)
    assert states in (["already sealed", "built"], ["built", "sealed by another build"])


def test_a_dead_tokeniser_of_this_host_is_not_waited_for(place: Place, spec: Spec, manifest: str) -> None:
    url = place.child("dead")
    assert run(spec, url, Fault("after", key="token_id/")).killed
    store = open_store(url)
    assert store.get_or_none(LEASE) is not None
    assert store.get_or_none(TOKENS_KEY) is None
    outcome = run(spec, url)
    check_finished(url, outcome, manifest)
    assert outcome.seconds < 2 * place.seconds + EXPIRY_SECONDS / 2


@pytest.mark.slow
def test_a_lost_tokeniser_of_another_host_is_waited_for_until_its_lease_expires(
    place: Place, spec: Spec, manifest: str
) -> None:
    url = place.child("lost")
    assert run(spec, url, Fault("after", key="token_id/")).killed
    store = open_store(url)
    held = json.loads(bytes(store.get(LEASE)))
    store.replace(LEASE, canonical({**held, "host": "another-host"}))
    began = time.monotonic()
    outcome = run(spec, url)
    assert time.monotonic() - began > EXPIRY_SECONDS
    check_finished(url, outcome, manifest)
    assert outcome.seconds < EXPIRY_SECONDS + 5
