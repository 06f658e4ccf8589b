"""A probe as a safetensors file, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.clients import tensor_file
from actcache.clients.results import Measure, Results
from actcache.schemas.errors import InvalidInput

if TYPE_CHECKING:
    from actcache.clients.probe.model import Probe

KIND = "probe"
PARTS = ("value", "low", "high")
CLASSES = {"U": str, "b": bool, "i": int, "u": int, "f": float}


def save_probe(probe: Probe, path: str | Path) -> Path:
    """Write a probe. Raises as `tensor_file.write`."""
    arrays = {"coef": probe.coef_, "intercept": probe.intercept_, "alpha": probe.alpha_}
    measures = {}
    for name, each in probe.results.measures.items():
        measures[name] = {"unit": each.unit, "axes": list(each.axes)}
        found = {part: getattr(each, part) for part in PARTS}
        arrays |= {f"results/{name}/{part}": np.asarray(v, np.float64) for part, v in found.items() if v is not None}
    facts = {
        "kind": KIND,
        "task": probe.task,
        "method": probe.method,
        "sites": list(probe.sites),
        "labels": list(probe.labels),
        "classes": {"dtype": probe.classes_.dtype.kind, "values": probe.classes_.tolist()},
        "model": probe.model,
        "facts": dict(probe.facts),
        "results": {
            "measures": measures,
            "labels": {axis: list(names) for axis, names in probe.results.labels.items()},
            "facts": dict(probe.results.facts),
        },
    }
    return tensor_file.write(path, arrays, facts)


def load_probe(path: str | Path) -> dict[str, Any]:
    """What a probe is made of, from a file.

    Raises:
        InvalidInput: it is no probe. And as `tensor_file.read`.
    """
    arrays, facts = tensor_file.read(path, KIND)
    try:
        told = facts["results"]
        measures = {
            name: Measure(
                arrays[f"results/{name}/value"],
                each["unit"],
                tuple(each["axes"]),
                *(arrays.get(f"results/{name}/{end}") for end in ("low", "high")),
            )
            for name, each in told["measures"].items()
        }
        _check(path, facts, measures)
        kind = CLASSES[facts["classes"]["dtype"]]
        return {
            **{name: facts[name] for name in ("task", "method", "model", "facts")},
            "sites": tuple(facts["sites"]),
            "labels": tuple(facts["labels"]),
            "classes_": np.array([kind(value) for value in facts["classes"]["values"]], kind),
            "coef_": arrays["coef"],
            "intercept_": arrays["intercept"],
            "alpha_": arrays["alpha"],
            "results": Results(measures, told["labels"], told["facts"]),
        }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InvalidInput(f"{path}: a damaged probe: {error!r}") from None


def _check(path: str | Path, facts: dict[str, Any], measures: dict[str, Measure]) -> None:
    """Refuse facts of other types, and results that do not go with their labels. Raises `ValueError` or what such facts make."""
    told = facts["results"]
    texts = (facts["model"], facts["method"], *facts["sites"], *facts["labels"])
    labels = told["labels"]
    right = (
        facts["task"] in ("classification", "regression"),
        all(isinstance(text, str) for text in texts),
        len(facts["labels"]) == len(facts["sites"]),
        isinstance(facts["facts"], dict) and isinstance(told["facts"], dict),
        all(isinstance(name, str) for names in labels.values() for name in names),
        ("accuracy" if facts["task"] == "classification" else "r2") in measures,
    )
    if not all(right):
        raise ValueError("facts that are not those of a probe")
    for name, each in measures.items():
        shape = tuple(len(labels[axis]) for axis in each.axes)
        if any(part is not None and part.shape != shape for part in (each.value, each.low, each.high)):
            raise ValueError(f"{name} is not shaped as its labels, {shape}")
