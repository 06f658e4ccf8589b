"""A table of predictions, layer by position: arrays that show themselves as text, JSON and CSV."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.cells import cell_len, set_cell_size

from actcache.clients.summary import visible

NOTHING = -1
"""The target of a token after which nothing comes."""
WIDEST = 12
GAP = 2
COLUMNS = (
    *("layer", "token", "position", "token_id", "text", "next_id", "next_text"),
    *("entropy_nats", "loss_nats", "kl_nats", "next_rank"),
    *("place", "predicted_id", "predicted_text", "probability"),
)
MEASURES = {"entropy": "nats", "loss": "nats", "kl": "nats", "rank": "1"}


@dataclass(frozen=True, repr=False, eq=False)
class Predictions:
    """What each layer predicts at each position. `print` shows it with the last layer above, as nostalgebraist (2020) does.

    Attributes:
        layers: what the states are called, from first to last.
        token: places on the dataset's token axis, (position,) int64.
        position: positions in their sequences, (position,) int64.
        token_id: ids of the tokens there, (position,) int64.
        next_id: what is to be predicted, (position,) int64: the id of the next token; -1 where there is none.
        top_id: the most probable ids, the best first, (layer, position, top) int64.
        probability: their probabilities, (layer, position, top) float32.
        entropy: of each prediction, (layer, position) float32, in nats.
        loss: cross-entropy of the next token, (layer, position) float32, in nats; NaN where there is none.
        kl: KL(final ‖ layer), (layer, position) float32, in nats.
        rank: of the next token among all by probability, (layer, position) int64: 1 is the best; 0 where there is none.
        facts: how it was made; JSON takes it.
        text: the text of each id that occurs, by id; None without a tokenizer.
    """

    layers: tuple[str, ...]
    token: np.ndarray
    position: np.ndarray
    token_id: np.ndarray
    next_id: np.ndarray
    top_id: np.ndarray
    probability: np.ndarray
    entropy: np.ndarray
    loss: np.ndarray
    kl: np.ndarray
    rank: np.ndarray
    facts: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[int, str] | None = None

    def string(self, token_id: int) -> str | None:
        """The text of an id that occurs, as it is; None without a tokenizer, or for -1."""
        return None if self.text is None else self.text.get(int(token_id))

    def shown(self, token_id: int) -> str:
        """The text of an id with all of it to be seen and no control characters, or the id itself; nothing for -1."""
        if token_id == NOTHING:
            return ""
        return str(int(token_id)) if (text := self.string(token_id)) is None else visible(text) or f"<{int(token_id)}>"

    @property
    def right(self) -> np.ndarray:
        """Whether the most probable id is the next token's, (layer, position)."""
        return np.asarray(self.top_id[:, :, 0] == self.next_id)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON takes it; what is not a number is null, and arrays are nested lists (layer, position, …)."""
        strings: dict[str, Any] = {}
        if self.text is not None:
            strings = {
                "text": list(map(self.string, self.token_id)),
                "next_text": list(map(self.string, self.next_id)),
                "top_text": [[list(map(self.string, ids)) for ids in row] for row in self.top_id],
            }
        return {
            **self.facts,
            "labels": {"layer": list(self.layers)},
            "units": {**MEASURES, "probability": "1"},
            **{name: getattr(self, name).tolist() for name in ("token", "position", "token_id")},
            "next_id": _known(self.next_id != NOTHING, self.next_id),
            **strings,
            "top_id": self.top_id.tolist(),
            "probability": self.probability.astype(float).tolist(),
            **{
                name: _known(np.isfinite(getattr(self, name)), getattr(self, name))
                for name in ("entropy", "loss", "kl")
            },
            "rank": _known(self.rank > 0, self.rank),
        }

    def to_csv(self, path: str | Path) -> Path:
        """Write one line for each of the ids kept of each layer and position. Returns the path."""
        path = Path(path)
        with path.open("w", newline="", encoding="utf-8") as file:
            lines = csv.writer(file, lineterminator="\n")
            lines.writerow(COLUMNS)
            for layer, at, place in np.ndindex(*self.top_id.shape):
                ids = [int(self.token_id[at]), int(self.next_id[at]), int(self.top_id[layer, at, place])]
                has_next = ids[1] != NOTHING
                numbers = [float(values[layer, at]) for values in (self.entropy, self.loss, self.kl)]
                lines.writerow(
                    [
                        self.layers[layer],
                        int(self.token[at]),
                        int(self.position[at]),
                        ids[0],
                        self.string(ids[0]),
                        ids[1] if has_next else None,
                        self.string(ids[1]),
                        *(number if np.isfinite(number) else None for number in numbers),
                        int(self.rank[layer, at]) if has_next else None,
                        place + 1,
                        ids[2],
                        self.string(ids[2]),
                        float(self.probability[layer, at, place]),
                    ]
                )
        return path

    def __repr__(self) -> str:
        return self.table()

    def table(self, width: int | None = None, top: int = 1) -> str:
        """Aligned lines, `width` characters at most, or as many as the terminal has: the last layer above, positions across.

        A cell has the most probable token and its probability, `*` where it is the next token; with `top`, so many below each other.
        What does not fit beside each other stands below.
        """
        width = shutil.get_terminal_size().columns if width is None else width
        top = min(top, self.top_id.shape[2])
        below = [""] * (top - 1)
        names = ["position", "token", *(name for label in reversed(self.layers) for name in (label, *below)), "next"]
        first = max(map(len, names))
        columns = [self._column(at, top) for at in range(len(self.token))]
        said = ", ".join(f"{name} {value}" for name, value in self.facts.items())
        lines = [said, "the most probable next token and its probability; * where it is the next token"]
        for part in _fitting(columns, width - first):
            lines.append("")
            for number, name in enumerate(names):
                cells = (" " * GAP + column[number] for column in part)
                lines.append(f"{name:<{first}}{''.join(cells)}".rstrip())
        return "\n".join(lines)

    def _column(self, at: int, top: int) -> list[str]:
        """The lines of a position, equally wide."""
        cells = []
        for layer in reversed(range(len(self.layers))):
            for place in range(top):
                found = self.top_id[layer, at, place]
                cells.append((self.shown(found), self.probability[layer, at, place], found == self.next_id[at]))
        own, after = self.shown(self.token_id[at]), self.shown(self.next_id[at])
        wide = min(WIDEST, max(cell_len(name) for name in (own, after, *(cell[0] for cell in cells))))
        lines = [f"{_cut(name, wide)} {_percent(share)}{'*' if right else ' '}" for name, share, right in cells]
        ends = [_cut(name, cell_len(lines[0])) for name in (str(int(self.position[at])), own, after)]
        return [*ends[:2], *lines, ends[2]]


def _fitting(columns: Sequence[list[str]], width: int) -> Iterator[list[list[str]]]:
    """Columns in runs that fit a width, one at least."""
    part: list[list[str]] = []
    taken = 0
    for column in columns:
        own = GAP + cell_len(column[0])
        if part and taken + own > width:
            yield part
            part, taken = [], 0
        part.append(column)
        taken += own
    yield part


def _cut(text: str, width: int) -> str:
    """A text so many cells of a terminal wide, what is left out marked."""
    return set_cell_size(text, width) if cell_len(text) <= width else f"{set_cell_size(text, width - 1)}…"


def _percent(share: float) -> str:
    return f"{share:.2f}"[1:] if share < 0.995 else "1.0"


def _known(where: np.ndarray, values: np.ndarray) -> Any:
    """Nested lists of numbers, null where there is none."""
    plain = values.astype(object)
    plain[~where] = None
    return plain.tolist()
