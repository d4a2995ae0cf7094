"""Curvature matrices of networks as metric fields."""

from geoad.curvature.fisher import Fisher as Fisher
from geoad.curvature.likelihoods import Bernoulli as Bernoulli
from geoad.curvature.likelihoods import Categorical as Categorical
from geoad.curvature.likelihoods import Gaussian as Gaussian
from geoad.curvature.likelihoods import Likelihood as Likelihood
from geoad.curvature.likelihoods import Poisson as Poisson
from geoad.curvature.pullback import OutputCurvature as OutputCurvature
