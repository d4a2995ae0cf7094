"""Optimizers whose steps are the same in every chart."""

from geoad.optim.invariant import Invariant as Invariant
