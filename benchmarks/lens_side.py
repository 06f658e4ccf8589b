"""The lens benchmark's peer, tuned-lens 0.2.0 (Belrose et al. 2023): `python -m benchmarks.lens_side JOB`, in its environment.

JOB is JSON: the fields of a `TrainJob` or `EvaluateJob` and `mode`, "train" or "evaluate". The result is the last line
printed, as JSON.

**Training** runs the package's own `Train` with its defaults: SGD with Nesterov momentum 0.9 at a rate of 1.0 (given to
torch as 1.0 × (1 - 0.9)), which falls linearly to zero over the steps, without warm-up; weight decay 1e-3 towards the
identity; gradients of all layers together clipped to a norm of 1.0; KL(final ‖ lens) over every token; translators that
begin at zero; data shuffled in a buffer of 10,000 sequences, each seen once. The model runs in float32 without autocast;
the lens's parameters are float32, but its forward pass runs under autocast to bfloat16, which the loop has on a CPU, too.
What is not its own:

- token ids come from a file, and the tokenizer, which nothing else needs, is not loaded;
- a forward pass takes `batch` sequences, where the package's default is one of 2,048 tokens;
- checkpoints are lenses, not snapshots to go on from, and the time of saving them does not count;
- with `autocast` off, the forward pass of the lens is float32.

The steps' tokens must be in the file: at its end the package's loop would stop early and say nothing.

**Evaluation** calls `LogitLens` and `TunedLens` on the model's hidden states in float32. The package's `Eval` does the same, with
the divergence as a mean over every token (`kl_everywhere`).
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM
from tuned_lens.nn.lenses import Lens, LogitLens, TunedLens
from tuned_lens.scripts import ingredients
from tuned_lens.scripts.train_loop import State, Train

from benchmarks.lens_jobs import Checkpoint, Evaluated, EvaluateJob, Measures, Trained, TrainJob


class Model(ingredients.Model):
    """A model of a folder, without its tokenizer, which may be of a later transformers than this environment's."""

    def load_tokenizer(self, must_use_cache: bool = False) -> str:
        """Something true, which is all that the training loop asks of it."""
        return "none"


@dataclass
class Tokens(ingredients.Data):
    """Token ids instead of text."""

    ids: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))

    def load(self, tokenizer: object) -> tuple[Dataset, float]:
        """A row for each sequence, as the package's own tokenisation gives them, and a factor from nats to nats."""
        return Dataset.from_dict({"input_ids": list(self.ids)}).with_format("torch"), 1.0


@dataclass
class Training(Train):
    """The package's training, timed from the end of its setup."""

    wanted: Sequence[int] = ()
    autocast: bool = True
    done: list[Checkpoint] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    began: tuple[float, float] = (0.0, 0.0)
    apart: tuple[float, float] = (0.0, 0.0)

    def get_lens(self, model: Any) -> TunedLens:
        """The package's new lens."""
        lens = super().get_lens(model)
        if not self.autocast:
            lens.forward = partial(_without_autocast, lens.forward)
        return lens

    def setup(self) -> Any:
        """The package's setup; what comes after it counts."""
        ready = super().setup()
        self.began = _now()
        return ready

    def snapshot(self, state: State) -> None:
        """Save the lens, where its step is asked for, outside the time."""
        before = _now()
        seconds, cpu_seconds = self.taken(before)
        if state.step in self.wanted:
            folder = self.checkpoint_dir / str(state.step)
            state.lens.save(folder)
            tokens = state.step * self.tokens_per_step
            self.done.append(Checkpoint(state.step, str(folder), tokens, seconds, cpu_seconds, self.kl))
        self.apart = tuple(sum(spent) for spent in zip(self.apart, _since(before), strict=True))

    def taken(self, now: tuple[float, float]) -> tuple[float, float]:
        """Seconds and processor seconds of training until then."""
        wall, cpu = (time - began - apart for time, began, apart in zip(now, self.began, self.apart, strict=True))
        return wall, cpu

    def _log(self, opt: Any, step: int, losses: dict[str, list[float]], tuned_lens: Any, nats_to_bpb: float) -> None:
        self.kl = [sum(values) / len(values) for values in losses.values()]


