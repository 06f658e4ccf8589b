"""The probes of every layer, with the penalties that do best on documents set aside for that."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from actcache.clients.probe import logistic, ridge
from actcache.clients.probe.examples import Examples
from actcache.clients.probe.moments import Moments, moments, scales
from actcache.clients.probe.ridge import Affine, Normal


@dataclass(frozen=True)
class Solved:
    """Probes by layer and answer: of the labels, and of each control task.

    Attributes:
        probes: of states as the dataset has them.
        alpha: the penalty of each layer's probe of the labels, (layer,).
        path: what chose it: R², or the loss, of each penalty on the validation part, (layer, alpha). None where there was no choice.
        passes: over the fitted tokens.
    """

    probes: list[list[Affine]]
    alpha: np.ndarray
    path: np.ndarray | None
    passes: int


def by_ridge(fitted: Examples, part: np.ndarray, path: np.ndarray, classes: int, outputs: int) -> Solved:
    """Ridge regression; part 1 of the tokens chooses among the penalties, and both are then fitted. Of classes it is one of 1 and −1."""
    found, alpha, scores = [], [], []
    layer_scale = scales(fitted)
    for layer, sums in moments(fitted, part, outputs):
        normal = Normal.of(_all(sums))
        best = np.zeros(len(fitted.answers), int)
        if len(sums) > 1:
            score = ridge.path_scores(Normal.of(sums[0]), sums[1], path)
            best = np.where(np.isnan(score), -np.inf, score).argmax(axis=1)
            scores.append(score[0])
        weights = (ridge.solve(normal, number, float(path[best[number]])) for number in range(len(fitted.answers)))
        own = [normal.affine(w, normal.y[number], layer_scale[layer]) for number, w in enumerate(weights)]
        found.append([_of_signs(probe) for probe in own] if classes else own)
        alpha.append(path[best[0]])
    return Solved(found, np.array(alpha), np.stack(scores) if scores else None, 1)


def _of_signs(probe: Affine) -> Affine:
    """A probe of 1 for a class and 0 for the others as one of 1 and −1; of two classes the second alone."""
    rows = slice(1, 2) if len(probe.bias) == 2 else slice(None)
    return Affine(2 * probe.weight[rows], 2 * probe.bias[rows] - 1)


def by_logistic(fitted: Examples, part: np.ndarray, path: np.ndarray, classes: int, tolerance: float) -> Solved:
    """Logistic regression; part 1 of the tokens chooses among the penalties, and both are then fitted, from what part 0 gave.

    Raises:
        InvalidInput: more than there is memory for.
    """
    rows = 1 if classes == 2 else classes
    layers, answers = fitted.read.n_layers, range(len(fitted.answers))
    logistic.remembered(layers, layers * len(answers) * len(path), fitted.read.width, rows)
    first, whole = [], []
    for _, sums in moments(fitted, part, classes):
        first.append(_based(sums[0]))
        whole.append(_based(_all(sums)) if len(sums) > 1 else first[-1])
    losses: np.ndarray | None = None
    best, passes = np.zeros((layers, len(answers)), int), 1
    weights = [[np.zeros((rows, fitted.read.width)) for _ in answers] for _ in whole]
    biases = [[_prior(own[0], number, rows) for number in answers] for own in whole]
    if len(path) > 1:
        tried = [
            logistic.Problem(layer, number, alpha, *first[layer], weights[layer][number], biases[layer][number])
            for layer in range(layers)
            for number in answers
            for alpha in path.tolist()
        ]
        passes += logistic.solve(fitted.only(part == 0), tried, tolerance) + 1
        losses = np.array(logistic.losses(fitted.only(part == 1), tried)).reshape(layers, len(answers), len(path))
        best = losses.argmin(axis=2)
        for (layer, number), place in np.ndenumerate(best):
            chosen = tried[(layer * len(answers) + number) * len(path) + place]
            weights[layer][number], biases[layer][number] = chosen.weight, chosen.bias
    problems = [
        logistic.Problem(
            layer, number, float(path[best[layer, number]]), *own, weights[layer][number], biases[layer][number]
        )
        for layer, own in enumerate(whole)
        for number in answers
    ]
    passes += logistic.solve(fitted, problems, tolerance)
    layer_scale = scales(fitted)
    found: list[list[Affine]] = [[] for _ in whole]
    for each in problems:
        found[each.layer].append(each.normal.affine(each.weight, each.bias, layer_scale[each.layer]))
    return Solved(found, path[best[:, 0]], losses[:, 0] if losses is not None else None, passes)


def _based(sums: Moments) -> tuple[Normal, tuple[np.ndarray, np.ndarray]]:
    """What standardises a layer's states, and eigenvectors and eigenvalues of their covariance then."""
    normal = Normal.of(sums)
    values, vectors = np.linalg.eigh(normal.xx / normal.n)
    return normal, (vectors, values)


def _prior(normal: Normal, answer: int, rows: int) -> np.ndarray:
    """The biases whose probabilities are the classes' shares, where every weight is 0."""
    share = np.clip(normal.y[answer], 1 / normal.n, 1)
    log = np.log(share)
    return np.asarray(log[1:] - log[0] if rows == 1 else log - log.mean())


def _all(sums: list[Moments]) -> Moments:
    return sum(sums[1:], sums[0])
