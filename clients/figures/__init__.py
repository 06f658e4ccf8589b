"""Pictures of datasets and of what was measured on them, as PNG or SVG. They need the extra `plots`."""

from actcache.clients.figures.drawing import draw, draw_together
from actcache.clients.figures.overview import overview
from actcache.clients.figures.table import draw_predictions

__all__ = ["draw", "draw_predictions", "draw_together", "overview"]
