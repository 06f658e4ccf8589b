"""What a probe is: an affine map for each layer's states, and what was measured of it on documents that it was not fitted on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.clients.probe.examples import examples
from actcache.clients.probe.labels import Task, read_labels
from actcache.clients.probe.measure import chosen, of_classes, of_numbers
from actcache.clients.probe.ridge import Affine
from actcache.clients.probe.storing import load_probe, save_probe
from actcache.clients.results import Results
from actcache.schemas.errors import InvalidInput, NotFound, SpecMismatch, Unsupported

if TYPE_CHECKING:
    from actcache.clients.selection import Selectable


@dataclass(frozen=True, eq=False, repr=False)
class Probe:
    """A linear probe of several layers, with the attributes and methods that scikit-learn gives to linear models, one row a layer.

    Attributes:
        task: `classification` or `regression`.
        method: `ridge` or `logistic`.
        sites: the states that it reads.
        labels: what they are called.
        classes_: the classes, ascending; empty of a regression.
        coef_: (layer, outputs, d) float32: a row for each class, or number; of two classes one row, which is for the second.
        intercept_: (layer, outputs) float32.
        alpha_: the penalty of each layer, (layer,), as Ridge's `alpha` and LogisticRegression's 1/C, of standardised states.
        results: what was measured on the held-out documents.
        model: hash of the model whose states it reads.
        facts: how it was made; JSON takes it.
    """

    task: Task
    method: str
    sites: tuple[str, ...]
    labels: tuple[str, ...]
    classes_: np.ndarray
    coef_: np.ndarray
    intercept_: np.ndarray
    alpha_: np.ndarray
    results: Results
    model: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layers, rows = len(self.sites), len(self.classes_) if len(self.classes_) != 2 else 1
        outputs = self.coef_.shape[1] if self.coef_.ndim == 3 else 0
        if (
            self.coef_.shape[:1] != (layers,)
            or not outputs
            or self.intercept_.shape != (layers, outputs)
            or self.alpha_.shape != (layers,)
            or (self.task == "classification" and outputs != rows)
        ):
            raise InvalidInput(
                f"a probe of {layers} layers has coef_ (layer, outputs, d), intercept_ (layer, outputs) and alpha_ (layer,), "
                f"not {self.coef_.shape}, {self.intercept_.shape} and {self.alpha_.shape}"
            )

    @property
    def width(self) -> int:
        """Dimensions of a state."""
        return int(self.coef_.shape[2])

    @property
    def best(self) -> int:
        """The layer that did best on the held-out documents."""
        return int(np.nanargmax(self.results["accuracy" if self.task == "classification" else "r2"]))

    def decision_function(self, x: np.ndarray, layer: int | str) -> np.ndarray:
        """W x + b of states (n, d) of a layer, given by its number among the sites or its site: (n, outputs); (n,) for one output.

        Raises:
            InvalidInput: the states have another width.
            NotFound: no such layer.
        """
        number, x = self._layer(layer), np.asarray(x)
        if x.ndim != 2 or x.shape[1] != self.width:
            raise InvalidInput(f"states (n, {self.width}) are asked for, not {x.shape}")
        found = x @ self.coef_[number].T + self.intercept_[number]
        return np.asarray(found[:, 0] if found.shape[1] == 1 else found)

    def predict_proba(self, x: np.ndarray, layer: int | str) -> np.ndarray:
        """The probability of each class, (n, classes), for states (n, d) of a layer.

        Raises:
            Unsupported: the probe is no logistic regression.
            InvalidInput, NotFound: as `decision_function`.
        """
        if self.method != "logistic":
            raise Unsupported("a ridge probe has no probabilities; fit with method='logistic'")
        logits = self.decision_function(x, layer)
        if logits.ndim == 1:
            logits = np.stack([np.zeros_like(logits), logits], 1)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(odds / odds.sum(axis=1, keepdims=True))

    def predict(self, x: np.ndarray | Selectable, layer: int | str | None = None) -> np.ndarray:
        """What the probe says of states (n, d) of a layer, (n,); or of the tokens of a dataset or selection, in its order.

        Without a layer, of all layers of a dataset: (layer, n). Of a regression with several outputs, (…, n, outputs).

        Raises:
            SpecMismatch: the dataset is of another model.
            InvalidInput: states of no layer, or of another width.
            NotFound: no such layer, or the dataset lacks a site.
        """
        if isinstance(x, np.ndarray) or not hasattr(x, "whole"):
            if layer is None:
                raise InvalidInput("predict(x): say which layer the states are of: predict(x, layer=3)")
            return self._said(self.decision_function(np.asarray(x), layer))
        self.check(x)
        layers = range(len(self.sites)) if layer is None else [self._layer(layer)]
        parts: list[list[np.ndarray]] = [[] for _ in layers]
        for batch in x.batches([self.sites[number] for number in layers]):
            for number, part in zip(layers, parts, strict=True):
                part.append(self._said(self.decision_function(batch[self.sites[number]], number)))
        found = np.stack([np.concatenate(part) for part in parts])
        return found if layer is None else found[0]

    def score(self, x: np.ndarray | Selectable, y: Any, layer: int | str | None = None) -> Any:
        """Accuracy, or R² of a regression (the mean over its outputs), as scikit-learn's `score`.

        Of states (n, d) of a layer and their labels (n,), a number; of a dataset and labels as `fit` takes them, (layer,), or a number
        for one layer.

        Raises:
            SpecMismatch, InvalidInput, NotFound: as `predict` and `evaluate`.
        """
        if isinstance(x, np.ndarray) or not hasattr(x, "whole"):
            return _score(self.predict(x, layer), np.asarray(y), self.task)
        found = self.evaluate(x, y)["accuracy" if self.task == "classification" else "r2"]
        return found if layer is None else float(found[self._layer(layer)])

    def evaluate(
        self, ds: Selectable, labels: Any, max_tokens: int | None = None, quantised: str | None = None
    ) -> Results:
        """What `fit` measured of held-out documents, but for the controls, of the labelled tokens of a dataset or a selection.

        Classes that the probe does not know count as wrong. `labels` are as `fit` takes them.

        Raises:
            SpecMismatch: the dataset is of another model.
            InvalidInput, NotFound: as `fit`.
        """
        self.check(ds)
        known = self.classes_ if self.task == "classification" else None
        data = examples(ds, read_labels(ds.whole, labels, self.task, known), self.sites, max_tokens, quantised)
        probes = [
            [Affine(weight.astype(np.float64), bias.astype(np.float64))]
            for weight, bias in zip(self.coef_, self.intercept_, strict=True)
        ]
        if self.task == "regression":
            if data.answers[0].shape[1] != self.coef_.shape[1]:
                raise InvalidInput(
                    f"labels of {data.answers[0].shape[1]} numbers, and the probe is of {self.coef_.shape[1]}"
                )
            measures = of_numbers(data, probes, np.ones(self.coef_.shape[1]))
        else:
            measures = of_classes(
                data, probes, len(self.classes_), int(self.facts["majority"]), self.method == "logistic"
            )
        outputs = [str(number) for number in range(self.coef_.shape[1])]
        return Results(measures, {"layer": self.labels, "output": outputs}, {"probe": self.method, **data.read.facts()})

    def check(self, ds: Selectable) -> None:
        """Refuse a dataset that the probe cannot read.

        Raises:
            SpecMismatch: it is of another model.
        """
        if self.model != ds.whole.model_key:
            raise SpecMismatch(
                f"{ds.url}: the probe was fitted on states of another model ({self.model[:12]}…, and this is "
                f"{ds.whole.model_key[:12]}…); fit one on a dataset of this model"
            )

    def save(self, path: str | Path) -> Path:
        """Write the probe and its results as one safetensors file; returns its path.

        Raises:
            StoreError: it cannot be written.
        """
        return save_probe(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Probe:
        """A probe that `save` wrote.

        Raises:
            NotFound: no such file.
            InvalidInput: it is no probe.
            Unsupported: a later version wrote it.
        """
        return cls(**load_probe(path))

    def _layer(self, layer: int | str) -> int:
        number = self.sites.index(layer) if isinstance(layer, str) and layer in self.sites else layer
        if isinstance(number, str) or not -len(self.sites) <= number < len(self.sites):
            raise NotFound(f"no layer {layer!r}; there is 0 to {len(self.sites) - 1}: {', '.join(self.sites)}")
        return int(number) % len(self.sites)

    def _said(self, decision: np.ndarray) -> np.ndarray:
        if self.task == "regression":
            return decision
        return np.asarray(self.classes_[chosen(decision if decision.ndim == 2 else decision[:, None])])

    def __repr__(self) -> str:
        what = f"{len(self.classes_)} classes" if self.task == "classification" else f"{self.coef_.shape[1]} numbers"
        return f"<actcache {self.method} probe for {what} of {len(self.sites)} layers × {self.width}>\n{self.results!r}"


def _score(said: np.ndarray, y: np.ndarray, task: Task) -> float:
    if said.shape != y.shape:
        raise InvalidInput(f"labels of shape {y.shape} for {said.shape} predictions")
    if task == "classification":
        return float(np.mean(said == y))
    error, total = np.square(said - y).sum(axis=0), np.square(y - y.mean(axis=0)).sum(axis=0)
    return float(np.mean(1 - error / np.where(total > 0, total, np.nan)))
