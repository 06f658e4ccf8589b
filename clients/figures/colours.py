"""Colours that those who are colour-blind tell apart too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.colors import ListedColormap

LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's (2008) without the yellow, which is too light for lines on white."""
MARKERS = "os^Dv<>"
GREY = "#767676"

SEQUENTIAL = "viridis"
TABLE = "cividis"
"""Perceptually uniform, and nearly the same to the colour-blind (Nuñez et al. 2018)."""

STEPS = 127
"""Steps of each arm of the diverging map."""
LIGHT, DARK, CHROMA = 0.975, 0.46, 0.115
BLUE, ORANGE = 245.0, 50.0


def diverging() -> ListedColormap:
    """Blue below, nearly white at 0, orange brown above.

    Blue and orange are what all common kinds of colour blindness tell apart, as red and green they do not; and lightness falls in equal
    steps, and as far, on both sides, which matplotlib's RdBu, PuOr and BrBG do not, so that equal numbers look equally far from 0.
    """
    from matplotlib.colors import ListedColormap

    return ListedColormap(diverging_table(), "actcache_diverging")


def diverging_table() -> np.ndarray:
    """Colours of the diverging map, sRGB (255, 3), 0 to 1: straight lines in Oklab (Ottosson 2020) from one light grey."""
    share = np.linspace(0, 1, STEPS + 1)[:, None]
    arms = []
    for hue in (BLUE, ORANGE):
        end = np.array([DARK, CHROMA * np.cos(np.radians(hue)), CHROMA * np.sin(np.radians(hue))])
        arms.append(srgb(np.array([LIGHT, 0, 0]) * (1 - share) + end * share))
    return np.concatenate([arms[0][:0:-1], arms[1]])


def srgb(oklab: np.ndarray) -> np.ndarray:
    """Colours of sRGB, 0 to 1, of Oklab colours (n, 3): https://bottosson.github.io/posts/oklab/."""
    cubes = oklab @ np.array(_OKLAB_TO_LMS).T
    linear = cubes**3 @ np.array(_LMS_TO_LINEAR).T
    linear = np.clip(linear, 0, 1)
    return np.asarray(np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055))


def ink(colour: np.ndarray) -> str:
    """Black or white, whichever has the larger contrast on a colour (3+) of sRGB, by WCAG 2's relative luminance."""
    parts = np.asarray(colour[:3])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ [0.2126, 0.7152, 0.0722])
    return "black" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "white"


_OKLAB_TO_LMS = (
    (1.0, 0.3963377774, 0.2158037573),
    (1.0, -0.1055613458, -0.0638541728),
    (1.0, -0.0894841775, -1.2914855480),
)
_LMS_TO_LINEAR = (
    (4.0767416621, -3.3077115913, 0.2309699292),
    (-1.2684380046, 2.6097574011, -0.3413193965),
    (-0.0041960863, -0.7034186147, 1.7076147010),
)
