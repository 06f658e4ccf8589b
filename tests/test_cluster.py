"""Builds on Dask clusters, with workers and schedulers that are killed: always the dataset of a quiet build in one process."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import actcache as ac
from actcache.jobs.progress import Progress, Silent
from tests.dask_processes import children, dask_processes, kill, wait_for
from tests.models import save_gpt2

pytestmark = pytest.mark.timeout(300)

SITES = "resid blocks.*.hook_mlp_out"


class Watcher(Silent):
    """Does something once so many blocks are stored, and remembers what a build tells."""

    def __init__(self, blocks: int = 0, action: Callable[[Watcher], object] | None = None) -> None:
        self._blocks, self._action = blocks, action
        self.states: list[Progress] = []
        self.notes: list[str] = []
        self.events: list[tuple[str, dict]] = []

    def progress(self, state: Progress) -> None:
        self.states.append(state)
        if self._action is not None and state.stage == "blocks" and state.blocks >= self._blocks:
            action, self._action = self._action, None
            action(self)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def event(self, name: str, **facts) -> None:
        self.events.append((name, facts))

    def worker_pids(self) -> set[int]:
        """The processes that have stored blocks."""
        return {int(facts["worker"].rsplit("-", 1)[1]) for name, facts in self.events if name == "block"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 with heads of 16 dimensions: torch's attention on a processor gives other bits to other numbers of threads at 8."""
    return save_gpt2(tmp_path_factory.mktemp("model") / "random-gpt2", heads=2)


@pytest.fixture(scope="module")
def many_blocks(model: Path, tmp_path_factory: pytest.TempPathFactory) -> ac.Spec:
    """Some 120 blocks."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(60):
        (folder / f"{number:03d}.txt").write_text(chr(97 + number % 26) * (40 + 3 * number), encoding="utf-8")
    return ac.Spec(
        model=str(model),
        corpus=(str(folder / "*.txt"),),
        block_tokens=64,
        batch_tokens=64,
        sites=SITES,
        outputs=("loss",),
    )


@pytest.fixture(scope="module")
def quiet(many_blocks: ac.Spec, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The manifest of an undisturbed build in one process."""
    return str(ac.build(many_blocks, tmp_path_factory.mktemp("quiet") / "ds").manifest)


def test_worker_processes_build_the_same_dataset(many_blocks: ac.Spec, quiet: str, tmp_path: Path):
    watcher = Watcher()
    result = ac.build(many_blocks, tmp_path / "ds", workers=2, reporter=watcher)
    assert result.manifest == quiet
    assert len(watcher.worker_pids()) == 2
    assert os.getpid() not in watcher.worker_pids()
    last = [state for state in watcher.states if state.stage == "blocks"][-1]
    assert (last.blocks, last.tokens, last.failed) == (last.blocks_total, last.tokens_total, 0)
    assert last.workers == 2
    assert last.usage.limit is not None


def test_quantised_builds_are_the_same_too(many_blocks: ac.Spec, tmp_path: Path):
    """At a width at which the bits of a product in numpy depend on the number of threads."""
    wide = save_gpt2(tmp_path / "wide", width=128)
    spec = many_blocks.model_copy(update={"model": str(wide), "quantize": ("int8",), "max_tokens": 1000})
    alone = ac.build(spec, tmp_path / "alone").manifest
    assert ac.build(spec, tmp_path / "workers", workers=2).manifest == alone


def test_a_module_of_ones_own_travels_to_the_workers(tmp_path: Path):
    from tests.own_module import fresh

    alone = ac.build(ac.Spec(model=fresh(), sites="all", block_tokens=8), tmp_path / "alone").manifest
    assert (
        ac.build(ac.Spec(model=fresh(), sites="all", block_tokens=8), tmp_path / "workers", workers=2).manifest == alone
    )


def test_killed_workers_cost_their_blocks_alone(many_blocks: ac.Spec, quiet: str, tmp_path: Path):
    def strike(watcher: Watcher) -> None:
        for pid in watcher.worker_pids():
            kill(pid)
        running.add_worker("--nthreads", "2")

    with dask_processes(tmp_path, workers=2) as running:
        watcher = Watcher(10, strike)
        result = ac.build(many_blocks, tmp_path / "ds", scheduler_file=running.file, reporter=watcher)
    assert result.manifest == quiet
    assert len(watcher.worker_pids()) > 1
    assert len([1 for name, facts in watcher.events if name == "block" and facts["found"]]) <= 8, "little is run twice"


