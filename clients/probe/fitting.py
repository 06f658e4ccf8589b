"""Fitting a probe on every layer of a dataset, and measuring it on documents that it was not fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from actcache.clients.probe.examples import Examples, examples
from actcache.clients.probe.labels import UNSEEN, Labels, Task, read_labels
from actcache.clients.probe.measure import of_classes, of_numbers
from actcache.clients.probe.model import Probe
from actcache.clients.probe.ridge import Affine
from actcache.clients.probe.solving import Solved, by_logistic, by_ridge
from actcache.clients.results import Measure, Results
from actcache.clients.states import whole_of
from actcache.schemas.errors import InvalidInput

if TYPE_CHECKING:
    from actcache.clients.selection import Selectable

Method = Literal["ridge", "logistic"]
RIDGE_PATH = tuple(10.0**power for power in range(-6, 2))
LOGISTIC_PATH = (1e-5, 1e-4, 1e-3, 1e-2)
"""Penalties a token: the defaults, times how many tokens are fitted."""
DRAWS = {"ridge": 5, "logistic": 1}
MOST_DRAWS = 100


def fit(
    ds: Selectable,
    labels: Any,
    *,
    sites: Sequence[str] | str | None = None,
    task: Task | None = None,
    method: Method = "ridge",
    alphas: Sequence[float] | None = None,
    held_out: float = 0.1,
    validation: float = 0.1,
    seed: int = 0,
    control: bool | Literal["type", "document"] = True,
    draws: int | None = None,
    tolerance: float = 1e-4,
    max_tokens: int | None = None,
    quantised: str | None = None,
) -> Probe:
    """Fit a linear probe on each layer (Alain & Bengio 2016, arXiv 1610.01644), all in one pass, and measure it on held-out documents.

    About a tenth of the tokens, whole documents, are held out and read once, to measure; of the others a tenth, whole documents again,
    chooses the penalty, and then all of the others are fitted with it. States are standardised: a dimension counts by its standard
    deviation. `ridge` is least squares in closed form, with the path of penalties from one eigendecomposition a layer; classes are
    then 1 and −1, and the best R² chooses. `logistic` is multinomial logistic regression, some dozens of passes, and the lowest
    loss chooses. Both are scikit-learn's, behind its `StandardScaler`.

    The control task (Hewitt & Liang 2019, arXiv 1909.03368) has the same probe tell labels at random, which each token type, or each
    document, has for all of its tokens: what a probe gets right of it, it knows by heart. Selectivity is the difference.

    Args:
        ds: a dataset, several, or tokens selected from one.
        labels: for each token of the whole dataset, (n_tokens,), or each document, (n_documents,): classes as whole numbers, strings or
            booleans, or numbers as floats. -1 (of classes), NaN and None are tokens without one. `by_token`, `by_document` and
            `by_span` make them of functions. (n_tokens, outputs) for regression on several numbers.
        sites: names or patterns of states, all equally wide; by default the residual stream.
        task: `classification` or `regression`; by default floats are regression.
        method: `ridge` or `logistic`.
        alphas: penalties to choose among, as `Ridge(alpha)` and `LogisticRegression(C=1/alpha)`; one alone needs no validation. By
            default the number of tokens times 1e-6 to 10 (ridge) or 1e-5 to 0.01 (logistic).
        held_out: share of the tokens to measure on.
        validation: share of the other tokens to choose the penalty on.
        seed: of the division into documents, and of the control.
        control: draw labels of the control by `type`, or `document`; True for the second where no document has two labels; False for no
            control.
        draws: how many control tasks to take the mean of; by default 5 (ridge) or 1 (logistic), whose fits take that much longer.
        tolerance: of `logistic`, the largest component of the mean loss's gradient that is taken as none, in nats, by default
            scikit-learn's; a warning tells what is left after 500 passes.
        max_tokens: how many tokens of the dataset or selection to look at.
        quantised: a kind (`int8`, `fp8`) to read the states in.

    Returns:
        The probe. Its `results` are by layer, with intervals from resampled documents: of classes `accuracy`, `control_accuracy`,
        `selectivity` and `balanced_accuracy` as shares, `loss` in nats (logistic), and `baseline`, the share of the class that is
        most frequent in the fitted tokens; of numbers `r2`, `control_r2`, `selectivity` and `rmse`. `validation` has the whole path.

    Raises:
        InvalidInput: labels that do not fit the dataset, one class alone, too few documents or sequences, or arguments that make no sense.
        NotFound: no such site, in the form asked for.
    """
    draws = DRAWS.get(method, 1) if draws is None else draws
    _checked(method, alphas, draws, tolerance)
    found = read_labels(whole_of(ds), labels, task)
    if found.task == "regression" and method == "logistic":
        raise InvalidInput("logistic regression is of classes; regression is method='ridge'")
    data = examples(ds, found, sites, max_tokens, quantised)
    fitted, held = data.split(held_out, seed)
    data, drawn = data.with_controls(control, draws, seed, fitted.answers[0])
    fitted, held = data.of(fitted.read), data.of(held.read)
    fitted, held, answers = _answers(found, fitted, held)
    path = np.array(alphas, float) if alphas is not None else _default_path(method, len(fitted.read))
    part = np.zeros(len(fitted.read), np.int8)
    if len(path) > 1:
        _, chosen = fitted.split(validation, seed + 1)
        part[np.searchsorted(fitted.read.token, chosen.read.token)] = 1
    if method == "ridge":
        solved = by_ridge(fitted, part, path, len(answers.classes), answers.outputs)
    else:
        solved = by_logistic(fitted, part, path, len(answers.classes), tolerance)
    measures = _measured(held, solved, answers, method)
    results = Results(
        {**measures, **_path_measures(solved, method)},
        {"layer": held.read.labels, "alpha": [f"{alpha:.3g}" for alpha in path], "output": answers.names},
        {
            "probe": method,
            "task": found.task,
            **held.read.facts(),
            "fitted_tokens": len(fitted.read),
            "passes": solved.passes,
            f"fitted_{fitted.read.groups.by}s": fitted.read.groups.count,
            "control": drawn,
        },
    )
    weights = [answers.of_labels(own[0]) for own in solved.probes]
    return Probe(
        found.task,
        method,
        fitted.read.sites,
        fitted.read.labels,
        answers.classes,
        np.stack([own.weight for own in weights]).astype(np.float32),
        np.stack([own.bias for own in weights]).astype(np.float32),
        solved.alpha,
        results,
        ds.whole.model_key,
        {
            "dataset": _keys(ds.whole),
            "majority": answers.majority,
            "held_out": held_out,
            "validation": validation,
            "seed": seed,
            "control": drawn,
            "draws": draws,
        },
    )


@dataclass(frozen=True)
class _Answers:
    """How answers are numbered, or scaled, while a probe is fitted.

    Attributes:
        classes: those of the fitted tokens.
        majority: the number of the most frequent one; -1 of numbers.
        names: of the outputs.
        mean, scale: of numbers, what was subtracted and divided by, (outputs,).
    """

    classes: np.ndarray
    majority: int
    names: list[str]
    mean: np.ndarray
    scale: np.ndarray

    @property
    def outputs(self) -> int:
        return len(self.names)

    def of_labels(self, probe: Affine) -> Affine:
        """A probe of the answers as one of the labels."""
        if not len(self.classes):
            return Affine(probe.weight * self.scale[:, None], probe.bias * self.scale + self.mean)
        return probe


def _answers(found: Labels, fitted: Examples, held: Examples) -> tuple[Examples, Examples, _Answers]:
    """Both parts with their classes numbered as the fitted tokens have them, or their numbers scaled."""
    if found.task == "regression":
        values = fitted.answers[0]
        mean, scale = values.mean(axis=0), values.std(axis=0)
        if not scale.all():
            raise InvalidInput(f"{fitted.read.ds.url}: all tokens have the same number; there is nothing to fit")
        names = [str(number) for number in range(len(mean))]
        fitted, held = (part.mapped(lambda answer: (answer - mean) / scale) for part in (fitted, held))
        return fitted, held, _Answers(np.empty(0), -1, names, mean, scale)
    there = np.unique(fitted.answers[0])
    if len(there) < 2:
        raise InvalidInput(f"{fitted.read.ds.url}: the fitted tokens have one class alone: {found.classes[there[0]]}")
    number = np.full(len(found.classes), UNSEEN, np.int32)
    number[there] = np.arange(len(there))
    fitted, held = (part.mapped(lambda answer: number[answer]) for part in (fitted, held))
    classes = found.classes[there]
    names = [str(name) for name in classes.tolist()]
    return (
        fitted,
        held,
        _Answers(classes, int(np.bincount(fitted.answers[0]).argmax()), names, np.empty(0), np.empty(0)),
    )


def _keys(whole: Any) -> list[str]:
    """The key of a dataset, or of each that is joined."""
    return [part.key for part in getattr(whole, "parts", (whole,))]


def _checked(method: str, alphas: Sequence[float] | None, draws: int, tolerance: float) -> None:
    if method not in ("ridge", "logistic"):
        raise InvalidInput(f"method={method!r}: there is ridge and logistic")
    if alphas is not None and not (len(alphas) and all(np.isfinite(alpha) and alpha > 0 for alpha in alphas)):
        raise InvalidInput(f"alphas={list(alphas)}: give penalties above 0")
    if not tolerance > 0:
        raise InvalidInput(f"tolerance={tolerance}: give a gradient above 0")
    if not 1 <= draws <= MOST_DRAWS:
        raise InvalidInput(f"draws={draws}: give a number from 1 to {MOST_DRAWS}")


def _default_path(method: Method, tokens: int) -> np.ndarray:
    return np.array(RIDGE_PATH if method == "ridge" else LOGISTIC_PATH) * tokens


def _measured(held: Examples, solved: Solved, answers: _Answers, method: Method) -> dict[str, Measure]:
    if not len(answers.classes):
        return of_numbers(held, solved.probes, answers.scale)
    return of_classes(held, solved.probes, len(answers.classes), answers.majority, method == "logistic")


def _path_measures(solved: Solved, method: Method) -> dict[str, Measure]:
    found = {"alpha": Measure(solved.alpha, "1")}
    if solved.path is not None:
        unit = "1" if method == "ridge" else "nats"
        name = "validation_r2" if method == "ridge" else "validation_loss"
        found[name] = Measure(solved.path, unit, ("layer", "alpha"))
    return found
