"""Charts, points and the changes of coordinates between them."""

from geoad.charts.chart import Chart as Chart
from geoad.charts.chart import Components as Components
from geoad.charts.chart import makers as makers
from geoad.charts.chart import path as path
from geoad.charts.point import Point as Point
from geoad.charts.point import interpolate as interpolate
from geoad.charts.point import over_batch as over_batch
from geoad.charts.point import same_point as same_point
from geoad.charts.reparametrization import Reparametrization as Reparametrization
from geoad.charts.reparametrization import between as between
