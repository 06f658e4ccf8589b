"""All layers of a model by a build, by a user's own script and by other libraries, each ÷ a bare forward pass."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from actcache.jobs.encode import load_tokenizer
from benchmarks import build
from benchmarks.material import CONTEXT, Material, random_gpt2, random_text
from benchmarks.peers_environment import Unavailable, environment, run_side
from benchmarks.peers_side import BARE, Job
from benchmarks.ratio import Result, compare

TITLE = "peers: all layers of a random GPT-2 of 8 × 512 ÷ a bare forward pass with logits, tokens/s"
NOTE = f"""  float32; 32 sequences of {CONTEXT} tokens in batches of 4, the same for all, on as many threads; files in memory where there is
  /dev/shm. Each side takes turns with model(input_ids) of the same weights in the same process, batch by batch; actcache, round by round.
  What is kept differs:
  actcache         stores 9 sites, the embedding and all layers: compressed, with checksums, norms and statistics. Computes no logits.
                   Its bare pass is called with use_cache=False, which is a little faster; a line below says by how much.
  plain script     stores 9 hidden states as they are, the last one after the final norm. Computes logits; a second line is without them.
  TransformerLens  stores nothing: 8 layers are in memory until the next batch. Computes logits, and attention without a fused kernel.
  nnsight          stores nothing: 8 layers are in memory until the next batch. Computes logits; the second line stops before them.
  SAELens          stores one layer a pass, as Arrow files; a pass ends after its layer, without logits. So 8 layers take 8 passes,
                   of which the first runs one block and the last all eight."""
SEQUENCES, BATCH = 32, 4  # as in `build`
PEERS = ("transformer-lens", "nnsight", "sae-lens")


def run(material: Material) -> Iterator[Result]:
    """Compare all of them."""
    print(NOTE)
    ours = next(result for result in build.run(material) if build.FULL in result.what)
    yield replace(ours, benchmark="peers", what=f"actcache, block stage of a build ÷ {BARE}", goal=None)
    folder = material.folder / "peers"
    model = random_gpt2(folder / "gpt2", layers=8, width=512)
    tokens = _tokens(model, folder)
    for peer in ("plain", *PEERS):
        try:
            python = Path(sys.executable) if peer == "plain" else environment(peer)
            with tempfile.TemporaryDirectory(prefix="actcache-benchmarks-", dir=material.memory) as files:
                job = Job(str(model), str(tokens), files, torch.get_num_threads(), BATCH)
                measured = run_side(python, "benchmarks.peers_side", peer, json.dumps(asdict(job)), home=files)
        except Unavailable as reason:
            print(f"  {peer}: skipped, {reason}", flush=True)
            continue
        times = measured["times"]
        for name in times:
            if name != BARE:
                yield compare(
                    "peers", f"{name} ÷ {BARE}", times, name, BARE, amount=SEQUENCES * CONTEXT, unit="tokens/s"
                )
        worst = max(measured["differences"].values())
        found = f"differs by at most {worst:.0e} of a layer's largest value from" if worst else "equals"
        print(f"    what was captured {found} what hooks on the bare model's blocks see", flush=True)


def _tokens(model: Path, folder: Path) -> Path:
    """The ids of the text that `build` runs, (sequence, position) int64, in a file."""
    text = Path(random_text(folder / "random.txt", SEQUENCES * CONTEXT)).read_text(encoding="utf-8")
    ids = np.array(load_tokenizer(model)(text, verbose=False)["input_ids"], np.int64)
    path = folder / "tokens.npy"
    np.save(path, ids.reshape(SEQUENCES, CONTEXT))
    return path
