"""Changes of coordinates. ``maps.X`` is always ψ = X(θ); its image is the domain of ψ.

Submersions, immersions and other smooth maps are given by θ = f(ψ) instead, and move fewer kinds of objects.
"""

from geoad.maps.affine import Affine as Affine
from geoad.maps.affine import LayerAffine as LayerAffine
from geoad.maps.base import BlockMap as BlockMap
from geoad.maps.base import Diffeomorphism as Diffeomorphism
from geoad.maps.base import Map as Map
from geoad.maps.compose import Compose as Compose
from geoad.maps.compose import Inverse as Inverse
from geoad.maps.constrained import Frozen as Frozen
from geoad.maps.constrained import Tied as Tied
from geoad.maps.coupling import Coupling as Coupling
from geoad.maps.elementwise import Asinh as Asinh
from geoad.maps.elementwise import Atanh as Atanh
from geoad.maps.elementwise import Elementwise as Elementwise
from geoad.maps.elementwise import Exp as Exp
from geoad.maps.elementwise import Identity as Identity
from geoad.maps.elementwise import Log as Log
from geoad.maps.elementwise import Power as Power
from geoad.maps.elementwise import Scale as Scale
from geoad.maps.elementwise import Sinh as Sinh
from geoad.maps.elementwise import Softplus as Softplus
from geoad.maps.elementwise import Tanh as Tanh
from geoad.maps.factorization import Factorization as Factorization
from geoad.maps.from_parametrized import Parametrized as Parametrized
from geoad.maps.from_parametrized import from_parametrized as from_parametrized
from geoad.maps.from_transform import from_transform as from_transform
from geoad.maps.functions import Functions as Functions
from geoad.maps.immersion import Immersion as Immersion
from geoad.maps.inversion import Inversion as Inversion
from geoad.maps.lora import LoRA as LoRA
from geoad.maps.orthogonal import Householder as Householder
from geoad.maps.orthogonal import Orthogonal as Orthogonal
from geoad.maps.permutation import Permutation as Permutation
from geoad.maps.plane import PolarPlane as PolarPlane
from geoad.maps.polar import Polar as Polar
from geoad.maps.rescale import Rescale as Rescale
from geoad.maps.smooth import SmoothMap as SmoothMap
from geoad.maps.submersion import Submersion as Submersion
from geoad.maps.subspace import Subspace as Subspace
from geoad.maps.weight_norm import WeightNorm as WeightNorm
from geoad.maps.wrap import Wrap as Wrap