@pytest.mark.parametrize("given_up", ["15 s", "100 ms"])
def test_local_workers_that_are_killed_come_back(many_blocks: ac.Spec, quiet: str, tmp_path: Path, given_up: str):
    """Also those that Dask gives up, since they were not back in time."""
    import dask
    import distributed  # noqa: F401  # what it has by default is set before anything is changed

    watcher = Watcher(5, lambda _: [kill(child.pid) for child in multiprocessing.active_children()])
    with dask.config.set({"distributed.deploy.lost-worker-timeout": given_up}):
        assert ac.build(many_blocks, tmp_path / "ds", workers=2, reporter=watcher).manifest == quiet


def test_a_killed_scheduler_ends_the_build_which_resumes(many_blocks: ac.Spec, quiet: str, tmp_path: Path):
    with dask_processes(tmp_path, workers=1) as running:
        watcher = Watcher(5, lambda _: kill(running.scheduler.pid))
        with pytest.raises(ac.StoreError, match="scheduler is gone; what is stored is safe"):
            ac.build(many_blocks, tmp_path / "ds", scheduler_file=running.file, reporter=watcher)
    with pytest.raises(ac.NotSealed):
        ac.open(tmp_path / "ds")
    resumed = ac.build(many_blocks, tmp_path / "ds")
    assert resumed.manifest == quiet
    assert 0 < resumed.blocks_run < 120


def test_workers_that_join_late_are_used(many_blocks: ac.Spec, quiet: str, tmp_path: Path):
    with dask_processes(tmp_path, workers=0) as running:
        watcher = Watcher(0, lambda _: running.add_worker("--nthreads", "1"))
        late = threading.Timer(15, lambda: running.add_worker("--nthreads", "8"))
        late.start()
        result = ac.build(many_blocks, tmp_path / "ds", scheduler_file=running.file, reporter=watcher)
        late.cancel()
    assert result.manifest == quiet


def test_gpus_are_asked_for_as_a_resource(many_blocks: ac.Spec, quiet: str, tmp_path: Path):
    with dask_processes(tmp_path, workers=0) as running:
        running.add_worker("--nthreads", "2", "--resources", "GPU=1", "--preload", "tests.one_gpu")
        plain = running.add_worker("--nthreads", "2")
        watcher = Watcher()
        result = ac.build(
            many_blocks, tmp_path / "ds", scheduler_file=running.file, gpus_per_worker=1, reporter=watcher
        )
        assert watcher.worker_pids() == {running.workers[0].pid}, "a worker without the resource has no block"
        assert plain.poll() is None
    assert result.manifest == quiet


def test_a_worker_that_cannot_open_the_model_does_not_end_the_build(many_blocks: ac.Spec, quiet: str, tmp_path: Path):
    """A node without a mount fails at once and is always idle: it must not use up every block's attempts."""
    with dask_processes(tmp_path, workers=1) as running:
        running.add_worker("--nthreads", "2", "--preload", "tests.no_model")
        watcher = Watcher()
        result = ac.build(many_blocks, tmp_path / "ds", scheduler_file=running.file, reporter=watcher)
    assert result.manifest == quiet
    assert watcher.worker_pids() == {running.workers[0].pid}
    assert [note for note in watcher.notes if "the model is not on this node" in note]


def test_a_block_that_kills_its_workers_is_told_on_one_line(tmp_path: Path):
    from tests.own_module import deadly

    with pytest.raises(ac.ActcacheError, match=r"block [23]: every worker that was given it died") as caught:
        ac.build(ac.Spec(model=deadly(), sites="all", block_tokens=2, batch_size=2), tmp_path / "ds", workers=1)
    assert "\n" not in str(caught.value)


