"""Charts, points and the changes of coordinates between them."""

from geoad.charts.atlas import Atlas as Atlas
from geoad.charts.batches import over_batch as over_batch
from geoad.charts.batches import singles as singles
from geoad.charts.chart import Chart as Chart
from geoad.charts.chart import Components as Components
from geoad.charts.chart import makers as makers
from geoad.charts.point import Point as Point
from geoad.charts.point import interpolate as interpolate
from geoad.charts.point import same_point as same_point
from geoad.charts.relations import flat_reference as flat_reference
from geoad.charts.relations import meeting as meeting
from geoad.charts.relations import path as path
from geoad.charts.relations import same_manifold as same_manifold
from geoad.charts.relations import same_space as same_space
from geoad.charts.relations import section_between as section_between
from geoad.charts.relations import station as station
from geoad.charts.relations import why_apart as why_apart
from geoad.charts.reparametrization import Reparametrization as Reparametrization
from geoad.charts.reparametrization import between as between
