"""geoad: geometry-aware automatic differentiation for PyTorch."""

from geoad import maps as maps
from geoad.charts import Chart as Chart
from geoad.charts import Point as Point
from geoad.charts import Reparametrization as Reparametrization
from geoad.charts import interpolate as interpolate
