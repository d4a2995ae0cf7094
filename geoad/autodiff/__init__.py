"""Derivatives that know their type."""

from geoad.autodiff.gradient import grad as grad
from geoad.autodiff.gradient import riemannian_grad as riemannian_grad
from geoad.autodiff.gradient import value_and_grad as value_and_grad
from geoad.autodiff.jacobian import jacfwd as jacfwd
from geoad.autodiff.jacobian import jacobian as jacobian
from geoad.autodiff.jacobian import jacrev as jacrev
from geoad.autodiff.jacobian import jvp as jvp
from geoad.autodiff.jacobian import pullback as pullback
from geoad.autodiff.jacobian import pushforward as pushforward
from geoad.autodiff.jacobian import vjp as vjp
from geoad.autodiff.second import eigh as eigh
from geoad.autodiff.second import hessian as hessian
