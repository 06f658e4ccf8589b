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
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidInput(f"{path}: a damaged probe: {error!r}") from None
