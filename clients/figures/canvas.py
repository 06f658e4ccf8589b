"""The paper that pictures are drawn on: their size, fonts and files, the same wherever they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actcache.schemas.errors import InvalidInput, Unsupported

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMN, PAGE = 3.4, 6.8
"""Widths in inches: a column of a paper in two columns, and both."""
SANS, MONO = "DejaVu Sans", "DejaVu Sans Mono"
"""Fonts that come with matplotlib, so that a picture is the same on every machine."""

ACRONYMS = {"kl": "KL", "cka": "CKA", "r2": "R²", "rmse": "RMSE"}

_METADATA: Mapping[str, dict[str, None]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
}
_STYLE = {
    "font.family": [SANS, "sans-serif"],
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "actcache",
    "savefig.dpi": 300,
}


def picture_path(path: str | Path) -> Path:
    """The path of a picture that can be drawn here; to be asked before long work.

    Raises:
        InvalidInput: neither PNG nor SVG, or its folder is not there.
        Unsupported: matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix.lower() not in _METADATA:
        raise InvalidInput(f"{path}: pictures are drawn as {' and '.join(_METADATA)}; give the file such an ending")
    if not path.parent.is_dir():
        raise InvalidInput(f"{path}: the folder {path.parent} does not exist; make it first")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise Unsupported("a picture needs matplotlib; pip install 'actcache[plots]'") from None
    return path


@contextmanager
def page(path: str | Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches, written to the path at the end, the same bytes every time.

    Raises:
        InvalidInput, Unsupported: as `picture_path`.
    """
    path = picture_path(path)
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", _STYLE]):  # whatever the user's own settings are
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(path, format=path.suffix[1:].lower(), metadata=_METADATA[path.suffix.lower()])


def plain(texts: Any) -> Any:
    """Texts of matplotlib that show what they hold: a `$` begins no formula."""
    for text in texts if isinstance(texts, list) else [texts]:
        text.set_parse_math(False)
    return texts


def spoken(name: str, unit: str = "1") -> str:
    """The name of a measure in words, without the unit that it ends with."""
    words = name.replace("_", " ").removesuffix(f" {unit}")
    first, *others = words.split(" ")
    return " ".join([ACRONYMS.get(first, first), *(ACRONYMS.get(word, word) for word in others)])


def with_unit(name: str, unit: str) -> str:
    """The name of a measure in words, and its unit."""
    words = spoken(name, unit)
    return words if unit in ("1", words) else f"{words} ({unit})"


def drawable(text: str, font: str = SANS) -> str:
    """A text in which characters that a font lacks are escaped, as in `\\u4e2d`."""
    has = _glyphs(font)
    return "".join(character if has(ord(character)) else _escaped(character) for character in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


@cache
def _glyphs(font: str) -> Callable[[int], bool]:
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font

    face = FT2Font(findfont(font))
    known = frozenset(face.get_charmap())
    return known.__contains__