def train(job: TrainJob) -> Trained:
    """Train a lens.

    Raises:
        ValueError: the file has too few tokens, or steps do not divide into batches or are too few for a checkpoint.
    """
    ids = np.load(job.tokens)
    if job.tokens_a_step % (job.batch * ids.shape[1]):
        raise ValueError(f"{job.tokens_a_step} tokens a step are no batches of {job.batch} × {ids.shape[1]}")
    if ids.size < job.steps * job.tokens_a_step:
        raise ValueError(f"{ids.size} tokens: too few for {job.steps} steps of {job.tokens_a_step}")
    if any(not 0 < step <= job.steps for step in job.checkpoints):
        raise ValueError(f"checkpoints at {job.checkpoints} of {job.steps} steps")
    began = time.perf_counter()
    training = Training(
        model=Model(job.model, precision="float32"),
        data=Tokens(ids=ids, max_length=ids.shape[1]),
        opt=ingredients.Optimizer(),
        dist=ingredients.Distributed(per_gpu_batch_size=job.batch),
        output=Path(job.out),
        seed=job.seed,
        num_steps=job.steps,
        tokens_per_step=job.tokens_a_step,
        checkpoint_freq=math.gcd(*job.checkpoints) or None,
        wanted=job.checkpoints,
        autocast=job.autocast,
    )
    training.execute()
    seconds, cpu_seconds = training.taken(_now())
    tokens = job.steps * job.tokens_a_step
    return Trained(
        folder=job.out,
        steps=job.steps,
        tokens=tokens,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        tokens_a_second=tokens / seconds,
        setup_seconds=training.began[0] - began,
        checkpoints=training.done,
        batch=job.batch,
        autocast=job.autocast,
        threads=torch.get_num_threads(),
        versions=_versions(),
    )


@torch.inference_mode()
def evaluate(job: EvaluateJob) -> Evaluated:
    """The measures of the logit lens and of a saved lens.

    Raises:
        ValueError: a measure is not finite.
    """
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(job.model, local_files_only=True, torch_dtype=torch.float32).eval()
    tuned = TunedLens.from_model_and_pretrained(model, job.lens)
    lenses: dict[str, Lens] = {"logit": LogitLens.from_model(model), "tuned": tuned}
    saved = json.loads((Path(job.lens) / "config.json").read_text(encoding="utf-8"))
    rows = torch.from_numpy(np.load(job.tokens).astype(np.int64))
    layers = model.config.num_hidden_layers
    sums = {name: torch.zeros(3, layers + 1, dtype=torch.float64) for name in lenses}
    for ids in rows.split(job.batch):
        output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
        final = output.logits.log_softmax(-1)
        for name, lens in lenses.items():
            for layer, state in enumerate(output.hidden_states[:-1]):
                sums[name][:, layer] += _sums(lens(state, idx=layer).log_softmax(-1), final, ids)
            sums[name][:, layers] += _sums(final, final, ids)
    pairs = rows[:, 1:].numel()
    means = {name: found / torch.tensor([[pairs], [pairs], [rows.numel()]]) for name, found in sums.items()}
    if not all(found.isfinite().all() for found in means.values()):
        raise ValueError("a loss or divergence is not finite")
    measures = {name: Measures(*found.tolist()) for name, found in means.items()}
    return Evaluated(
        logit=measures["logit"],
        tuned=measures["tuned"],
        tokens=rows.numel(),
        pairs=pairs,
        same_unembedding=saved.get("unembed_hash") == tuned.unembed.unembedding_hash(),
        seconds=time.perf_counter() - began,
        versions=_versions(),
    )


def _sums(found: Tensor, final: Tensor, ids: Tensor) -> Tensor:
    """Of log-probabilities (sequence, position, vocabulary): loss and divergence over pairs, divergence over all; (3,)."""
    loss = -found[:, :-1].gather(-1, ids[:, 1:, None])
    kl = (final.exp() * (final - found)).sum(-1)
    return torch.stack([part.sum(dtype=torch.float64) for part in (loss, kl[:, :-1], kl)])


def _without_autocast(forward: Any, h: Tensor, idx: int) -> Tensor:
    with torch.autocast(h.device.type, enabled=False):
        return forward(h, idx)


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(before: tuple[float, float]) -> tuple[float, float]:
    wall, cpu = (now - then for now, then in zip(_now(), before, strict=True))
    return wall, cpu


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("tuned-lens", "torch", "transformers")}


def main() -> None:
    """Do a job and print what came of it."""
    job = json.loads(sys.argv[1])
    mode = job.pop("mode")
    torch.set_num_threads(job["threads"])
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    done = train(TrainJob(**job)) if mode == "train" else evaluate(EvaluateJob(**job))
    print(json.dumps(asdict(done)))


if __name__ == "__main__":
    main()
