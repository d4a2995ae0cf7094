"""Geometry-blind linear algebra on dicts of blocks."""

from geoad.operators.algebra import DENSE_LIMIT as DENSE_LIMIT
from geoad.operators.algebra import compose as compose
from geoad.operators.algebra import plus as plus
from geoad.operators.algebra import require_small as require_small
from geoad.operators.algebra import times as times
from geoad.operators.algebra import to_dense as to_dense
from geoad.operators.algebra import transpose as transpose
from geoad.operators.base import Dense as Dense
from geoad.operators.base import Diagonal as Diagonal
from geoad.operators.base import Implicit as Implicit
from geoad.operators.base import LinearOperator as LinearOperator
from geoad.operators.base import Multiple as Multiple
from geoad.operators.base import Product as Product
from geoad.operators.base import Sum as Sum
from geoad.operators.base import Transpose as Transpose
from geoad.operators.eigen import eigh as eigh
from geoad.operators.eigen import eigvals as eigvals
from geoad.operators.eigen import trace as trace
from geoad.operators.solve import CG as CG
from geoad.operators.solve import Inverse as Inverse
from geoad.operators.solve import densify as densify
from geoad.operators.solve import inverse as inverse
from geoad.operators.solve import slogdet as slogdet
from geoad.operators.solve import solve as solve
