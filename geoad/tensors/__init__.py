"""The typed objects and their typing table."""

from geoad.tensors import gate as _gate  # fills the gate  # noqa: F401  # pyright: ignore[reportUnusedImport]
from geoad.tensors import leaves as _leaves  # makes two-index objects pytrees  # noqa: F401  # pyright: ignore[reportUnusedImport]
from geoad.tensors import measured as _measured  # fills the methods of forms  # noqa: F401  # pyright: ignore[reportUnusedImport]
from geoad.tensors.base import Axis as Axis
from geoad.tensors.base import TensorType as TensorType
from geoad.tensors.base import TypedTensor as TypedTensor
from geoad.tensors.base import describe as describe
from geoad.tensors.base import require_same_place as require_same_place
from geoad.tensors.construct import as_operator as as_operator
from geoad.tensors.crossing import quotient_logdet as quotient_logdet
from geoad.tensors.densities import Density as Density
from geoad.tensors.densities import LogDensity as LogDensity
from geoad.tensors.forms import Cometric as Cometric
from geoad.tensors.forms import DualEndomorphism as DualEndomorphism
from geoad.tensors.forms import Endomorphism as Endomorphism
from geoad.tensors.forms import Form as Form
from geoad.tensors.forms import HorizontalMetric as HorizontalMetric
from geoad.tensors.forms import InnerProduct as InnerProduct
from geoad.tensors.forms import Metric as Metric
from geoad.tensors.forms import reference_metric as reference_metric
from geoad.tensors.forms import seen_from as seen_from
from geoad.tensors.general import GeoTensor as GeoTensor
from geoad.tensors.general import build as build
from geoad.tensors.rank1 import Covector as Covector
from geoad.tensors.rank1 import Rank1 as Rank1
from geoad.tensors.rank1 import Vector as Vector
from geoad.tensors.rank2 import Rank2 as Rank2
