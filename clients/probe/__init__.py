"""Linear probes: what a linear map tells of each layer's states. Nothing here runs the model.

`fit` takes a dataset and labels, one a token; `by_token`, `by_document` and `by_span` make labels from text.
"""

from actcache.clients.probe.fitting import fit
from actcache.clients.probe.model import Probe
from actcache.clients.probe.texts import by_document, by_span, by_token

__all__ = ["Probe", "by_document", "by_span", "by_token", "fit"]
