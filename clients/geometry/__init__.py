"""The geometry of states: how alike two layers are, how many dimensions they use, how their norms grow, which values are massive.

Every function takes a dataset, a selection, or `lens.states(…)` of one. No head is needed, and the states need not be a GPT's.
Nothing here runs the model.
"""

from actcache.clients.geometry.massive import massive
from actcache.clients.geometry.norms import norms
from actcache.clients.geometry.similarity import similarity
from actcache.clients.geometry.spectrum import spectrum

__all__ = ["massive", "norms", "similarity", "spectrum"]
