"""Changes of coordinates. ``maps.X`` is always ψ = X(θ); its image is the domain of ψ."""

from geoad.maps.affine import Affine as Affine
from geoad.maps.affine import LayerAffine as LayerAffine
from geoad.maps.base import BlockMap as BlockMap
from geoad.maps.base import Diffeomorphism as Diffeomorphism
from geoad.maps.compose import Compose as Compose
from geoad.maps.compose import Inverse as Inverse
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
from geoad.maps.orthogonal import Householder as Householder
from geoad.maps.orthogonal import Orthogonal as Orthogonal
from geoad.maps.permutation import Permutation as Permutation
from geoad.maps.polar import Polar as Polar
from geoad.maps.rescale import Rescale as Rescale
