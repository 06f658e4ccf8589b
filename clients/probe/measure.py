"""How well probes do: sums over the tokens of each document, and the measures that they make."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from actcache.clients.bootstrap import CONFIDENCE, mean, resampled
from actcache.clients.covariance import centres, one_pass
from actcache.clients.probe.examples import Examples
from actcache.clients.probe.logistic import cross_entropy
from actcache.clients.probe.ridge import Affine
from actcache.clients.results import Measure
from actcache.clients.states import Piece

MOST_COUNTS = 1 << 25
"""Numbers by document, layer and class; of more, `balanced_accuracy` is left out."""


def of_classes(
    data: Examples, probes: Sequence[Sequence[Affine]], classes: int, majority: int, probabilistic: bool
) -> dict[str, Measure]:
    """The measures of classifiers, `probes` by layer and answer. A token of a class that they do not know is wrong, and has no loss."""
    read, groups = data.read, data.read.groups
    shift = centres(read)
    correct = np.zeros((len(data.answers), groups.count, read.n_layers))
    loss = np.zeros((groups.count, read.n_layers))
    counted = groups.count * read.n_layers * classes <= MOST_COUNTS
    by_class = np.zeros((read.n_layers, groups.count, classes) if counted else (0, 0, 0))
    truth = data.answers[0]
    known = truth >= 0

    def count(layer: int, x: np.ndarray, piece: Piece) -> None:
        rows = slice(piece.low, piece.high)
        owner = groups.of[rows]
        for number, answers in enumerate(data.answers):
            answer = answers[rows]
            found = decisions(probes[layer][number], x, shift[layer])
            right = chosen(found) == answer
            correct[number, :, layer] += np.bincount(owner, right, groups.count)
            if number == 0 and counted:
                np.add.at(by_class[layer], (owner[right], answer[right]), 1)
            if number == 0 and probabilistic:
                some = known[rows]
                loss[:, layer] += np.bincount(owner[some], cross_entropy(found[some], answer[some])[0], groups.count)

    one_pass(read, count)
    tokens = np.bincount(groups.of, minlength=groups.count)
    measures = {"accuracy": mean(correct[0], tokens, "share")}
    if len(data.answers) > 1:
        control = correct[1:].mean(axis=0)
        measures["control_accuracy"] = mean(control, tokens, "share")
        measures["selectivity"] = mean(correct[0] - control, tokens, "share")
    if counted:
        totals = np.zeros((groups.count, classes))
        np.add.at(totals, (groups.of[known], truth[known]), 1)
        measures["balanced_accuracy"] = _balanced(by_class, totals)
    if probabilistic:
        measures["loss"] = mean(loss, np.bincount(groups.of[known], minlength=groups.count), "nats")
    measures["baseline"] = mean(np.bincount(groups.of, truth == majority, groups.count), tokens, "share", ())
    return measures


def of_numbers(data: Examples, probes: Sequence[Sequence[Affine]], scale: np.ndarray) -> dict[str, Measure]:
    """The measures of regressions; `scale` is what the answers were divided by, (outputs,)."""
    read, groups = data.read, data.read.groups
    shift = centres(read)
    outputs = data.answers[0].shape[1]
    error = np.zeros((len(data.answers), groups.count, read.n_layers, outputs))

    def count(layer: int, x: np.ndarray, piece: Piece) -> None:
        rows = slice(piece.low, piece.high)
        for number, answers in enumerate(data.answers):
            found = decisions(probes[layer][number], x, shift[layer])
            wrong = np.square(found - answers[rows])
            for output in range(outputs):
                error[number, :, layer, output] += np.bincount(groups.of[rows], wrong[:, output], groups.count)

    one_pass(read, count)
    tokens = np.bincount(groups.of, minlength=groups.count).astype(float)
    r2 = [
        _r2(tokens, groups.sums(answer), groups.sums(np.square(answer)), error[n])
        for n, answer in enumerate(data.answers)
    ]
    value, drawn = (each.mean(axis=-1) for each in r2[0])
    measures = {"r2": _interval(value, drawn, "1")}
    if len(r2) > 1:
        control, by_chance = (np.mean([each[part].mean(axis=-1) for each in r2[1:]], axis=0) for part in (0, 1))
        measures["control_r2"] = _interval(control, by_chance, "1")
        measures["selectivity"] = _interval(value - control, drawn - by_chance, "1")
    if outputs > 1:
        measures["r2_output"] = _interval(r2[0][0], r2[0][1], "1", ("layer", "output"))
    squared = (error[0] * scale**2).mean(axis=-1)
    root = mean(squared, tokens, "squared units of the labels")
    ends = [None if end is None else np.sqrt(end) for end in (root.low, root.high)]
    measures["rmse"] = Measure(np.sqrt(root.value), "units of the labels", ("layer",), *ends)
    return measures


def decisions(probe: Affine, x: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """What a probe says of rows (n, d) that `centre` was taken from: (n, outputs), float32."""
    return np.asarray(x @ probe.weight.T.astype(np.float32) + (probe.bias + probe.weight @ centre).astype(np.float32))


def chosen(decision: np.ndarray) -> np.ndarray:
    """The class of each row (n,) of decisions (n, outputs); one output is that of class 1."""
    return (decision[:, 0] > 0).astype(np.int64) if decision.shape[1] == 1 else decision.argmax(axis=1)


def _balanced(by_class: np.ndarray, totals: np.ndarray) -> Measure:
    """The mean over classes of the share of a class's tokens that are told; of the classes that there are among the tokens."""
    there = totals.sum(axis=0) > 0
    value = np.stack([(own.sum(axis=0) / np.maximum(totals.sum(axis=0), 1))[there].mean() for own in by_class])
    if len(totals) < 2:
        return Measure(value, "share")
    drawn_totals = resampled(totals[:, there])
    drawn = []
    for own in by_class:
        with np.errstate(invalid="ignore"):
            recall = resampled(own[:, there]) / drawn_totals
        seen = drawn_totals > 0  # a class can be missing from resampled documents
        drawn.append(np.where(seen, recall, 0).sum(axis=1) / seen.sum(axis=1))
    return _interval(value, np.stack(drawn, 1), "share")


def _r2(n: np.ndarray, y: np.ndarray, yy: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """1 − Σ (y − f)² / Σ (y − ȳ)², (layer, outputs), and the same of resampled documents, from sums by document."""

    def of(n: np.ndarray, y: np.ndarray, yy: np.ndarray, error: np.ndarray) -> np.ndarray:
        total = (yy - y**2 / n[..., None])[..., None, :]
        return 1 - error / np.where(total > 0, total, np.nan)

    value = of(n.sum(axis=0), y.sum(axis=0), yy.sum(axis=0), error.sum(axis=0))
    return value, of(*(resampled(each) for each in (n, y, yy, error))) if len(n) > 1 else value[None]


def _interval(value: np.ndarray, drawn: np.ndarray, unit: str, axes: tuple[str, ...] = ("layer",)) -> Measure:
    """A measure with the percentile interval of what resampled documents gave, (resample, …); of one alone there is none."""
    if len(drawn) < 2:
        return Measure(value, unit, axes)
    never = np.isnan(drawn).all(axis=0)
    ends = np.nanquantile(np.where(never, 0, drawn), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    low, high = np.where(never, np.nan, ends)
    return Measure(value, unit, axes, low, high)
