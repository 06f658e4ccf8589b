"""The picture of a table of predictions: layers down, positions across (nostalgebraist 2020)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from actcache.clients.figures.canvas import COLUMN, MONO, PAGE, drawable, page, picture_path, plain
from actcache.clients.figures.colours import TABLE, ink
from actcache.clients.lens.prediction_table import Predictions
from actcache.schemas.errors import InvalidInput

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Colour = Literal["probability", "entropy", "kl"]
SAID = {
    "probability": "probability of the token shown",
    "entropy": "entropy (nats)",
    "kl": "KL(final ‖ layer) (nats)",
}
ACROSS = 11
"""Positions beside each other; what follows stands below."""
MOST_POSITIONS = 132
CHARACTERS = 9
SIZE = 6.0
CELL_HIGH, CELL_WIDE, AROUND = 0.165, 0.53, 0.62
SIDE = 0.95
"""Inches beside the cells, for names of layers and the colour bar."""


def draw_predictions(table: Predictions, path: str | Path, colour: Colour = "probability") -> Path:
    """Draw what each layer predicts at each position, as PNG or SVG by the path's ending. Returns the path.

    Below each column stands its token, above it the next one, which a cell with a frame predicts. More than 11 positions go on below.

    Args:
        table: what `actcache.lens.predictions` returns.
        path: where to; the file is replaced.
        colour: what a cell's colour tells: the probability of its token, or the entropy or KL(final ‖ layer) of its prediction.

    Raises:
        InvalidInput: another ending or colour, no such folder, or more than 132 positions.
        Unsupported: matplotlib is not installed.
    """
    path = picture_path(path)
    if colour not in get_args(Colour):
        raise InvalidInput(f"colour={colour!r}: there is {', '.join(get_args(Colour))}")
    layers, positions = table.entropy.shape
    if positions > MOST_POSITIONS:
        raise InvalidInput(
            f"{path}: {positions} positions; at most {MOST_POSITIONS} are drawn, choose them by start and stop"
        )
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    values = table.probability[:, :, 0] if colour == "probability" else getattr(table, colour)
    finite = values[np.isfinite(values)]
    most = 1.0 if colour == "probability" else float(finite.max(initial=0)) or 1.0
    scale = ScalarMappable(Normalize(0, most), matplotlib.colormaps[TABLE])
    parts = [slice(low, min(low + ACROSS, positions)) for low in range(0, positions, ACROSS)]
    across = min(positions, ACROSS)
    width = max(COLUMN, min(PAGE, SIDE + CELL_WIDE * across))
    with page(path, width, len(parts) * (layers * CELL_HIGH + AROUND)) as figure:
        frames = figure.subplots(len(parts), 1, squeeze=False)[:, 0]
        for axes, part in zip(frames, parts, strict=True):
            _draw_part(axes, table, part, across, scale.to_rgba(values[:, part]))
        bar = figure.colorbar(scale, ax=list(frames), pad=0.01, fraction=0.03, aspect=30, shrink=min(1, 4 / len(parts)))
        bar.outline.set_visible(False)
        bar.set_label(SAID[colour])
    return path


def _draw_part(axes: Axes, table: Predictions, part: slice, across: int, colours: Any) -> None:
    """Some positions, in a frame that has room for `across` of them."""
    from matplotlib.patches import Rectangle

    layers, positions = colours.shape[:2]
    axes.imshow(colours, aspect="auto", interpolation="nearest", origin="lower")
    for layer, number in np.ndindex(layers, positions):
        at = part.start + number
        text = _fitting(table, int(table.top_id[layer, at, 0]))
        shown = axes.text(
            number,
            layer,
            text,
            ha="center",
            va="center",
            family=[MONO, "monospace"],
            fontsize=SIZE,
            color=ink(colours[layer, number]),
        )
        plain(shown)
        if table.right[layer, at]:
            edge = ink(colours[layer, number])
            axes.add_patch(
                Rectangle((number - 0.46, layer - 0.4), 0.92, 0.8, fill=False, edgecolor=edge, linewidth=0.7)
            )
    axes.set(xlim=(-0.5, across - 0.5), ylim=(-0.5, layers - 0.5))
    axes.set_yticks(range(layers))
    plain(axes.set_yticklabels([drawable(name) for name in table.layers]))
    axes.set_xticks(range(positions))
    plain(
        axes.set_xticklabels(
            [_fitting(table, int(each)) for each in table.token_id[part]], family=[MONO, "monospace"], fontsize=SIZE
        )
    )
    above = axes.secondary_xaxis("top")
    above.set_xticks(range(positions))
    plain(
        above.set_xticklabels(
            [_fitting(table, int(each)) for each in table.next_id[part]], family=[MONO, "monospace"], fontsize=SIZE
        )
    )
    for each in (axes, above):
        each.tick_params(length=0, pad=2)
        each.spines[:].set_visible(False)
    middle = positions / (2 * across)
    axes.set_xlabel("token", labelpad=2, fontsize=7, x=middle)
    above.set_xlabel("next token", labelpad=4, fontsize=7, x=middle)
    axes.set_ylabel("layer")


def _fitting(table: Predictions, token_id: int) -> str:
    """The token as it is drawn, cut to the width of a cell."""
    text = drawable(table.shown(token_id), MONO)
    return text if len(text) <= CHARACTERS else f"{text[: CHARACTERS - 1]}…"
