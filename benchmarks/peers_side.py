"""One side of `peers`, in an environment of its own: `python -m benchmarks.peers_side PEER JOB`. Prints its times as JSON.

Each way of getting all layers takes turns with a bare forward pass of the same weights over the same batches in this process. They
take turns by batch, in a second or less, so that what else the machine does hits all of them; a round is all batches. Afterwards
what was captured of the first batch is compared with what hooks on the blocks of the bare model see.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from benchmarks.ratio import ROUNDS, Times, alternate, timed

BARE = "bare forward pass"
TOLERANCE = 1e-3
"""Largest difference from the bare model that is taken for rounding, as a part of the largest value of the layer. Attention that is
computed in another way stays below it by far; another layer or another input does not."""

Layers = Sequence[Tensor]


@dataclass(frozen=True)
class Job:
    """What a side is to do. `tokens` is an .npy file of ids, (sequence, position) int64; `batch` counts sequences."""

    model: str
    tokens: str
    folder: str
    threads: int
    batch: int


@dataclass(frozen=True)
class Way:
    """A way of getting all layers. `work` does one part of a round, of which there are as many as batches.

    `captured` returns the first batch's layers, in order. With several `passes` a round, their mean is told as well.
    """

    work: Callable[[int], object]
    captured: Callable[[], Layers] | None = None
    passes: int = 1


def plain(job: Job, model: Any, batches: Sequence[Tensor]) -> dict[str, Way]:
    """What a user writes who has transformers alone. The last hidden state has been through the final norm."""
    folder = Path(job.folder)

    def save(module: Any, number: int) -> None:
        torch.save(module(batches[number], output_hidden_states=True).hidden_states, folder / f"{number}.pt")

    def saved() -> Layers:
        return torch.load(folder / "0.pt")[1:-1]

    return {
        "plain script, output_hidden_states and torch.save": Way(partial(save, model), saved),
        "the same through model.transformer, without logits": Way(partial(save, model.transformer), saved),
        "bare forward pass with use_cache=False": Way(lambda number: model(batches[number], use_cache=False)),
    }


def transformer_lens(job: Job, model: Any, batches: Sequence[Tensor]) -> dict[str, Way]:
    """A TransformerBridge; it switches the attention of the model that it loads to "eager"."""
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(job.model, device="cpu")
    bridge.eval()
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.config.n_layer)]

    def layers(batch: Tensor) -> Layers:
        _, cache = bridge.run_with_cache(batch, names_filter=lambda name: name in names)
        return [cache[name] for name in names]

    return {f"TransformerLens {version('transformer-lens')}, run_with_cache": _kept(layers, batches)}


def nnsight(job: Job, model: Any, batches: Sequence[Tensor]) -> dict[str, Way]:
    """A trace that saves the output of every block, run to the logits or stopped after the last block."""
    import nnsight

    traced = nnsight.TransformersModel(job.model, task="text-generation", dispatch=True)

    def layers(batch: Tensor) -> Layers:
        with traced.trace(batch):
            saved = nnsight.save([block.output for block in traced.transformer.h])
        return saved  # noqa: RET504  (the body of a trace is no place to return from)

    def stopped(batch: Tensor) -> Layers:
        with traced.trace(batch) as tracer:
            saved = nnsight.save([block.output for block in traced.transformer.h])
            tracer.stop()
        return saved

    name = f"nnsight {version('nnsight')}, trace"
    return {name: _kept(layers, batches), f"{name} and stop() after the last layer": _kept(stopped, batches)}


def sae_lens(job: Job, model: Any, batches: Sequence[Tensor]) -> dict[str, Way]:
    """A CacheActivationsRunner for each layer: one hook a pass, which ends after its layer. Makes the runners outside the time."""
    import datasets
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

    datasets.disable_progress_bars()
    rows, width = torch.cat(list(batches)), model.config.n_embd
    folder, runners = Path(job.folder), []
    for layer in range(model.config.n_layer):
        config = CacheActivationsRunnerConfig(
            dataset_path="",
            model_name=job.model,
            model_class_name="AutoModelForCausalLM",
            model_batch_size=job.batch,
            hook_name=f"transformer.h.{layer}",
            d_in=width,
            training_tokens=rows.numel(),
            context_size=rows.shape[1],
            shuffle=False,
            prepend_bos=False,
            device="cpu",
            buffer_size_gb=(rows.numel() + 1) * width * 4 / 1e9,  # all tokens in one: it stores whole buffers only
        )
        tokens = datasets.Dataset.from_dict({"input_ids": rows.tolist()})
        runners.append(CacheActivationsRunner(config, override_dataset=tokens))

    if len(runners) != len(batches):
        raise ValueError(f"{len(batches)} batches: it takes as many as the model has layers, for a part to be a pass")

    stored: dict[int, Any] = {}
    numbers = itertools.count()

    def work(layer: int) -> None:
        runners[layer].cfg.new_cached_activations_path = str(folder / str(next(numbers)))
        stored[layer] = runners[layer].run()

    def captured() -> Layers:
        return [
            torch.tensor(np.array(stored[layer][: job.batch][runners[layer].cfg.hook_name])) for layer in sorted(stored)
        ]

    name = f"SAELens {version('sae-lens')}, CacheActivationsRunner"
    return {f"{name}, {len(runners)} layers": Way(work, captured, passes=len(runners))}


PEERS = {"plain": plain, "transformer-lens": transformer_lens, "nnsight": nnsight, "sae-lens": sae_lens}


def main() -> None:
    """Time the ways of a peer and print them."""
    peer, job = sys.argv[1], Job(**json.loads(sys.argv[2]))
    torch.set_num_threads(job.threads)
    model = GPT2LMHeadModel.from_pretrained(job.model, local_files_only=True).eval()
    batches = torch.from_numpy(np.load(job.tokens)).split(job.batch)
    ways = PEERS[peer](job, model, batches)
    times = _times(
        {BARE: lambda number: model(batches[number]), **{name: way.work for name, way in ways.items()}}, len(batches)
    )
    expected, differences = _layers(model, batches[0]), {}
    for name, way in ways.items():
        if way.captured is not None:
            differences[name] = _difference(expected, way.captured())
        if way.passes > 1:
            times[f"{name}, mean of its passes"] = [seconds / way.passes for seconds in times[name]]
    print(json.dumps({"times": times, "differences": differences, "threads": torch.get_num_threads()}))


def _times(sides: Mapping[str, Callable[[int], object]], parts: int) -> Times:
    """Seconds of each side by round. In turns, each does one part of a round."""
    by_part = alternate({name: _next_part(work, parts) for name, work in sides.items()}, 0, ROUNDS * parts)
    return {name: [sum(taken) for taken in zip(*[iter(times)] * parts, strict=True)] for name, times in by_part.items()}


def _next_part(work: Callable[[int], object], parts: int) -> Callable[[], float]:
    numbers = itertools.cycle(range(parts))
    return timed(torch.inference_mode()(lambda: work(next(numbers))))


def _kept(layers: Callable[[Tensor], Layers], batches: Sequence[Tensor]) -> Way:
    """A way that stores nothing."""
    return Way(lambda number: layers(batches[number]), lambda: torch.inference_mode()(layers)(batches[0]))


@torch.inference_mode()
def _layers(model: Any, batch: Tensor) -> Layers:
    """What each block returns, (sequence, position, d_model)."""
    layers: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *seen: layers.append(seen[-1])) for block in model.transformer.h]
    model(batch)
    for hook in hooks:
        hook.remove()
    return layers


def _difference(expected: Layers, captured: Layers) -> float:
    """The largest difference, as a part of the largest value of its layer.

    Raises:
        ValueError: it is not due to rounding, or layers are missing.
    """
    if len(captured) < len(expected) - 1:
        raise ValueError(f"{len(captured)} layers were captured, not {len(expected)}")
    pairs = zip(expected, captured, strict=False)
    difference = max(float((mine - theirs).abs().max() / mine.abs().max()) for mine, theirs in pairs)
    if not difference <= TOLERANCE:
        raise ValueError(f"what was captured differs from the bare model's layers by {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
