"""Lenses: what a residual state predicts when the model's own head reads it. Nothing here runs the model.

Every function takes a dataset, a selection, or `states(…)` of one, which says which tokens and which states.
"""

from actcache.cache.head import Head
from actcache.clients.lens.compare import compare
from actcache.clients.lens.errors import error_prediction
from actcache.clients.lens.exchange import export_tuned_lens, import_tuned_lens
from actcache.clients.lens.files import load, save
from actcache.clients.lens.fitting import fit
from actcache.clients.lens.future import future
from actcache.clients.lens.logit import evaluate, logit
from actcache.clients.lens.predictions import Predictions, predictions
from actcache.clients.lens.trajectories import Trajectories, trajectories
from actcache.clients.lens.transfer import transfer
from actcache.clients.lens.translators import Lens, identity
from actcache.clients.lens.updates import alignment
from actcache.clients.results import Results
from actcache.clients.states import States, states

__all__ = [
    "Head",
    "Lens",
    "Predictions",
    "Results",
    "States",
    "Trajectories",
    "alignment",
    "compare",
    "error_prediction",
    "evaluate",
    "export_tuned_lens",
    "fit",
    "future",
    "identity",
    "import_tuned_lens",
    "load",
    "logit",
    "predictions",
    "save",
    "states",
    "trajectories",
    "transfer",
]