def test_a_cluster_without_workers_is_told(many_blocks: ac.Spec, quiet: str, tmp_path: Path, monkeypatch):
    from actcache.jobs import cluster

    monkeypatch.setattr(cluster, "ALONE_SECONDS", 1.0)
    with dask_processes(tmp_path, workers=0) as running:
        watcher = Watcher()
        watcher.note = lambda text: (watcher.notes.append(text), running.add_worker("--nthreads", "2"))
        assert ac.build(many_blocks, tmp_path / "ds", scheduler_file=running.file, reporter=watcher).manifest == quiet
    assert "no worker is there yet that can run blocks; the build waits: add workers to this scheduler" in watcher.notes


def test_a_build_whose_process_was_killed_leaves_no_model_in_the_workers(
    many_blocks: ac.Spec, quiet: str, tmp_path: Path
):
    import distributed

    code = f"import actcache as ac; ac.build(ac.Spec(**{many_blocks.model_dump()!r}), {str(tmp_path / 'ds')!r}, scheduler_file="
    with dask_processes(tmp_path, workers=1) as running:
        process = subprocess.Popen([sys.executable, "-c", f"{code}{str(running.file)!r})"], stderr=subprocess.DEVNULL)
        wait_for(lambda: len(list((tmp_path / "ds/.actcache/receipts").glob("0*.json"))) > 3)
        kill(process.pid)
        process.wait()
        assert ac.build(many_blocks, tmp_path / "ds", scheduler_file=running.file).manifest == quiet
        with distributed.Client(scheduler_file=str(running.file), set_as_default=False) as client:
            plugins = client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.worker_plugins))
    assert not [name for name in plugins if str(name).startswith("actcache-")]


def test_gpus_that_are_not_there_are_told(many_blocks: ac.Spec, tmp_path: Path):
    """Not built on the processor instead, which rounds differently."""
    with pytest.raises(ac.InvalidInput, match=r"--gpus-per-worker 1: .* shows this worker 0 GPUs"):
        ac.build(many_blocks, tmp_path / "ds", workers=1, gpus_per_worker=1, retries=0)


def test_a_script_without_a_guard_is_told(many_blocks: ac.Spec, tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(f"import actcache as ac\nac.build(ac.Spec(**{many_blocks.model_dump()!r}), 'ds', workers=1)\n")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "must do so below 'if __name__ == \"__main__\":'" in done.stderr.splitlines()[-1]


def test_a_block_that_always_fails_ends_the_build_with_its_own_error(tmp_path: Path, corpus: str):
    """An error that trying again cannot cure is not tried again."""
    wild = save_gpt2(tmp_path / "wild", scale=1e6)
    spec = ac.Spec(model=str(wild), corpus=(corpus,), dtype="float16", block_tokens=160)
    watcher = Watcher()
    with pytest.raises(ac.OutOfRange, match="does not fit into float16"):
        ac.build(spec, tmp_path / "ds", workers=1, reporter=watcher)
    assert not [note for note in watcher.notes if "tried again" in note]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"scheduler": "tcp://127.0.0.1:1"}, "no Dask scheduler answers there"),
        ({"scheduler": "nonsense://x"}, "no Dask scheduler answers there"),
        ({"scheduler_file": "missing.json"}, "no such scheduler file"),
        ({"workers": 0}, "--workers 0: give at least 1"),
        ({"workers": 2, "scheduler": "tcp://127.0.0.1:1"}, "three ways to say where"),
        ({"gpus_per_worker": 1}, "--gpus-per-worker is for workers"),
        ({"part": "0/3"}, "part '0/3'"),
        ({"part": "4/3"}, "part '4/3'"),
        ({"part": "one"}, "part 'one'"),
        ({"part": "1/3", "stage": "tokenise"}, "leave --part or --stage out"),
    ],
)
def test_wrong_options_are_told_on_one_line(
    many_blocks: ac.Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict, says: str
):
    from actcache.jobs import cluster

    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 2)
    with pytest.raises(ac.InvalidInput, match=re.escape(says)) as caught:
        ac.build(many_blocks, tmp_path / "ds", **options)
    assert "\n" not in str(caught.value)


