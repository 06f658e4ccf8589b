"""A GPT that is trained without looking ahead, cached like any other: `python examples/value_myopic_gpt.py OUT.zarr TEXT…`.

In a usual GPT the loss at a token also trains the columns before it, to be of use to it. Here the gradient is stopped wherever
attention reads an earlier column, so that each column is trained for its own prediction alone. Forward it computes what the
usual GPT computes, and with `myopic=False` it is one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

import actcache as ac


class MyopicAttention(nn.Module):
    """Causal self-attention whose gradient flows through a token's own key and value alone, if it is `myopic`."""

    def __init__(self, width: int, heads: int, myopic: bool = True) -> None:
        super().__init__()
        self.heads, self.myopic = heads, myopic
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(sequence, position, width) in and out."""
        sequences, positions, width = x.shape
        split = self.qkv(x).view(sequences, positions, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = split.unbind(0)
        own = torch.eye(positions, dtype=torch.bool, device=x.device)
        past = torch.ones(positions, positions, dtype=torch.bool, device=x.device).tril()
        k_past, v_past = (k.detach(), v.detach()) if self.myopic else (k, v)
        scores = torch.where(own, (q * k).sum(-1, keepdim=True), q @ k_past.transpose(-1, -2))
        weights = (scores / (width // self.heads) ** 0.5).masked_fill(~past, -torch.inf).softmax(-1)
        mixed = weights.masked_fill(own, 0) @ v_past + weights.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * v
        return self.out(mixed.transpose(1, 2).reshape(sequences, positions, width))


class Block(nn.Module):
    """Attention, then an MLP, each added to the stream."""

    def __init__(self, width: int, heads: int, myopic: bool = True) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = MyopicAttention(width, heads, myopic)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(sequence, position, width) in and out."""
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class ValueMyopicGPT(nn.Module):
    """The model. `block_size` is its longest sequence; with `myopic` False the gradient goes everywhere."""

    def __init__(
        self,
        vocabulary: int,
        block_size: int = 256,
        width: int = 64,
        layers: int = 4,
        heads: int = 4,
        myopic: bool = True,
    ) -> None:
        super().__init__()
        self.block_size = block_size
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(block_size, width)
        self.blocks = nn.ModuleList(Block(width, heads, myopic) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.unembedding = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits (sequence, position, vocabulary) of token ids (sequence, position)."""
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.blocks:
            x = block(x)
        return self.unembedding(self.norm(x))


def main(out: str, corpus: list[str]) -> None:
    """Train for a moment on a corpus, with the bundled tokenizer, and cache it."""
    from transformers import AutoTokenizer

    folder = Path(__file__).parent / "tiny-gpt"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    model = ValueMyopicGPT(len(tokenizer))
    ids = torch.tensor(tokenizer("\n".join(Path(path).read_text() for path in corpus), verbose=False)["input_ids"])
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(200):
        starts = torch.randint(len(ids) - 65, (8,)).tolist()
        batch = torch.stack([ids[start : start + 65] for start in starts])
        loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 50 == 49:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    capturable = ac.Capturable(name="value-myopic-gpt", module=model, tokenizer=folder)
    ac.build(ac.Spec(model=capturable, corpus=tuple(corpus), outputs=("loss",)), out)
    print(ac.open(out))
    print("loss by layer, nats:", ac.lens.logit(ac.open(out), max_tokens=20_000)["loss"].round(3).tolist())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
