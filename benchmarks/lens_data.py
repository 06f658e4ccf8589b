"""Tokens of the standard library and the states of the bundled model at them, for the benchmark of lenses."""

from __future__ import annotations

import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import actcache
from actcache.clients.lens.ridge import grams, ridge
from actcache.clients.lens.training import Course, Training
from actcache.clients.lens.translators import Lens
from actcache.clients.states import States, states
from actcache.jobs.encode import load_tokenizer
from benchmarks.lens_peer import TOKENS_A_STEP
from benchmarks.material import CONTEXT, Material

MOST_HELD_OUT = 1 << 15
SEQUENCES_A_FILE = 8
"""Held-out sequences of one file at most, so that they are of many."""


@dataclass(frozen=True)
class Tokens:
    """Files of token ids, .npy (sequence, position); no text is in both."""

    train: Path
    held_out: Path


@dataclass
class Clock:
    """Seconds of a work with interruptions, and seconds of the processor, of all threads of this process."""

    wall: float = 0.0
    cpu: float = 0.0
    _began: tuple[float, float] = (0.0, 0.0)

    def start(self) -> None:
        """Go on."""
        self._began = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """What comes until it is started again does not count."""
        self.wall += time.perf_counter() - self._began[0]
        self.cpu += time.process_time() - self._began[1]


def tokens(material: Material) -> Tokens:
    """As many tokens as the peer trains on, and an eighth as many held out, at most 32,768, in sequences of 256 tokens of one file each.

    Raises:
        ValueError: the standard library has too few.
    """
    wanted = material.steps * TOKENS_A_STEP // CONTEXT
    held_out = min(MOST_HELD_OUT // CONTEXT, wanted // 8)
    random = np.random.default_rng(0)
    texts = _texts(material.model, random)
    outside: list[np.ndarray] = []
    while sum(map(len, outside)) < held_out:
        outside.append(next(texts)[:SEQUENCES_A_FILE])
    train: list[np.ndarray] = []
    found = 0
    for rows in texts:
        train.append(rows)
        found += len(rows)
        if found >= wanted:
            break
    else:
        raise ValueError(f"{found * CONTEXT:,} tokens of the standard library: too few for {material.steps} steps")
    folder = material.folder / "lens"
    folder.mkdir(exist_ok=True)
    paths = Tokens(folder / "train.npy", folder / "held-out.npy")
    np.save(paths.train, random.permutation(np.concatenate(train)[:wanted]))
    np.save(paths.held_out, np.concatenate(outside)[:held_out])
    return paths


def built(material: Material, ids: Path, name: str, most: int | None = None) -> tuple[States, float]:
    """The residual stream at the first so many of these tokens, float32, from a dataset that is built of them, and the build's seconds."""
    url = material.folder / "lens" / f"{name}.zarr"
    spec = actcache.Spec(model=str(material.model), corpus=(str(ids),), context=CONTEXT, max_tokens=most)
    began = time.perf_counter()
    actcache.build(spec, url)
    return states(actcache.open(url)), time.perf_counter() - began


def fitted(read: States, steps: int | None, clock: Clock | None = None) -> Lens:
    """The lens that `actcache.lens.fit` makes in so many steps, of which 0 is ridge and None its default, without its closing measures."""
    clock = clock or Clock()
    clock.start()
    found = grams(read)
    lens = ridge(read, found=found)
    if steps != 0:
        course = Course.of(read, None)
        lens = Training(read, lens, found, course if steps is None else Course(course.size, steps)).run()
    clock.stop()
    return lens


def divergence(lens: Lens, held_out: States) -> np.ndarray:
    """KL(final ‖ lens) in nats by layer, without the last state, mean over held-out tokens; products in float32."""
    return np.asarray(actcache.lens.evaluate(lens, held_out)["kl"][:-1])


def _texts(model: Path, random: np.random.Generator) -> Iterator[np.ndarray]:
    """The ids of each file of the standard library in random order, (sequence, 256), without what is left over at its end."""
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in library.rglob("*.py") if "site-packages" not in path.parts)
    tokenizer = load_tokenizer(model)
    for number in random.permutation(len(files)):
        try:
            text = files[number].read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        ids = np.array(tokenizer(text, verbose=False)["input_ids"], np.int64)
        if len(ids) >= CONTEXT:
            yield ids[: len(ids) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
