"""Likelihoods: what the outputs of a network parametrise, and the curvature A(f) of -log p in output space."""

from geoad.curvature.likelihoods.base import Likelihood as Likelihood
from geoad.curvature.likelihoods.categorical import Categorical as Categorical
from geoad.curvature.likelihoods.elementwise import Bernoulli as Bernoulli
from geoad.curvature.likelihoods.elementwise import Poisson as Poisson
from geoad.curvature.likelihoods.family import Family as Family
from geoad.curvature.likelihoods.gaussian import Gaussian as Gaussian
from geoad.curvature.likelihoods.general import Loss as Loss
from geoad.curvature.likelihoods.general import OutputMatrix as OutputMatrix
from geoad.curvature.likelihoods.named import likelihood_of as likelihood_of
