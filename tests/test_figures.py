"""Pictures: what they show, that they are the same every time, and that no token spoils them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import actcache as ac
from actcache.clients.figures.canvas import drawable, picture_path
from actcache.clients.figures.colours import LINES, STEPS, diverging_table, ink
from actcache.clients.figures.heatmap import _ends, _number
from actcache.clients.lens.predictions import Predictions
from actcache.clients.results import Measure, Results

LAYERS = ["embed", "0", "1", "2"]


def results(seed: int = 0) -> Results:
    generator = np.random.default_rng(seed)
    line = generator.random(4)
    measures = {
        "loss": Measure(line, "nats", low=line - 0.1, high=line + 0.1),
        "kl": Measure(generator.random(4), "nats"),
        "agreement": Measure(generator.random(4), "share"),
        "penalty": Measure(generator.normal(size=(4, 4)), "nats", ("lens", "layer")),
        "penalty_bits_per_byte": Measure(generator.random((4, 4)), "bits per byte", ("lens", "layer")),
        "accuracy": Measure(np.array(0.5), "share", ()),
    }
    return Results(measures, {"layer": LAYERS, "lens": LAYERS})


def table(strings: list[str], layers: int = 3) -> Predictions:
    generator = np.random.default_rng(0)
    count = len(strings)
    ids = np.arange(count)
    shape = (layers, count)
    return Predictions(
        tuple(map(str, range(layers))),
        ids,
        ids,
        ids,
        np.append(ids[1:], -1),
        generator.integers(count, size=(*shape, 2)),
        *(generator.random(size).astype(np.float32) for size in ((*shape, 2), shape, shape, shape)),
        np.ones(shape, np.int64),
        {},
        dict(enumerate(strings)),
    )


def texts(path: Path) -> list[str]:
    return ["".join(each.itertext()) for each in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def draw_any(which: str, ds: ac.Dataset, path: Path) -> Path:
    if which == "draw":
        return ac.figures.draw(results(), path)
    if which == "together":
        return ac.figures.draw_together({"logit lens": results(), "tuned lens": results(1)}, "loss", path)
    if which == "predictions":
        return ac.figures.draw_predictions(ac.lens.predictions(None, ds, 0, stop=14), path)
    return ac.figures.overview(ds, ac.lens.logit(ds, max_tokens=100), path)


KINDS = ["draw", "together", "predictions", "overview"]


@pytest.mark.parametrize("which", KINDS)
@pytest.mark.parametrize("ending", [".png", ".SVG"])
def test_a_picture_is_the_same_every_time_whatever_the_users_settings(
    built: str, tmp_path: Path, which: str, ending: str
):
    ds = ac.open(built)
    first = draw_any(which, ds, tmp_path / f"a{ending}").read_bytes()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path", "savefig.dpi": 20}):
        second = draw_any(which, ds, tmp_path / f"b{ending}").read_bytes()
        assert matplotlib.rcParams["font.size"] == 30
    assert first == second
    assert first.startswith(b"\x89PNG" if ending == ".png" else b"<?xml")
    assert len(first) > 5_000
    assert not re.search(rb"20\d\d-\d\d-\d\d|[Mm]atplotlib v|Software", first)


def test_lines_have_units_names_and_bands(tmp_path: Path):
    shown = texts(ac.figures.draw(results(), tmp_path / "a.svg"))
    for word in (
        "nats",
        "loss",
        "KL",
        "agreement (share)",
        "layer",
        "embed",
        "penalty (nats)",
        "penalty (bits per byte)",
    ):
        assert word in shown, word
    assert "accuracy" not in " ".join(shown)
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn.count("FillBetweenPolyCollection") == 1, "one measure of them has an interval"
    some = texts(ac.figures.draw(results(), tmp_path / "b.svg", measures=["agreement"]))
    assert "agreement (share)" in some
    assert "nats" not in some


def test_together_there_is_a_legend(tmp_path: Path):
    path = ac.figures.draw_together({"logit lens": results(), "5 $\\frac{": results(1)}, "loss", tmp_path / "a.svg")
    assert {"logit lens", "5 $\\frac{", "loss (nats)", "layer"} <= set(texts(path))
    nine = {f"lens {number}": results(number) for number in range(9)}
    assert set(nine) <= set(texts(ac.figures.draw_together(nine, "agreement", path)))


def test_small_fields_have_their_numbers_and_large_ones_do_not(tmp_path: Path):
    def field(size: int) -> list[str]:
        values = np.full((size, size), 0.25)
        names = [str(number) for number in range(size)]
        found = Results({"x": Measure(values, "1", ("a", "b"))}, {"a": names, "b": names})
        return texts(ac.figures.draw(found, tmp_path / "a.svg"))

    assert field(14).count("0.25") == 196
    assert field(15).count("0.25") <= 2, "at most on the bar"
    assert len(field(300)) < 60


def test_three_axes_are_one_field_for_each_place_of_the_first(tmp_path: Path):
    measure = Measure(np.zeros((2, 4, 4)), "share", ("seed", "lens", "layer"))
    found = Results({"share": measure}, {"seed": ["7", "8"], "lens": LAYERS, "layer": LAYERS})
    shown = texts(ac.figures.draw(found, tmp_path / "a.svg"))
    assert {"share, seed 7 (share)", "share, seed 8 (share)"} <= set(shown)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, 1e30, -1e-30])
def test_values_of_any_size_are_drawn(tmp_path: Path, value: float):
    odd = np.array([[value, 1.0], [np.nan, value]])
    names = ["a", "b"]
    measures = {"x": Measure(odd, "nats", ("p", "q")), "penalty": Measure(odd, "nats", ("p", "q"))}
    measures["y"] = Measure(odd[0], "nats", ("p",), odd[0], odd[0])
    ac.figures.draw(Results(measures, {"p": names, "q": names}), tmp_path / "a.png")
    nothing = Measure(np.full((2, 2), value), "nats", ("p", "q"))
    ac.figures.draw(Results({"x": nothing}, {"p": names, "q": names}), tmp_path / "a.png")


def test_what_cannot_be_drawn_is_refused_in_one_line(tmp_path: Path):
    single = Results({"n": Measure(np.array(1.0), "1", ())}, {})
    many = Results({"x": Measure(np.zeros((99, 2, 2)), "1", ("a", "b", "b"))}, {"a": ["x"] * 99, "b": ["p", "q"]})
    other = Results({"loss": Measure(np.zeros(2), "nats")}, {"layer": ["p", "q"]})
    calls: list[tuple[Any, type[Exception], str]] = [
        (lambda: ac.figures.draw(results(), tmp_path / "a.pdf"), ac.InvalidInput, r"\.png and \.svg"),
        (lambda: ac.figures.draw(results(), tmp_path / "a"), ac.InvalidInput, r"\.png and \.svg"),
        (lambda: ac.figures.draw(results(), tmp_path / "no/a.png"), ac.InvalidInput, "does not exist"),
        (lambda: ac.figures.draw(single, tmp_path / "a.png"), ac.InvalidInput, "0 frames"),
        (lambda: ac.figures.draw(many, tmp_path / "a.png"), ac.InvalidInput, "99 frames"),
        (lambda: ac.figures.draw(results(), tmp_path / "a.png", ["x"]), ac.NotFound, "no measure 'x'"),
        (lambda: ac.figures.draw_together({}, "loss", tmp_path / "a.png"), ac.InvalidInput, "no results"),
        (lambda: ac.figures.draw_together({"a": results()}, "x", tmp_path / "a.png"), ac.NotFound, "a: no measure"),
        (lambda: ac.figures.draw_together({"a": results()}, "penalty", tmp_path / "a.png"), ac.InvalidInput, "2 axes"),
        (
            lambda: ac.figures.draw_together({"a": results(), "b": other}, "loss", tmp_path / "a.png"),
            ac.InvalidInput,
            "another axis",
        ),
        (
            lambda: ac.figures.draw_predictions(table(["a"]), tmp_path / "a.png", "mood"),  # type: ignore[arg-type]
            ac.InvalidInput,
            "probability, entropy, kl",
        ),
        (lambda: ac.figures.draw_predictions(table(["a"] * 200), tmp_path / "a.png"), ac.InvalidInput, "200 positions"),
    ]
    for call, kind, said in calls:
        with pytest.raises(kind, match=said) as error:
            call()
        assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ac.Unsupported, match=r"pip install 'actcache\[plots\]'"):
        ac.figures.draw(results(), tmp_path / "a.png")
    with pytest.raises(ac.Unsupported, match="needs matplotlib"):
        picture_path("a.svg")


ODD = [
    "$x$",
    "中文",
    "a\u0301",
    "\u0301",
    "😀",
    "\\frac{",
    "العرب",
    "שלום",
    "\x1b[31m",
    "\u202eabc",
    "&<>\"'",
    "{}%",
    "_^_",
]


@pytest.mark.parametrize("colour", ["probability", "entropy", "kl"])
def test_tokens_are_shown_as_they_are_and_what_no_font_has_escaped(tmp_path: Path, colour: Any):
    shown = texts(ac.figures.draw_predictions(table(ODD), tmp_path / "a.svg", colour))
    for token in ("$x$", "\\u4e2d\\u…", "\\frac{", "&<>\"'", "_^_", "\\U0001f6…"):
        assert token in shown, token
    ac.figures.draw_predictions(table(ODD), tmp_path / "a.png", colour)


@settings(max_examples=12)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=14))
def test_any_tokens_are_drawn_without_a_warning(tmp_path_factory: pytest.TempPathFactory, strings: list[str]):
    path = tmp_path_factory.mktemp("any") / "a.svg"
    ElementTree.parse(ac.figures.draw_predictions(table(strings, layers=2), path))


def test_names_of_lenses_and_layers_may_be_odd_too(tmp_path: Path):
    names = ODD[:4]
    square = Measure(np.eye(4), "$", ("中", "_^{"))
    ac.figures.draw(
        Results({"$\\x": square, "\\y": Measure(np.ones(4), "中", ("中",))}, {"中": names, "_^{": names}),
        tmp_path / "a.png",
    )


def oklab(srgb: np.ndarray) -> np.ndarray:
    """Of https://bottosson.github.io/posts/oklab/, forwards."""
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    lms = (
        np.array(
            [
                [0.4122214708, 0.5363325363, 0.0514459929],
                [0.2119034982, 0.6806995451, 0.1073969566],
                [0.0883024619, 0.2817188376, 0.6299787005],
            ]
        )
        @ linear.T
    )
    return (
        np.array(
            [
                [0.2104542553, 0.7936177850, -0.0040720468],
                [1.9779984951, -2.4285922050, 0.4505937099],
                [0.0259040371, 0.7827717662, -0.8086757660],
            ]
        )
        @ np.cbrt(lms)
    ).T


