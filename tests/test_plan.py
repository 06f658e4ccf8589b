"""`plan`: what it says a build will leave is what the build leaves, and it leaves nothing itself."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

import actcache as ac
from actcache.clients.cli import main
from actcache.jobs import token_estimate, trial
from actcache.jobs.progress import Silent
from actcache.jobs.trial import FASTER, MEMORY_SHARE, Trial
from tests.own_module import fresh

ROOT = Path(__file__).parent.parent
CONTEXT = 32


def call(*args: str | Path | int) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def objects(url: Path) -> dict[str, int]:
    return {str(path.relative_to(url)): path.stat().st_size for path in url.rglob("*") if path.is_file()}


class Listener(Silent):
    """Keeps the forecasts of a build."""

    def __init__(self) -> None:
        self.forecasts: list[ac.Forecast] = []

    def forecast(self, forecast: ac.Forecast) -> None:
        self.forecasts.append(forecast)


@pytest.fixture
def small(model: Path, corpus: str) -> ac.Spec:
    return ac.Spec(model=str(model), corpus=(corpus,), block_tokens=160)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"outputs": ("loss",)},
        {"outputs": ("loss", "entropy", "topk=3"), "dtype": "bfloat16"},
        {"quantize": ("int8",)},
        {"quantize": ("int8", "fp8"), "only_quantized": True, "block_tokens": 96},
        {"head": False, "max_tokens": 100},
        {"sites": "resid module:transformer.h.*.mlp.act", "context": 20, "block_tokens": 40},
        {"pack": True, "batch_size": 3, "block_tokens": None},
        {"batch_tokens": 64, "block_tokens": 10, "chunk_tokens": 5},
    ],
    ids=lambda fields: " ".join(fields) or "plain",
)
def test_a_build_leaves_what_was_planned(small: ac.Spec, tmp_path: Path, fields: dict):
    spec, url = small.model_copy(update=fields), tmp_path / "ds"
    found = ac.plan(spec, url)
    assert not url.exists(), "nothing is written"
    listener = Listener()
    result = ac.build(spec, url, reporter=listener)
    ds = ac.open(url)
    assert found.exact
    assert found.key == result.key
    assert found.objects == len(objects(url))
    assert (found.n_tokens, found.n_sequences, found.n_documents) == (ds.n_tokens, ds.n_sequences, ds.n_documents)
    assert (found.blocks, found.sites) == (result.blocks_run, len(result.sites))
    assert found.recomputed == pytest.approx(result.recomputed_fraction, abs=1e-12)
    (told,) = listener.forecasts
    for name in ("key", "objects", "n_tokens", "n_sequences", "raw_bytes", "put_requests", "get_requests", "padded"):
        assert getattr(told, name) == getattr(found, name), f"the build tells the same {name}"
    stored = sum(objects(url).values())
    assert abs(found.stored_bytes - stored) < 0.15 * stored + 100_000, "much of it are records here"


def test_a_module_of_ones_own(tmp_path: Path):
    spec, url = ac.Spec(model=fresh(), sites="all", block_tokens=8), tmp_path / "ds"
    found = ac.plan(spec, url)
    assert not url.exists()
    result = ac.build(spec, url)
    assert (found.objects, found.key) == (len(objects(url)), result.key)
    assert (found.n_tokens, found.n_sequences, found.exact, found.recomputed) == (20, 20, True, 0)


@pytest.mark.parametrize("fields", [{}, {"quantize": ("int8",)}], ids=["plain", "quantised"])
def test_added_sites_are_forecast_as_they_come(small: ac.Spec, tmp_path: Path, fields: dict):
    spec = small.model_copy(update={"outputs": ("loss",), **fields})
    ac.build(spec, tmp_path / "ds")
    before = objects(tmp_path / "ds")
    listener = Listener()
    ac.build(spec, tmp_path / "ds", add_sites="blocks.*.hook_attn_out", reporter=listener)
    (found,) = listener.forecasts
    new = objects(tmp_path / "ds").keys() - before.keys()
    assert found.objects == len(new)
    assert found.sites == 3


def test_bytes_by_a_sample_are_near_the_truth(tmp_path: Path):
    """Of a trained model on the text it was made for: 7 sites of 128 float32 for 3,000 tokens are 11 MB."""
    texts = tuple(str(path) for path in sorted((ROOT / "jobs").glob("*.py"))[:20])
    spec = ac.Spec(model=str(ROOT / "examples/tiny-gpt"), corpus=texts, max_tokens=3000)
    found = ac.plan(spec, tmp_path / "ds")
    ac.build(spec, tmp_path / "ds")
    stored = objects(tmp_path / "ds")
    assert found.exact
    assert found.stored_bytes == pytest.approx(sum(stored.values()), rel=0.15)
    assert found.objects == len(stored)
    assert found.raw_bytes > found.stored_bytes > 5e6


def test_tokens_that_are_stored_are_used_and_left_alone(
    small: ac.Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    url = tmp_path / "ds"
    estimated = ac.plan(small, url)
    ac.build(small, url, stage="tokenise")
    before = {path: path.stat().st_mtime_ns for path in url.rglob("*")}

    def fails(*_: object) -> None:
        pytest.fail("the tokens are there")

    with monkeypatch.context() as patch:
        patch.setattr(token_estimate, "estimate_tokens", fails)
        found = ac.plan(small, url)
    assert {path: path.stat().st_mtime_ns for path in url.rglob("*")} == before
    assert found.basis == "counted: the tokens are stored"
    for name in ("objects", "n_tokens", "recomputed", "padded", "raw_bytes", "key"):
        assert getattr(found, name) == getattr(estimated, name)
    other = ac.plan(small.model_copy(update={"max_tokens": 100}), url)
    assert other.n_tokens == 100, "tokens of another spec are not its own"


def test_json_has_everything(small: ac.Spec, tmp_path: Path):
    words = ["plan", tmp_path / "ds", "--model", small.model, "--corpus", *small.corpus, "--block-tokens", 160]
    done = call(*words, "--json", "--workers", 3)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found.keys() == {field.name for field in dataclasses.fields(ac.Forecast)}
    assert found["memory"]["peak"] > 0
    assert found["cost"].keys() == {field.name for field in dataclasses.fields(ac.plan(small).cost)}
    assert found["workers"] == 3
    run = found["n_tokens"] * (1 + found["recomputed"])
    assert found["seconds"] == pytest.approx(run / found["tokens_per_second"] / 3)
    human = call(*words)
    assert human.exit_code == 0
    assert f"{found['n_tokens']:,} in {found['n_sequences']:,} sequences of 11 documents" in human.output
    assert f"{found['objects']:,} in {found['blocks']:,} blocks" in human.output
    assert not (tmp_path / "ds").exists()


@pytest.fixture
def price_files(tmp_path: Path) -> Path:
    own = json.loads((ROOT / "jobs/prices.json").read_text(encoding="utf-8"))
    (tmp_path / "text.json").write_text("prices\nare\nhigh")
    own["providers"]["aws-s3"]["put_per_thousand"] = own["providers"]["aws-s3"].pop("put_per_1000")
    (tmp_path / "misspelt.json").write_text(json.dumps(own))
    return tmp_path


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--prices", "absent.json"), "absent.json: cannot be read: No such file"),
        (("--prices", "."), "cannot be read"),
        (("--prices", "text.json"), "text.json: no price file"),
        (("--prices", "misspelt.json"), "put_per_"),
        (("--provider", "nobody"), "no prices of 'nobody' (there is: aws-s3"),
        (("--workers", "0"), "--workers 0: give at least 1"),
        (("--workers", "-3"), "--workers -3: give at least 1"),
        (("--batch-tokens", "8", "--batch-size", "2"), "--batch-tokens and --batch-size are two ways"),
        (("--batch-tokens", "0"), "batch_tokens"),
        (("--batch-tokens", "some"), "'some' is no number of tokens, nor 'auto'"),
        (("--context", "33"), "longer than the model's own context"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, tuple) else "",
)
def test_what_is_wrong_is_told_on_one_line(
    small: ac.Spec, price_files: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], says: str
):
    monkeypatch.chdir(price_files)
    done = call("plan", "ds", "--model", small.model, "--corpus", *small.corpus, *options)
    assert done.exit_code == 2, done.output
    *_, last = done.stderr.splitlines()
    assert says in last
    if "Usage:" not in done.stderr:
        assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert not Path("ds").exists()


def test_prices_of_ones_own_are_those_that_count(small: ac.Spec, tmp_path: Path):
    own = json.loads((ROOT / "jobs/prices.json").read_text(encoding="utf-8"))
    mine = {**own["providers"]["aws-s3"], "name": "mine", "put_per_1000": 1000.0}
    path = tmp_path / "prices.json"
    path.write_text(json.dumps({**own, "currency": "CHF", "providers": {"mine": mine}}))
    found = ac.plan(small, prices=path, provider="mine")
    assert (found.provider, found.currency) == ("mine", "CHF")
    assert found.cost.build_requests == found.put_requests


def test_read_only_places_and_clashing_limits_are_refused(small: ac.Spec):
    with pytest.raises(ac.Unsupported, match="read-only"):
        ac.plan(small, "https://example.org/ds")
    both = small.model_copy(update={"batch_size": 2, "batch_tokens": "auto"})
    for ask in (ac.plan, lambda spec: ac.build(spec, "memory://clash")):
        with pytest.raises(ac.InvalidInput, match="two ways to say how large a batch is"):
            ask(both)


# --- batches found by trial


@pytest.fixture
def auto(small: ac.Spec) -> ac.Spec:
    return small.model_copy(update={"batch_tokens": "auto"})


def plan_of(url: Path) -> dict:
    return json.loads((url / ".actcache/plan.json").read_bytes())


def finds(tokens: int, first: Callable[[], object] = lambda: None) -> Callable[..., int]:
    """A trial that finds so many tokens."""

    def found(*_: object) -> int:
        first()
        return tokens

    return found


def never(*_: object) -> int:
    pytest.fail("the trial was made before")


def test_a_trial_finds_a_multiple_of_the_context_which_the_plan_keeps(auto: ac.Spec, tmp_path: Path):
    ac.build(auto, tmp_path / "ds", stage="tokenise")
    tokens = plan_of(tmp_path / "ds")["spec"]["execution"]["batch_tokens"]
    sequences, rest = divmod(tokens, CONTEXT)
    assert rest == 0
    assert sequences & (sequences - 1) == 0, "a power of two"
    assert plan_of(tmp_path / "ds")["batches"]["tokens"] == tokens


def test_later_runs_adopt_what_the_first_found(auto: ac.Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    url = tmp_path / "ds"
    monkeypatch.setattr(trial, "batch_tokens", finds(3 * CONTEXT))
    assert ac.plan(auto, url).batch_tokens == 3 * CONTEXT
    ac.build(auto, url, stage="tokenise")
    monkeypatch.setattr(trial, "batch_tokens", never)
    assert ac.plan(auto, url).batch_tokens == 3 * CONTEXT
    result = ac.build(auto, url)
    assert result.state == "built"
    assert ac.build(auto, url).state == "already sealed"
    assert ac.plan(auto, url).key == result.key
    said = auto.model_copy(update={"batch_tokens": 3 * CONTEXT})
    assert ac.build(said, url).state == "already sealed"
    assert ac.build(said, tmp_path / "said").manifest == result.manifest, "who says the number gets the same bytes"
    with pytest.raises(ac.SpecMismatch, match="batch_tokens"):
        ac.build(auto.model_copy(update={"batch_tokens": 4 * CONTEXT}), url)


@pytest.mark.parametrize("stage", ["tokenise", "all"])
def test_of_two_trials_that_race_the_first_to_end_is_kept(
    auto: ac.Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
):
    url = tmp_path / "ds"

    def other() -> None:
        monkeypatch.setattr(trial, "batch_tokens", finds(2 * CONTEXT))
        ac.build(auto, url, stage=stage)
        monkeypatch.setattr(trial, "batch_tokens", never)

    monkeypatch.setattr(trial, "batch_tokens", finds(8 * CONTEXT, other))
    result = ac.build(auto, url)
    assert result.state == ("built" if stage == "tokenise" else "already sealed")
    assert plan_of(url)["spec"]["execution"]["batch_tokens"] == 2 * CONTEXT


def test_a_trial_does_not_excuse_another_spec(auto: ac.Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trial, "batch_tokens", finds(2 * CONTEXT))
    ac.build(auto, tmp_path / "ds", stage="tokenise")
    with pytest.raises(ac.SpecMismatch, match="max_tokens") as caught:
        ac.build(auto.model_copy(update={"max_tokens": 50}), tmp_path / "ds")
    assert "batch_tokens" not in str(caught.value)


class Machine:
    """Where a token of a batch takes so many bytes, and a batch twice as large is so much faster, up to a size."""

    def __init__(self, available: int, each: int = 1000, gain: float = 2.0, up_to: int = 1 << 30) -> None:
        self.available, self.each, self.gain, self.up_to = available, each, gain, up_to
        self.tried: list[int] = []

    def best(self, monkeypatch: pytest.MonkeyPatch, model: Path) -> int:
        from actcache.jobs.anatomy import study
        from actcache.jobs.model import load_model
        from actcache.jobs.source import source_of

        source = source_of(str(model), None)
        loaded, _ = load_model(source.folder, "gpt2", "float32", "sdpa")
        anatomy = study(source, source.identity(), "float32", None).anatomy
        monkeypatch.setattr(trial, "available_bytes", lambda _: self.available)
        monkeypatch.setattr(trial, "_try", self._try)
        return trial.batch_tokens(loaded, anatomy, ("blocks.0.hook_resid_pre",), CONTEXT)

    def _try(self, parts: object, sites: object, count: int, length: int) -> Trial | None:
        tokens = count * length
        self.tried.append(tokens)
        if tokens * self.each > self.available:
            return None
        doublings = (min(tokens, self.up_to) // CONTEXT).bit_length() - 1
        return Trial(tokens, 100.0 * self.gain**doublings, tokens * self.each)


def test_with_half_the_memory_a_batch_is_half_as_large(model: Path, monkeypatch: pytest.MonkeyPatch):
    for doublings in range(6):
        tokens = CONTEXT << doublings
        machine = Machine(int(tokens * 1000 / MEMORY_SHARE) + 1)
        assert machine.best(monkeypatch, model) == tokens
        assert max(machine.tried) == tokens, "what would not fit is not even tried"


def test_a_batch_is_no_larger_than_makes_it_faster(model: Path, monkeypatch: pytest.MonkeyPatch):
    assert Machine(1 << 50, up_to=8 * CONTEXT).best(monkeypatch, model) == 8 * CONTEXT
    assert Machine(1 << 50, gain=1.0).best(monkeypatch, model) == CONTEXT
    assert Machine(1 << 50, gain=0.5).best(monkeypatch, model) == CONTEXT
    endless = Machine(1 << 60, gain=1.1)
    assert endless.best(monkeypatch, model) <= trial.MOST_TOKENS
    assert max(endless.tried) <= trial.MOST_TOKENS


def test_where_one_sequence_does_not_fit_it_says_so(
    auto: ac.Spec, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(ac.InvalidInput, match="shorter --context"):
        Machine(CONTEXT * 1000).best(monkeypatch, model)
    done = call("build", tmp_path / "ds", "--model", model, "--corpus", *auto.corpus, "--batch-tokens", "auto")
    assert done.exit_code == 2
    assert re.fullmatch(r"actcache: error: a batch of one sequence of 32 tokens .*", done.stderr.splitlines()[-1])
    assert not (tmp_path / "ds").exists()


@given(st.lists(st.tuples(st.floats(0.5, 100), st.integers(0, 300)), min_size=1, max_size=12), st.integers(1, 300))
def test_what_is_found_fits_and_is_about_as_fast_as_any(script: list[tuple[float, int]], most: int):
    """Of what was tried: the smallest within 3 % of the fastest, whatever speeds and sizes the machine shows."""
    tried: list[Trial] = []

    def attempt(_: object, __: object, count: int, length: int) -> Trial | None:
        number = count.bit_length() - 1
        if number >= len(script):
            return None
        speed, taken = script[number]
        tried.append(Trial(count * length, speed, taken))
        return tried[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "available_bytes", lambda _: most / MEMORY_SHARE)
        patch.setattr(trial, "_try", attempt)
        patch.setattr(trial, "ModelParts", lambda *_: NoParts())
        try:
            found = trial.batch_tokens(None, None, (), CONTEXT)
        except ac.InvalidInput:
            assert tried[0].taken > most * (1 - 1e-9)
            return
    fitting = [part for part in tried if part.taken <= most * (1 + 1e-9)]
    (chosen,) = (part for part in fitting if part.tokens == found)
    fastest = max(part.speed for part in fitting)
    assert chosen.speed * FASTER >= fastest
    assert all(part.speed * FASTER < fastest for part in fitting if part.tokens < found)


class NoParts:
    """Stands for a model that nobody looks at."""

    device = torch.device("cpu")
