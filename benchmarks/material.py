"""What the benchmarks work on: models, text, activations, a sealed dataset. Each is made once, when first asked for."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import string
import sysconfig
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from actcache.jobs.resolve import layout_of
from actcache.schemas.array import ArrayLayout
from actcache.schemas.dtypes import numpy_dtype
from actcache.schemas.plan import ModelShape
from actcache.schemas.spec import Spec

THREADS = os.cpu_count() or 1
TINY_GPT = Path(__file__).parent.parent / "examples" / "tiny-gpt"
CORPUS = str(Path(sysconfig.get_path("stdlib")) / "*.py")
CONTEXT = 256
MEMORY = Path("/dev/shm")
SITES = ("blocks.1.hook_resid_post", "blocks.3.hook_resid_post", "blocks.5.hook_resid_post")
SITES_SIDE_BY_SIDE = 6
STEPS = 250


@dataclass(frozen=True)
class Material:
    """Everything made lies below `folder`.

    `seconds` is the least time of one comparison, `megabytes` the size of a text corpus, `steps` how long the lens's peer trains.
    """

    folder: Path
    seconds: float
    megabytes: int = 100
    steps: int = STEPS

    @property
    def memory(self) -> Path:
        """A folder whose files lie in memory, where there is one."""
        return MEMORY if MEMORY.is_dir() else self.folder

    @cached_property
    def in_memory(self) -> Path:
        """A folder of this run in `memory`, which goes when it ends."""
        path = Path(tempfile.mkdtemp(prefix="actcache-benchmarks-", dir=self.memory))
        atexit.register(shutil.rmtree, path, ignore_errors=True)
        return path

    @cached_property
    def model(self) -> Path:
        """The bundled model, or a random one of the same shape where it is missing."""
        if (TINY_GPT / "model.safetensors").is_file():
            return TINY_GPT
        return random_gpt2(self.folder / "small-gpt2", layers=6, width=128, vocabulary=4096)

    @property
    def model_name(self) -> str:
        """What to call it in the output."""
        return "tiny-gpt" if self.model == TINY_GPT else "a random GPT-2 (no bundled model)"

    @cached_property
    def states(self) -> np.ndarray:
        """Residual states of real text, (token, site, d_model) float32: the embedding and each block's output but the last."""
        import torch

        from actcache.jobs.encode import load_tokenizer

        model = load_model(self.model)
        text = "".join(path.read_text(encoding="utf-8") for path in sorted(Path(CORPUS).parent.glob("[a-s]*.py")))
        ids = load_tokenizer(self.model)(text[:250_000], verbose=False)["input_ids"]
        rows = torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).reshape(-1, CONTEXT)
        parts = []
        with torch.inference_mode():
            for batch in rows.split(32):
                hidden = model.transformer(batch, output_hidden_states=True, use_cache=False).hidden_states
                parts.append(torch.stack(hidden[:SITES_SIDE_BY_SIDE], 2).flatten(0, 1).numpy())
        return np.concatenate(parts)

    def activations(self, width: int, dtype: str, tokens: int) -> np.ndarray:
        """Real activations, (tokens, width): one site's, or six side by side, which are as wide as a GPT-2. Repeated when few."""
        one = self.states[:, -1] if width == self.states.shape[2] else self.states.reshape(len(self.states), -1)
        if one.shape[1] != width:
            raise ValueError(f"no activations of width {width}")
        return np.resize(one, (tokens, width)).astype(numpy_dtype(dtype))

    @property
    def widths(self) -> tuple[int, int]:
        """The width of one site, and of six side by side."""
        return self.states.shape[2], self.states.shape[2] * SITES_SIDE_BY_SIDE

    @cached_property
    def sealed(self) -> Path:
        """A sealed dataset of the model: three sites of 262,144 tokens in shards of 32 MiB."""
        import actcache

        url = self.folder / "sealed"
        actcache.build(actcache.Spec(**self.sealed_spec), url)
        return url

    @property
    def sealed_spec(self) -> dict[str, object]:
        """The spec of `sealed`."""
        return {
            "model": str(self.model),
            "corpus": (CORPUS,),
            "context": CONTEXT,
            "sites": " ".join(SITES),
            "max_tokens": 1 << 18,
            "block_tokens": 1 << 16,
        }


def layout(rows: np.ndarray, chunk: int, shard: int, name: str = SITES[0]) -> ArrayLayout:
    """The layout of a site of these rows, cut as asked."""
    return ArrayLayout(name, rows.shape, rows.dtype.name, shard, chunk, ("token", "d_model"))


def default_cut(width: int, dtype: str) -> tuple[int, int]:
    """Tokens of a chunk and of a shard, as a build chooses them for a model of this width."""
    shape = ModelShape(n_layers=1, d_model=width, vocab_size=1, max_context=None)
    cut = layout_of(Spec(model="", corpus=("",)), shape, CONTEXT, dtype)
    return cut.chunk_tokens, cut.block_tokens


def load_model(folder: Path):  # noqa: ANN201  (transformers is imported late)
    """A GPT-2 in float32, ready to run."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.GPT2LMHeadModel.from_pretrained(folder, local_files_only=True)
    return model.eval().requires_grad_(False)


def random_gpt2(folder: Path, layers: int, width: int, vocabulary: int = 50257) -> Path:
    """A GPT-2 with random weights and a byte-level tokenizer, saved in a folder."""
    import torch
    import transformers
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.models import save_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=CONTEXT,
        n_embd=width,
        n_layer=layers,
        n_head=max(1, width // 64),
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.utils.logging.disable_progress_bar()
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def random_text(path: Path, characters: int) -> str:
    """A text file of random ASCII letters and digits, each of them one token of the byte-level tokenizer."""
    letters = random.Random(0).choices(string.ascii_letters + string.digits, k=characters)
    path.write_text("".join(letters), encoding="utf-8")
    return str(path)
