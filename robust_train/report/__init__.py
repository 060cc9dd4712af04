"""Numbers and pictures in, self-contained documents out.

Reads results, never a model, and so needs neither torch nor Lightning. Each drawing is an SVG document of its own:
write it to a ``.svg``, paste it into HTML, or put it on a :func:`page` with others.
"""

from .charts import Series as Series
from .charts import line_chart as line_chart
from .pages import page as page
from .pictures import Tile as Tile
from .pictures import diverging as diverging
from .pictures import image_grid as image_grid
from .privacy import epsilon_chart as epsilon_chart
from .privacy import epsilon_over_steps as epsilon_over_steps
