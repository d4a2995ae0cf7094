"""Scalar fields and metric fields on a manifold."""

from geoad.fields.chartwise import FormByChart as FormByChart
from geoad.fields.chartwise import ScalarByChart as ScalarByChart
from geoad.fields.metric import FormField as FormField
from geoad.fields.metric import MetricField as MetricField
from geoad.fields.metric import SumField as SumField
from geoad.fields.scalar import ScalarField as ScalarField
from geoad.fields.transition import Transition as Transition
