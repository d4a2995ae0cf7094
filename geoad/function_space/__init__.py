"""Function space: the outputs of a network over a data set as a space, its Jacobian as a two-point tensor, and what follows."""

from geoad.function_space.dual import DualSolver as DualSolver
from geoad.function_space.dual import dual_solve as dual_solve
from geoad.function_space.jacobian import Jacobian as Jacobian
from geoad.function_space.linearized import Linearized as Linearized
from geoad.function_space.linearized import linearized as linearized
from geoad.function_space.metric import OutputMetric as OutputMetric
from geoad.function_space.space import FunctionSpace as FunctionSpace