def test_the_diverging_map_goes_in_equal_steps_and_as_far_on_both_sides():
    colours = diverging_table()
    assert colours.shape == (2 * STEPS + 1, 3)
    lab = oklab(colours)
    steps = np.linalg.norm(np.diff(lab, axis=0), axis=1)
    np.testing.assert_allclose(steps, steps.mean(), rtol=0.02)
    np.testing.assert_allclose(lab[:STEPS, 0], lab[:STEPS:-1, 0], atol=1e-3)
    assert lab[STEPS, 0] == lab[:, 0].max()
    assert np.linalg.norm(lab[0] - lab[-1]) > 0.2, "the ends are told apart by hue"


def test_numbers_are_read_on_every_colour():
    def contrast(a: float, b: float) -> float:
        return (max(a, b) + 0.05) / (min(a, b) + 0.05)

    def luminance(colour: np.ndarray) -> float:
        return float(
            np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
        )

    maps = [diverging_table(), *(matplotlib.colormaps[name](np.arange(256))[:, :3] for name in ("viridis", "cividis"))]
    for colour in np.concatenate(maps):
        assert contrast(luminance(colour), 1.0 if ink(colour) == "white" else 0.0) >= 4.5
    for line in LINES:
        assert contrast(luminance(np.array(matplotlib.colors.to_rgb(line))), 1.0) >= 2


def test_one_outlier_does_not_hide_all_others():
    values = np.append(np.linspace(0, 5, 48), 23.8)
    assert _ends(values) == (0, 5)
    assert _ends(values[:-1]) == (0, 5)
    assert _ends(np.array([])) == (0, 1)
    assert _ends(np.array([2.0, 2.0])) == (2, 2)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.00"), (-0.001, "0.00"), (-0.25, "−0.25"), (23.84, "23.8"), (123.4, "123"), (2e7, "2e7")],
)
def test_numbers_are_short(value: float, text: str):
    assert _number(value) == text


def test_every_character_of_the_fonts_is_kept():
    assert drawable("é␣↵⇥×…�◌α") == "é␣↵⇥×…�◌α"
    assert drawable("中\x00") == "\\u4e2d\\x00"