def test_parts_in_any_order_twice_and_at_once(many_blocks: ac.Spec, quiet: str, tmp_path: Path):
    url = tmp_path / "ds"
    first = ac.build(many_blocks, url, part="3/4")
    assert first.state == "part stored"
    assert first.blocks is not None
    assert first.blocks_run == first.blocks[1] - first.blocks[0] > 0
    with pytest.raises(ac.NotSealed, match=r"or --part 1/4, 2/4, 4/4"):
        _seal(url)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda part: ac.build(many_blocks, url, part=part), ["4/4", "1/4", "4/4", "1/4"]))
    with pytest.raises(ac.NotSealed, match=r"or --part 2/4"):
        _seal(url)
    assert ac.build(many_blocks, url, part="2/4").state == "part stored"
    assert ac.build(many_blocks, url, part="2/4").blocks_run == 0
    _seal(url)
    assert ac.open(url).manifest == quiet
    assert not list((url / ".actcache").glob("parts*"))
    assert ac.build(many_blocks, url, part="1/4").state == "already sealed"


def test_more_parts_than_blocks(many_blocks: ac.Spec, tmp_path: Path):
    spec = many_blocks.model_copy(update={"max_tokens": 100})
    found = [ac.build(spec, tmp_path / "ds", part=f"{number}/5") for number in range(1, 6)]
    assert sum(result.blocks_run for result in found) == 2
    assert ac.build(spec, tmp_path / "ds").state == "built"


def test_added_sites_by_parts_and_on_workers(many_blocks: ac.Spec, tmp_path: Path):
    spec = many_blocks.model_copy(update={"max_tokens": 1000})
    for name in ("alone", "parts", "workers"):
        ac.build(spec, tmp_path / name)
    more = "blocks.*.hook_attn_out"
    alone = ac.build(spec, tmp_path / "alone", add_sites=more).manifest
    assert ac.build(spec, tmp_path / "parts", add_sites=more, part="2/2").state == "part stored"
    assert more.replace("*", "0") not in ac.open(tmp_path / "parts").sites
    ac.build(spec, tmp_path / "parts", add_sites=more, part="1/2")
    _seal(tmp_path / "parts")
    assert ac.open(tmp_path / "parts").generations[-1].manifest == alone
    assert ac.build(spec, tmp_path / "workers", add_sites=more, workers=2).manifest == alone


@pytest.mark.parametrize("options", [(), ("--workers", "2")])
def test_ctrl_c_stops_cleanly_and_the_next_run_resumes(
    many_blocks: ac.Spec, quiet: str, tmp_path: Path, options: tuple[str, ...]
):
    url = tmp_path / "ds"
    command = [sys.executable, "-m", "actcache", "build", str(url), "--model", many_blocks.model]
    command += ["--corpus", *many_blocks.corpus, "--block-tokens", "64", "--batch-tokens", "64"]
    command += ["--sites", SITES, "--with", "loss", *options]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(lambda: len(list((url / ".actcache" / "receipts").glob("0*.json"))) > 5)
    below = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: every process of the command gets it
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "actcache: stopped; run the same command again to go on"
    assert "Traceback" not in err + out
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below), 20)
    resumed = ac.build(many_blocks, url)
    assert resumed.manifest == quiet
    assert resumed.blocks_run < 120


def _seal(url: Path) -> None:
    from actcache.cache.added import seal_finished
    from actcache.cache.seal import seal
    from actcache.cache.store import open_store

    with ThreadPoolExecutor(2) as pool:
        seal(open_store(url), pool)
        _, unfinished = seal_finished(open_store(url), pool)
    if unfinished:
        raise unfinished[0]


def test_workers_reach_s3_with_credentials_of_their_own(many_blocks: ac.Spec, s3: str, tmp_path: Path):
    import cloudpickle

    from actcache.cache.store import open_store
    from actcache.jobs.residence import Residence
    from actcache.jobs.resolve import resolve
    from actcache.jobs.worker import Job
    from actcache.schemas.grid import Grid

    spec = many_blocks.model_copy(update={"max_tokens": 1000})
    url = f"{s3}workers"
    watcher = Watcher()
    result = ac.build(spec, url, workers=2, reporter=watcher)
    assert result.manifest == ac.build(spec, tmp_path / "alone").manifest
    resolved = resolve(spec)
    job = Job(open_store(url).location, Grid(resolved.plan, 1, 1, 1), "m", None, resolved.studied.anatomy)
    travels = cloudpickle.dumps(Residence("name", job, 1, 0))
    told = repr(watcher.notes) + repr(watcher.events)
    for secret in (os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]):
        assert secret.encode() not in travels
        assert secret not in told
